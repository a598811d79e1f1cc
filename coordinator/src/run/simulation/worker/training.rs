//! One generation of a worker: connections, the state to go on from, steps, evaluations, and how it stops.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use protocol::batch::Batch;
use protocol::frame::{Frame, decode, encode_message};
use protocol::message::{Form, PhaseSeconds, StateSource, StepReport, Stop, ToCoordinator};
use protocol::schedule::{Schedule, Work};

use super::super::network::{Plane, Process, Wire};
use super::super::replica::{Part, Replica};
use super::{BATCHES_AHEAD, Output, Round, Timer, Worker, process_at};

/// As in `worker::collective::mesh`.
const FORM_LIMIT: Duration = Duration::from_secs(30);
/// As in `worker::collective::tcp`.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);

pub(super) struct Training {
    pub(super) form: Form,
    pub(super) rank: u32,
    pub(super) peers: Vec<Process>,
    /// The control connection that told of it.
    pub(super) begun_over: Option<Wire>,
    /// The work whose batch comes next.
    pub(super) next: Option<Work>,
    /// Batches that the coordinator may send.
    pub(super) window: u32,
    /// The connections to all peers stand.
    pub(super) is_connected: bool,
    pub(super) is_aborted: bool,
    image: Option<Vec<u8>>,
    batches: VecDeque<Batch>,
    /// What is left of the evaluation that is due, and what was computed of it.
    evaluation: VecDeque<Work>,
    evaluated: Vec<Vec<Part>>,
    wish: Wish,
    /// How many times as long as it computes it says that it did: another number in each generation.
    slowness: u32,
    /// How long it says that it computed for the last batch.
    computed: Duration,
    at: At,
}

/// As in `worker::sums_exchange`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Wish {
    GoOn,
    Pause,
    Drain,
}

#[derive(Debug, Clone)]
enum At {
    Connecting,
    ReceivingState,
    AwaitingBatch(Work),
    Computing(Batch),
    AwaitingParts(Work, Vec<Part>),
    AwaitingAll(Vec<Part>),
    AwaitingEvaluation,
}

impl Training {
    /// A batch has come.
    pub(super) fn take_in(&mut self, batch: Batch, schedule: Schedule) {
        self.next = schedule.from(batch.work).nth(1);
        self.window = self.window.saturating_sub(1);
        self.batches.push_back(batch);
    }

    pub(super) fn awaits_batch(&self) -> bool {
        matches!(self.at, At::AwaitingBatch(_))
    }
}

impl Worker {
    /// `Session::start_next` and the first lines of `Trainer::work`.
    pub(super) fn begin(&mut self, form: Form, image: Option<Vec<u8>>) {
        (self.pause, self.generation) = (None, form.generation);
        self.states.clear();
        self.reports.begin(form.step);
        self.is_of_use = true;
        self.mail = self.mail.split_off(&form.generation);
        let mut peers: Vec<Process> = form.members.iter().map(|member| process_at(&member.address)).collect();
        let place = peers.iter().position(|peer| *peer == self.me);
        let Some(place) = place else { return self.wrong("a generation without this worker") };
        peers.remove(place);
        let next = self.job.schedule.after(form.step, form.owes_evaluation).next();
        let generation = form.generation;
        self.training = Some(Box::new(Training {
            form,
            rank: place as u32,
            peers,
            begun_over: self.control,
            next,
            window: 0,
            is_connected: false,
            is_aborted: false,
            image,
            batches: VecDeque::new(),
            evaluation: VecDeque::new(),
            evaluated: Vec::new(),
            wish: Wish::GoOn,
            slowness: self.dice.clone().pick(&[1, 1, 4]),
            computed: Duration::ZERO,
            at: At::Connecting,
        }));
        self.tell(ToCoordinator::Credit { generation, batches: BATCHES_AHEAD });
        self.send_peers(Round::Greeting, 0, &[]);
        self.turn_to(At::Connecting, FORM_LIMIT);
    }

