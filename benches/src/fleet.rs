//! Real workers in this process: their step loop and, between several, the TCP collective over loopback. What a
//! coordinator would send them comes from memory.

use std::error::Error;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};

use kernels::Simd;
use model::cpu::CpuBackend;
use model::device::Backend;
use protocol::batch::Batch;
use protocol::handshake::Token;
use protocol::message::{Form, Member, StateSource, StepReport, ToCoordinator};
use protocol::problem::Problem;
use protocol::slots::shards_of_rank;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use worker::collective::mesh::{FORM_LIMIT, Mesh, Place};
use worker::collective::tcp::{SILENCE_LIMIT, TcpCollective};
use worker::feed::{Feed, FeedClosed};
use worker::metrics::WorkerMetrics;
use worker::outbox::{Outbox, Outgoing};
use worker::replica::Replica;
use worker::train::{Generation, StepError};

use crate::workload::Workload;

/// Batches that wait for the workers, so that none of them waits.
const AHEAD: usize = 2;
const GENERATION: u64 = 1;

/// The workers of one generation.
pub struct Fleet {
    workload: Arc<Workload>,
    members: Vec<Member>,
    /// To each worker.
    feeds: Vec<Sender<Batch>>,
    /// What the first worker says, who speaks for all.
    says: UnboundedReceiver<Outgoing>,
    threads: Vec<JoinHandle<Result<(), Problem>>>,
    steps_sent: u64,
}

impl Fleet {
    /// Starts at least one worker, each with so many threads that compute.
    ///
    /// # Errors
    /// There are more workers than shards, or no free port. What goes wrong in a worker is an error of
    /// [`train`](Self::train).
    pub fn start(
        workload: &Arc<Workload>,
        simd: Simd,
        workers: u32,
        threads: usize,
    ) -> Result<Self, Problem> {
        let shards = workload.job.shards;
        if workers > shards {
            return Err(Problem::usage(format!("{workers} workers cannot share {shards} shards"))
                .hint("take no more workers than shards, or say --set shards=N"));
        }
        let listeners: Vec<TcpListener> = (0..workers)
            .map(|_| TcpListener::bind("127.0.0.1:0"))
            .collect::<Result<_, _>>()
            .map_err(|error| Problem::failed(format!("cannot listen on 127.0.0.1: {error}")))?;
        let members: Vec<Member> = (0..workers)
            .zip(&listeners)
            .map(|(rank, listener)| Member {
                worker_id: rank,
                name: format!("w{rank}"),
                address: listener.local_addr().expect("a bound port has an address").to_string(),
                shards: shards_of_rank(shards, workers, rank),
            })
            .collect();
        let (first_says, said) = unbounded_channel();
        let (mut feeds, mut handles) = (Vec::new(), Vec::new());
        for (rank, listener) in (0..workers).zip(listeners) {
            let (feed, batches) = mpsc::channel();
            feeds.push(feed);
            // Nobody listens to the others.
            let says = if rank == 0 { first_says.clone() } else { unbounded_channel().0 };
            let outbox = Outbox::new(says, WorkerMetrics::new(), workload.data.schedule, 0);
            let worker = Worker {
                workload: Arc::clone(workload),
                place: Place { generation: GENERATION, rank, members: members.clone() },
                listener,
                batches,
                outbox,
            };
            let backend = CpuBackend::new(simd, threads);
            handles.push(thread::spawn(move || {
                worker.work(&backend).map_err(|cause| Problem::failed(format!("worker {rank}: {cause}")))
            }));
        }
        Ok(Self {
            workload: Arc::clone(workload),
            members,
            feeds,
            says: said,
            threads: handles,
            steps_sent: 0,
        })
    }

    /// Trains for as long as `goes_on` says so of the number of steps begun by this call, and until these are done.
    ///
    /// # Errors
    /// A worker has failed, or a step was not finite, which no time should be reported of.
    pub fn train(&mut self, mut goes_on: impl FnMut(usize) -> bool) -> Result<Vec<StepReport>, Problem> {
        let (mut reports, mut under_way) = (Vec::new(), 0);
        loop {
            while under_way < AHEAD && goes_on(reports.len() + under_way) {
                self.send_step();
                under_way += 1;
            }
            if under_way == 0 {
                return Ok(reports);
            }
            reports.push(self.next_report()?);
            under_way -= 1;
        }
    }

    fn send_step(&mut self) {
        for (feed, member) in self.feeds.iter().zip(&self.members) {
            // A worker that has ended says why when it is asked.
            let _ = feed.send(self.workload.part(self.steps_sent, member.shards.clone()));
        }
        self.steps_sent += 1;
    }

