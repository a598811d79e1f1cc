//! The coordinator's process: the real [`Run`] over a run directory in memory, and what `server` does for it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use protocol::frame::{Frame, decode};
use protocol::job::Balance;
use protocol::message::{ToCoordinator, WorkerId};
use protocol::problem::{Exit, Problem};
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::super::checkpoints::WrittenCheckpoint;
use super::super::{Parts, Run, StartState};
use super::network::{Parcel, Process, Wire};
use super::replica::Job;
use super::worker::host_of;
use crate::http::Status;
use crate::loss_plot::LossFile;
use crate::membership::Decide;
use crate::metrics::Metrics;
use crate::paces::Windows;
use crate::records::{CheckpointWriter, Opening, Records};
use crate::screen::Screen;
use crate::server::{Arrival, Link};

/// As in `server`.
const SILENCE_LIMIT: Duration = Duration::from_secs(5);

/// Short, so that a run of a few steps has several.
const WINDOWS: Windows = Windows { length: Duration::from_millis(100), least_steps: 1 };

pub(super) struct Host {
    pub(super) me: Process,
    run: Run,
    writer: CheckpointWriter,
    /// States that are to be written.
    images: Receiver<Vec<u8>>,
    links: BTreeMap<WorkerId, Connected>,
    next_id: WorkerId,
}

struct Connected {
    /// From here to the worker.
    wire: Wire,
    queued: UnboundedReceiver<Bytes>,
    heard: Duration,
}

impl Host {
    /// Opens the run directory and goes on with what is in it.
    pub(super) fn start(
        me: Process,
        job: &Job,
        (workers, balance): (u32, Balance),
        dir: &Path,
        decide: Decide,
    ) -> Result<Self, Problem> {
        let mut file = job.file.clone();
        (file.fleet.workers, file.fleet.balance) = (workers, balance);
        let (records, resumed) = Records::open(Opening {
            path: dir,
            fresh: false,
            file: &file,
            facts: job.data.facts(),
            layout: &job.layout,
            build: "simulated",
            first: None,
            learning_rate: None,
        })?;
        let (plot, numbers) = (records.dir.loss_plot_path(), records.dir.metrics_path());
        let resumed = resumed.map(|image| StartState {
            step: image.progress().step,
            owes_evaluation: !image.is_whole(),
            control: image.control(),
            image: image.into_bytes(),
        });
        let parts = Parts {
            decide,
            file,
            data: job.data.handle(),
            layout: job.layout.clone(),
            losses: LossFile::open(plot, &numbers, String::new(), job.file.job.task)?,
            records,
            resumed,
            metrics: Metrics::new("simulated"),
            status: Arc::new(Mutex::new(Status::default())),
            screen: Screen::dark(job.file.job.task, &job.schedule),
            ready: None,
            drain_timeout: Duration::from_secs(25),
            profile_steps: 0,
            windows: WINDOWS,
        };
        let writer = parts.records.checkpoint_writer();
        let (sender, images) = std::sync::mpsc::channel();
        let run = Run::new(parts, sender);
        Ok(Self { me, run, writer, images, links: BTreeMap::new(), next_id: 1 })
    }

    /// What has come from a worker.
    pub(super) fn arrive(&mut self, now: Duration, wire: Wire, parcel: Parcel) {
        let id = self.links.iter().find(|(_, link)| link.wire == wire.back()).map(|(&id, _)| id);
        let arrival = match (id, parcel) {
            (Some(id), Parcel::End) => {
                self.links.remove(&id);
                Arrival::Left(id, "its connection closed".into())
            }
            (Some(id), Parcel::Frame(frame)) => {
                self.links.get_mut(&id).expect("it was just found").heard = now;
                match decode(frame) {
                    Ok(Frame::Message(message)) => Arrival::Message(id, message),
                    Ok(Frame::Bulk(header, payload)) => Arrival::Bulk(id, header, payload),
                    Err(error) => panic!("a worker sent {error}"),
                }
            }
            (None, Parcel::Frame(frame)) => match decode(frame) {
                Ok(Frame::Message(ToCoordinator::Hello(hello))) => {
                    let (id, (link, queued)) = (self.next_id, Link::new(host_of(wire.from)));
                    self.next_id += 1;
                    self.links.insert(id, Connected { wire: wire.back(), queued, heard: now });
                    Arrival::Joined(id, Box::new(hello), link)
                }
                _ => return,
            },
            (None, Parcel::End) => return,
        };
        let result = self.run.arrive(arrival);
        self.run.handled(result);
    }

    /// Time has passed. Gives the connections that are closed for their silence.
    pub(super) fn tick(&mut self, now: Duration) -> Vec<Wire> {
        let silent = |(_, link): &(&WorkerId, &Connected)| now >= link.heard + SILENCE_LIMIT;
        let silent: Vec<WorkerId> = self.links.iter().filter(silent).map(|(&id, _)| id).collect();
        let mut closed = Vec::new();
        for id in silent {
            closed.extend(self.links.remove(&id).map(|link| link.wire));
            let result = self.run.arrive(Arrival::Left(id, "nothing came from it for 5 s".into()));
            self.run.handled(result);
        }
        let result = self.run.tick();
        self.run.handled(result);
        closed
    }

    /// The process was stopped for a while: nobody counts that as silence.
    pub(super) fn continued(&mut self, now: Duration) {
        self.links.values_mut().for_each(|link| link.heard = now);
    }

    /// A state that is to be written now.
    pub(super) fn next_image(&mut self) -> Option<Vec<u8>> {
        self.images.try_recv().ok()
    }

    /// Writes a checkpoint.
    pub(super) fn write(&mut self, image: Vec<u8>) -> WrittenCheckpoint {
        self.writer.write(image)
    }

    /// The checkpoint's thread says what came of it.
    pub(super) fn written(&mut self, result: WrittenCheckpoint) {
        let result = self.run.checkpoint_written(result);
        self.run.handled(result);
    }

    /// A signal asks the run to stop.
    pub(super) fn signal(&mut self) {
        self.run.stop_asked();
        self.run.handled(Ok(()));
    }

    /// What is to be sent, by connection and in order; nothing after [`Parcel::End`].
    pub(super) fn outgoing(&mut self) -> Vec<(Wire, Parcel)> {
        let mut outgoing = Vec::new();
        let mut let_go = Vec::new();
        for (&id, link) in &mut self.links {
            loop {
                match link.queued.try_recv() {
                    Ok(frame) => outgoing.push((link.wire, Parcel::Frame(frame))),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => {
                        outgoing.push((link.wire, Parcel::End));
                        let_go.push(id);
                        break;
                    }
                }
            }
        }
        for id in let_go {
            self.links.remove(&id);
            let result = self.run.arrive(Arrival::Left(id, "the coordinator let it go".into()));
            self.run.handled(result);
        }
        outgoing
    }

    pub(super) fn is_over(&self) -> bool {
        self.run.is_over()
    }

    /// Says goodbye and ends; gives the last messages and how the run ended.
    pub(super) async fn end(self) -> (Vec<(Wire, Parcel)>, Result<Exit, Problem>) {
        let Self { run, mut links, .. } = self;
        // Nobody who is still connected is waited for.
        let (sender, mut arrivals) = unbounded_channel();
        drop(sender);
        let outcome = run.say_goodbye(&mut arrivals).await;
        let mut outgoing = Vec::new();
        for link in links.values_mut() {
            while let Ok(frame) = link.queued.try_recv() {
                outgoing.push((link.wire, Parcel::Frame(frame)));
            }
            outgoing.push((link.wire, Parcel::End));
        }
        (outgoing, outcome.result)
    }
}