    fn turn_to(&mut self, at: At, limit: Duration) {
        self.begun += 1;
        let Some(training) = &mut self.training else { return };
        training.at = at;
        self.wake(limit, Timer::Silence(self.begun));
    }

    /// What has come from all peers in a round, by rank with an empty place for this worker's own; or who is gone
    /// without having sent it.
    fn all_of(&mut self, round: Round, step: u64) -> Result<Option<Vec<Bytes>>, String> {
        let Some(training) = &self.training else { return Ok(None) };
        let mail = self.mail.entry(training.form.generation).or_default();
        let missing = training
            .peers
            .iter()
            .find(|peer| !mail.frames.contains_key(&(**peer, round, step)) && mail.ended.contains(*peer));
        if let Some(peer) = missing {
            return Err(format!("lost {}", peer.node));
        }
        let frames = training.peers.iter().map(|peer| mail.frames.get(&(*peer, round, step)).cloned());
        let Some(mut frames) = frames.collect::<Option<Vec<_>>>() else { return Ok(None) };
        frames.insert(training.rank as usize, Bytes::new());
        Ok(Some(frames))
    }

    /// Goes on as far as what has come allows.
    pub(super) fn go_on(&mut self) {
        loop {
            let begun = self.begun;
            let Some(training) = &self.training else { return };
            let (at, form) = (training.at.clone(), &training.form);
            if training.is_aborted && !matches!(at, At::Computing(_)) {
                return self.stop(Stop::Aborted);
            }
            let step = self.replica.as_ref().map_or(0, |replica| replica.step);
            let waited = match at {
                At::Connecting => self.all_of(Round::Greeting, 0).map(|all| {
                    if all.is_some() {
                        self.connected();
                    }
                }),
                At::ReceivingState => self.receive_state(form.state),
                At::AwaitingBatch(work) => {
                    self.take_batch(work);
                    Ok(())
                }
                At::Computing(_) => Ok(()),
                At::AwaitingParts(work, own) => {
                    self.all_of(Round::Parts, step).map(|all| self.take_parts(work, own, all))
                }
                At::AwaitingAll(parts) => self.all_of(Round::Gathered, step).map(|all| {
                    if all.is_some() {
                        self.take_step(&parts);
                    }
                }),
                At::AwaitingEvaluation => {
                    self.all_of(Round::Evaluation, step).map(|all| self.take_evaluation(all))
                }
            };
            if let Err(cause) = waited {
                return self.stop(Stop::Broken(cause));
            }
            if self.begun == begun {
                return;
            }
        }
    }

    fn connected(&mut self) {
        let Some(training) = &mut self.training else { return };
        let state = training.form.state;
        match (training.image.take(), state) {
            (Some(image), _) => self.replica = Some(Replica::from_image(&image)),
            (None, StateSource::Initial) => self.replica = Some(Replica::initial()),
            (None, StateSource::Kept) if self.replica.is_some() => {}
            (None, StateSource::Member(source)) if source == training.rank => {
                let Some(replica) = &self.replica else {
                    return self.wrong("a state is asked of who has none");
                };
                let image = replica.image(&self.job);
                self.send_peers(Round::State, 0, &image);
            }
            (None, StateSource::Member(_)) => return self.turn_to(At::ReceivingState, SILENCE_LIMIT),
            (None, StateSource::Kept | StateSource::Coordinator) => {
                return self.wrong("there is no state to start the generation from");
            }
        }
        self.has_state();
    }

    fn receive_state(&mut self, state: StateSource) -> Result<(), String> {
        let Some(training) = &self.training else { return Ok(()) };
        let StateSource::Member(source) = state else { return Ok(()) };
        let source = process_at(&training.form.members[source as usize].address);
        let mail = self.mail.entry(training.form.generation).or_default();
        if let Some(image) = mail.frames.get(&(source, Round::State, 0)) {
            self.replica = Some(Replica::from_image(image));
            self.has_state();
            return Ok(());
        }
        if mail.ended.contains(&source) { Err(format!("lost {}", source.node)) } else { Ok(()) }
    }