    fn next_report(&mut self) -> Result<StepReport, Problem> {
        while let Some(outgoing) = self.says.blocking_recv() {
            match outgoing {
                Outgoing::Message(ToCoordinator::Step(report)) => return Ok(report),
                Outgoing::Message(ToCoordinator::Failed { sentence, .. }) => {
                    return Err(Problem::failed(sentence).hint("measure with a smaller learning_rate"));
                }
                _ => {}
            }
        }
        Err(self.end().err().unwrap_or_else(|| Problem::failed("the workers ended too early")))
    }

    /// Ends the workers.
    ///
    /// # Errors
    /// What has gone wrong in one of them.
    pub fn finish(mut self) -> Result<(), Problem> {
        self.end()
    }

    fn end(&mut self) -> Result<(), Problem> {
        self.feeds.clear();
        let ended = self.threads.drain(..).map(|thread| thread.join().expect("a worker does not panic"));
        ended.fold(Ok(()), Result::and)
    }
}

/// What a worker is started with.
struct Worker {
    workload: Arc<Workload>,
    place: Place,
    listener: TcpListener,
    batches: Receiver<Batch>,
    outbox: Outbox,
}

impl Worker {
    /// A worker's life, from its device to the end of its batches.
    fn work(self, backend: &CpuBackend) -> Result<(), Box<dyn Error + Send + Sync>> {
        let Self { workload, place, listener, batches, outbox } = self;
        let Workload { job, data, layout, .. } = &*workload;
        let mut device = backend.open(layout, job, data, false)?;
        let mut replica = Replica::initial(&device, layout.clone(), job)?;
        let (rank, members) = (place.rank, place.members.clone());
        let (step, owes_evaluation, state) = (0, false, StateSource::Initial);
        let form = Form { generation: GENERATION, members, step, owes_evaluation, state, profile: 0..0 };
        let mesh =
            Mesh::connect(&listener, &Token::new(""), None, place, FORM_LIMIT, &AtomicBool::new(false))?;
        let collective = Box::new(TcpCollective::new(mesh, SILENCE_LIMIT, Arc::default())?);
        let links = (collective as _, Feed::new(batches, GENERATION, outbox.clone()), outbox);
        let mut generation =
            Generation::new((form, rank), job.clone(), data.clone(), &device, &replica, links)?;
        match generation.train(&mut device, &mut replica) {
            // There are no more batches, or a step was not finite, which the worker has told.
            Err(StepError::Feed(FeedClosed::Ended)) | Ok(_) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn losses(workers: u32, steps: usize) -> Vec<f64> {
        let settings = [("seq_len", "6"), ("hidden_size", "16")];
        let settings = settings.map(|(key, value)| (key.to_owned(), value.to_owned()));
        let workload = Arc::new(Workload::new("char-gru", &settings).unwrap());
        let mut fleet = Fleet::start(&workload, Simd::detect(), workers, 1).unwrap();
        let mut reports = fleet.train(|begun| begun < 1).unwrap();
        reports.extend(fleet.train(|begun| begun < steps - 1).unwrap());
        fleet.finish().unwrap();
        assert_eq!(
            reports.iter().map(|report| report.step).collect::<Vec<_>>(),
            (1..=steps as u64).collect::<Vec<_>>()
        );
        reports.iter().map(|report| report.sums.mean_loss()).collect()
    }

    #[test]
    fn any_number_of_workers_train_alike() {
        let alone = losses(1, 5);
        assert!(alone[0] != alone[4], "the parameters move: {alone:?}");
        assert_eq!(losses(2, 5), alone);
        assert_eq!(losses(3, 5), alone);
    }

    #[test]
    fn workers_without_shards_are_refused() {
        let workload = Arc::new(Workload::new("mnist-rnn", &[]).unwrap());
        let refused = Fleet::start(&workload, Simd::detect(), 9, 1).err().unwrap();
        assert_eq!(refused.sentence, "9 workers cannot share 8 shards");
    }

    #[test]
    fn numbers_that_grow_beyond_all_bounds_are_no_measurement() {
        let settings = [("learning_rate", "3e38"), ("clip", "none"), ("optimizer", "sgd")];
        let settings = settings.map(|(key, value)| (key.to_owned(), value.to_owned()));
        let workload = Arc::new(Workload::new("mnist-rnn", &settings).unwrap());
        let mut fleet = Fleet::start(&workload, Simd::detect(), 2, 1).unwrap();
        let refused = fleet.train(|begun| begun < 20).unwrap_err();
        assert!(refused.sentence.contains("is not finite"), "{refused}");
        fleet.finish().unwrap();
    }
}