    /// The generation trains.
    fn has_state(&mut self) {
        let (Some(training), Some(replica)) = (&mut self.training, &self.replica) else { return };
        let (step, owes) = (training.form.step, training.form.owes_evaluation);
        if replica.step != step {
            let held = replica.step;
            return self.wrong(format!("the state is that after step {held}, not after {step}"));
        }
        if owes {
            training.evaluation = self.job.schedule.evaluation(step).collect();
        }
        let generation = training.form.generation;
        self.replica_of = generation;
        self.tell(ToCoordinator::Connected { generation });
        self.next();
    }

    /// The head of the loop in `Generation::train`.
    fn next(&mut self) {
        let (Some(training), Some(replica)) = (&mut self.training, &self.replica) else { return };
        if let Some(&work) = training.evaluation.front() {
            return self.turn_to(At::AwaitingBatch(work), SILENCE_LIMIT);
        }
        let schedule = self.job.schedule;
        if replica.step >= schedule.total_steps {
            return self.stop(Stop::Finished);
        }
        match training.wish {
            Wish::GoOn => {}
            Wish::Pause => return self.stop(Stop::Paused),
            Wish::Drain => return self.stop(Stop::Drained),
        }
        let (epoch, index) = schedule.position(replica.step);
        let work = Work::Train { step: replica.step, epoch, index };
        self.turn_to(At::AwaitingBatch(work), SILENCE_LIMIT);
    }

    fn take_batch(&mut self, work: Work) {
        let Some(training) = &mut self.training else { return };
        let Some(batch) = training.batches.pop_front() else { return };
        if batch.work != work {
            let got = batch.work;
            return self.wrong(format!("batch {got:?} arrived, expected {work:?}"));
        }
        let generation = training.form.generation;
        let takes = self.dice.between(Duration::from_millis(10)..Duration::from_millis(60));
        training.computed = takes * training.slowness;
        self.tell(ToCoordinator::Credit { generation, batches: 1 });
        self.turn_to(At::Computing(batch), SILENCE_LIMIT);
        self.wake(takes, Timer::Computed(self.begun));
    }

    pub(super) fn computed(&mut self) {
        let (Some(training), Some(replica)) = (&mut self.training, &self.replica) else { return };
        let At::Computing(batch) = training.at.clone() else { return };
        if training.is_aborted {
            return self.stop(Stop::Aborted);
        }
        let (own, step) = (replica.parts(&batch), replica.step);
        match batch.work {
            Work::Train { .. } => {
                let generation = training.form.generation;
                let wish = match (self.drain, self.pause == Some(generation)) {
                    (true, _) => Wish::Drain,
                    (false, true) => Wish::Pause,
                    (false, false) => Wish::GoOn,
                };
                training.wish = wish;
                self.send_peers(Round::Parts, step, &encode_message(&(wish as u8, vec![own.clone()])));
                self.turn_to(At::AwaitingParts(batch.work, own), SILENCE_LIMIT);
            }
            Work::Evaluate { .. } => {
                training.evaluation.pop_front();
                training.evaluated.push(own);
                if training.evaluation.is_empty() {
                    let parts: Parts = (Wish::GoOn as u8, training.evaluated.clone());
                    self.send_peers(Round::Evaluation, step, &encode_message(&parts));
                    self.turn_to(At::AwaitingEvaluation, SILENCE_LIMIT);
                } else {
                    self.next();
                }
            }
        }
    }

    fn take_parts(&mut self, work: Work, own: Vec<Part>, all: Option<Vec<Bytes>>) {
        let (Some(all), Some(training)) = (all, &mut self.training) else { return };
        let (rank, mut own) = (training.rank as usize, Some(own));
        let mut parts = Vec::new();
        for (frame, place) in all.into_iter().zip(0..) {
            if place == rank {
                parts.extend(own.take().into_iter().flatten());
                continue;
            }
            let (wish, theirs) = decode_parts(frame);
            training.wish = training.wish.max([Wish::GoOn, Wish::Pause, Wish::Drain][wish as usize]);
            parts.extend(theirs.into_iter().flatten());
        }
        let Work::Train { step, .. } = work else { return };
        self.send_peers(Round::Gathered, step, &[]);
        self.turn_to(At::AwaitingAll(parts), SILENCE_LIMIT);
    }

    fn take_step(&mut self, parts: &[Part]) {
        let (Some(training), Some(replica)) = (&mut self.training, &mut self.replica) else { return };
        if parts.len() != self.job.file.job.shards as usize {
            let count = parts.len();
            return self.wrong(format!("{count} shards were summed"));
        }
        let (generation, schedule) = (training.form.generation, self.job.schedule);
        let compute = training.computed.as_secs_f64();
        let (sums, gradient_norm) = replica.take_step(schedule, parts);
        let (step, control) = (replica.step, replica.control);
        if schedule.evaluates_after(step) {
            training.evaluation = schedule.evaluation(step).collect();
        }
        self.out.push(Output::Advanced(generation, replica.clone()));
        self.tell(ToCoordinator::Step(StepReport {
            generation,
            step,
            sums,
            gradient_norm,
            learning_rate: self.job.file.job.learning_rate,
            control,
            seconds: PhaseSeconds { data: 0.0, compute, reduce: 0.01, update: 0.01 },
        }));
        if !schedule.evaluates_after(step) {
            self.after_step();
        }
        self.next();
    }

    fn take_evaluation(&mut self, all: Option<Vec<Bytes>>) {
        let (Some(all), Some(training), Some(replica)) = (all, &mut self.training, &mut self.replica) else {
            return;
        };
        let (rank, generation) = (training.rank as usize, training.form.generation);
        let own = std::mem::take(&mut training.evaluated);
        let mut batches = vec![Vec::new(); own.len()];
        for (frame, place) in all.into_iter().zip(0..) {
            let theirs = if place == rank { own.clone() } else { decode_parts(frame).1 };
            for (batch, parts) in batches.iter_mut().zip(theirs) {
                batch.extend(parts);
            }
        }
        let sums = replica.take_evaluation(self.job.schedule, &batches);
        let (step, control) = (replica.step, replica.control);
        self.out.push(Output::Advanced(generation, replica.clone()));
        self.tell(ToCoordinator::Evaluation { generation, step, sums, control });
        self.after_step();
        self.next();
    }

    /// `Session::rest`.
    pub(super) fn stop(&mut self, why: Stop) {
        let Some(training) = self.training.take() else { return };
        self.begun += 1;
        let (generation, schedule) = (training.form.generation, self.job.schedule);
        if matches!(training.at, At::ReceivingState) {
            // What arrives last is all that one of the same step lacks.
            self.replica = self.replica.take().filter(|kept| kept.step == training.form.step);
        }
        for &to in &training.peers {
            self.out.push(Output::Close(Wire { from: self.me, to, plane: Plane::Data(generation) }));
        }
        if let Some(replica) = self.replica.as_ref().filter(|replica| !replica.owes_evaluation(schedule)) {
            let (step, digest) = (replica.step, replica.digest());
            self.tell(ToCoordinator::Digest { generation, step, digest });
        }
        let state = self.held_state(why == Stop::Finished);
        self.tell(ToCoordinator::Stopped { generation, state, why });
        self.begin_next();
    }
}

/// A wish, and for each batch what the sender's shards add.
type Parts = (u8, Vec<Vec<Part>>);

fn decode_parts(frame: Bytes) -> Parts {
    match decode(frame) {
        Ok(Frame::Message(parts)) => parts,
        _ => panic!("peers send what they should"),
    }
}
