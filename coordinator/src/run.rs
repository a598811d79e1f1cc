//! A run from its first worker to its end: events in, decisions of [`membership`](crate::membership) out, records on
//! the way.

mod checkpoints;
mod divergence;
mod ending;
mod forming;
mod reports;
mod returning;
#[cfg(test)]
mod simulation;

use std::collections::HashMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use failpoints::{Point, reach};
use protocol::control::ControlState;
use protocol::job::JobFile;
use protocol::layout::StateLayout;
use protocol::message::{Goodbye, Hello, StepReport, Stop, ToCoordinator, ToWorker, Welcome, WorkerId};
use protocol::problem::{Exit, Problem};
use protocol::schedule::Schedule;
use protocol::sums::StepSums;
use tokio::sync::mpsc::{Receiver, UnboundedReceiver};
use tokio::time::Instant;

use crate::data::Dataset;
use crate::deadlines::Deadlines;
use crate::digests::Digests;
use crate::early_end::EarlyEnd;
use crate::epoch_clock::EpochClock;
use crate::epoch_sample::EpochSample;
use crate::feeder::Feeder;
use crate::hang_dump::HangDump;
use crate::http::{Status, WorkerStatus};
use crate::loss_plot::LossFile;
use crate::membership::{Action, Candidate, Decide, Event, Membership};
use crate::metrics::Metrics;
use crate::paces::{Paces, Windows};
use crate::profile::ProfileFile;
use crate::records::Records;
use crate::screen::Screen;
use crate::server::{Arrival, Link};
use crate::stage::Stage;
use crate::state_stream::Arriving;
use crate::stragglers::Stragglers;
use checkpoints::write_in_order;
use ending::Ending;
pub(crate) use ending::goodbye;

/// What the run is made of.
pub(crate) struct Parts {
    /// What decides who trains: [`membership`](crate::membership::membership), but for tests.
    pub(crate) decide: Decide,
    pub(crate) file: JobFile,
    pub(crate) data: Box<dyn Dataset>,
    pub(crate) layout: StateLayout,
    pub(crate) records: Records,
    /// The state to go on from.
    pub(crate) resumed: Option<StartState>,
    pub(crate) metrics: Metrics,
    pub(crate) losses: LossFile,
    pub(crate) status: Arc<Mutex<Status>>,
    pub(crate) screen: Screen,
    /// The ready file, and what it says before a generation forms.
    pub(crate) ready: Option<(PathBuf, String)>,
    /// A run that is asked to stop has this long to write its last state.
    pub(crate) drain_timeout: Duration,
    /// Steps whose course is written down for people; 0 for none.
    pub(crate) profile_steps: u64,
    /// In which the workers' speeds are measured.
    pub(crate) windows: Windows,
}

/// The state that a run goes on from.
pub(crate) struct StartState {
    /// Steps done.
    pub(crate) step: u64,
    /// The evaluation that belongs to the last of them is still to be done.
    pub(crate) owes_evaluation: bool,
    /// The numbers that decide how it goes on.
    pub(crate) control: ControlState,
    /// All of it, as bytes.
    pub(crate) image: Vec<u8>,
}

impl Parts {
    /// Steps done and control state of the state on the disk that the run can go on from.
    fn on_disk(&self) -> (u64, ControlState) {
        let start = self.resumed.as_ref();
        start.map_or_else(|| (0, ControlState::default()), |start| (start.step, start.control))
    }
}

/// How the run ended.
pub(crate) struct Outcome {
    pub(crate) parts: Parts,
    /// Steps done.
    pub(crate) step: u64,
    /// Mean training loss of the running epoch so far, or of the one that has just ended.
    pub(crate) train_loss: Option<f64>,
    /// The last evaluation.
    pub(crate) validation: Option<StepSums>,
    /// Why it ended before its schedule did, if it did.
    pub(crate) early_end: Option<EarlyEnd>,
    pub(crate) result: Result<Exit, Problem>,
}

/// A run under way.
pub(crate) struct Run {
    parts: Parts,
    schedule: Schedule,
    started: Instant,
    membership: Membership,
    workers: HashMap<WorkerId, (Link, Hello)>,
    feeders: HashMap<WorkerId, Feeder>,
    generation: u64,
    /// The shards of its members, by rank.
    places: Vec<Range<u32>>,
    /// It is not known yet whether workers come back that are further than the disk.
    may_come_back: bool,
    /// Steps done, as far as reported.
    step: u64,
    /// Those that were when there last was no member. Who comes back tells of these and later ones: another may have told
    /// of the steps already, but what only one knows, such as a text, is still to be told.
    on_record: u64,
    last_report: Option<StepReport>,
    validation: Option<StepSums>,
    /// Steps done at the last evaluation that this process recorded.
    evaluated_at: Option<u64>,
    /// The workers' control state, followed from their reports: it is a function of what these say.
    control: ControlState,
    epoch: EpochClock,
    /// When a step that was left out was last shown.
    skip_shown: Option<Instant>,
    /// The texts that the network writes, if any.
    sample: Option<EpochSample>,
    digests: Digests,
    deadlines: Deadlines,
    paces: Paces,
    stragglers: Stragglers,
    hangs: HangDump,
    profile: ProfileFile,
    arriving: Arriving,
    /// A state that is written when all members' digests of it agree.
    held: Option<(u64, Vec<u8>)>,
    checkpoint_asked: Instant,
    /// The step at which a state is announced to be asked for whatever the clock says.
    announced: u64,
    /// Checkpoints that are being written or wait for it.
    writing: usize,
    images: std::sync::mpsc::Sender<Vec<u8>>,
    /// The most advanced state that a member of this generation has stopped with, whether it is still there or not.
    furthest: Option<Stage>,
    /// Members that have stopped, and how far the state is that each holds, if it does.
    stopped: HashMap<WorkerId, Option<Stage>>,
    drain_asked: bool,
    /// What the log last said that the fleet is at.
    logged_phase: &'static str,
    /// When a run that drains stops whether it is ready or not.
    drain_until: Option<Instant>,
    /// The disk takes no records: they wait in memory.
    records_wait: bool,
    ending: Option<Ending>,
    early_end: Option<EarlyEnd>,
}

impl Run {
    /// Runs to the end. `signals` brings one value for each signal that asks to stop.
    pub(crate) async fn run(
        parts: Parts,
        mut arrivals: UnboundedReceiver<Arrival>,
        signals: &mut Receiver<()>,
    ) -> Outcome {
        let (images, mut checkpoints) = write_in_order(parts.records.checkpoint_writer());
        let mut run = Self::new(parts, images);
        let mut ticks = tokio::time::interval(Duration::from_millis(200));
        while !run.is_over() {
            let handled = tokio::select! {
                Some(arrival) = arrivals.recv() => run.arrive(arrival),
                Some(result) = checkpoints.recv() => run.checkpoint_written(result),
                Some(()) = signals.recv() => { run.stop_asked(); Ok(()) }
                _ = ticks.tick() => run.tick(),
            };
            run.handled(handled);
        }
        run.say_goodbye(&mut arrivals).await
    }

    fn new(parts: Parts, images: std::sync::mpsc::Sender<Vec<u8>>) -> Self {
        let (on_disk, control) = parts.on_disk();
        parts.metrics.skipped(control.skipped_updates);
        let (fleet, last_generation) = (&parts.file.fleet, parts.records.last_generation);
        let (schedule, places) = (parts.data.shape().schedule, parts.records.places.clone());
        let may_come_back = !places.is_empty();
        let step = if may_come_back { parts.records.last_step() } else { on_disk };
        let has_evaluation = parts.records.has_evaluation(step, schedule.ends_epoch(step));
        Self {
            schedule,
            started: Instant::now(),
            membership: Membership::new(
                fleet.workers,
                parts.file.job.shards,
                (last_generation, places.len() as u32),
                parts.records.bits.clone(),
            )
            .with_balance(fleet.balance),
            workers: HashMap::new(),
            feeders: HashMap::new(),
            generation: last_generation,
            places,
            may_come_back,
            step,
            on_record: step,
            last_report: None,
            validation: parts.records.evaluation_at(step),
            evaluated_at: has_evaluation.then_some(step),
            control,
            epoch: EpochClock::new(),
            skip_shown: None,
            sample: EpochSample::new(&parts.file, parts.data.facts()),
            digests: Digests::default(),
            deadlines: Deadlines::default(),
            paces: Paces::new(parts.windows),
            stragglers: Stragglers::default(),
            hangs: HangDump::new(parts.records.dir.path()),
            profile: ProfileFile::new(parts.records.dir.profile_path(), parts.profile_steps),
            arriving: Arriving::default(),
            held: None,
            checkpoint_asked: Instant::now(),
            announced: 0,
            writing: 0,
            images,
            furthest: None,
            stopped: HashMap::new(),
            drain_asked: false,
            logged_phase: "",
            drain_until: None,
            records_wait: false,
            ending: None,
            early_end: None,
            parts,
        }
    }

    /// What follows from anything that was handled.
    fn handled(&mut self, result: Result<(), Problem>) {
        if let Err(problem) = result {
            self.fail(problem, true);
        }
        self.settle();
        self.log_phase();
    }

    /// Logs what the fleet is at, when that has changed: `scripts/soak-kills` reads it.
    fn log_phase(&mut self) {
        let phase = match self.membership.phase() {
            "training" if self.writing > 0 => "checkpoint",
            "training" if self.schedule.ends_epoch(self.step) && self.evaluated_at != Some(self.step) => {
                "epoch-end"
            }
            phase => phase,
        };
        if std::mem::replace(&mut self.logged_phase, phase) != phase {
            tracing::trace!(target: "lockstep_phase", "coordinator {}: {phase}", std::process::id());
        }
    }

    fn arrive(&mut self, arrival: Arrival) -> Result<(), Problem> {
        match arrival {
            Arrival::Joined(id, hello, link) => self.joined(id, *hello, link),
            Arrival::Message(id, message) => self.message(id, message),
            // States are only asked of members; a late one of an older generation says nothing any more.
            Arrival::Bulk(id, header, _)
                if !self.members().contains(&id) || header.generation != self.generation =>
            {
                Ok(())
            }
            Arrival::Bulk(id, header, part) => {
                let size = self.parts.layout.image_bytes();
                let whole = self.arriving.take(id, &header, &part, size)?;
                self.ending_goes_on();
                match whole {
                    Some(image) => self.hold_checkpoint(id, header.step, image),
                    None => Ok(()),
                }
            }
            Arrival::Left(id, cause) => self.left(id, cause),
        }
    }

    fn joined(&mut self, id: WorkerId, hello: Hello, link: Link) -> Result<(), Problem> {
        let host = hello.advertise.clone().unwrap_or_else(|| link.peer.ip().to_string());
        let bracketed = if host.contains(':') && !host.starts_with('[') { format!("[{host}]") } else { host };
        let address = format!("{bracketed}:{}", hello.data_port);
        let candidate =
            Candidate { name: hello.name.clone(), address: address.clone(), bits: hello.bits.clone() };
        let worker = WorkerStatus {
            name: hello.name.clone(),
            device: hello.device.clone(),
            threads: hello.threads,
            address,
            metrics: hello.metrics.clone(),
            shards: None,
        };
        let known = self.workers.iter().find(|(_, (_, known))| known.incarnation == hello.incarnation);
        if let Some((&old, _)) = known {
            self.left(old, "it has come again over another connection".to_owned())?;
        }
        let holds = self.use_of(&hello);
        self.with_status(|status| status.workers.insert(id, worker));
        self.workers.insert(id, (link, hello));
        self.decide(Event::Joined(id, candidate, holds))
    }

    fn welcome(&self, id: WorkerId) -> ToWorker {
        ToWorker::Welcome(Box::new(Welcome {
            run_id: self.parts.records.run_id.clone(),
            coordinator_epoch: self.parts.records.coordinator_epoch,
            worker_id: id,
            on_record: self.on_record,
            park_timeout_seconds: self.parts.file.fleet.park_timeout_seconds,
            job: self.parts.file.job.clone(),
            run: self.parts.file.run.clone(),
            data: self.parts.data.shape().clone(),
            sample: self.sample.as_ref().map(EpochSample::request),
        }))
    }

    fn left(&mut self, id: WorkerId, cause: String) -> Result<(), Problem> {
        self.workers.remove(&id);
        self.feeders.remove(&id);
        self.stopped.remove(&id);
        self.deadlines.forget(id);
        self.stragglers.forget(id);
        self.arriving.forget(id);
        if let Some(ending) = &mut self.ending
            && ending.state_from == Some(id)
        {
            ending.state_from = None;
        }
        self.with_status(|status| status.workers.remove(&id));
        self.decide(Event::Left(id, cause))?;
        if self.members().is_empty() && !self.may_come_back {
            self.on_record = self.step;
        }
        if self.drain_asked && !self.has_states() {
            // Nobody is left who could stop after a step.
            self.end(Ok(Exit::Requeue));
        }
        Ok(())
    }

    /// Closes the connection of a worker that lives and cannot be trained with.
    fn evict(&mut self, id: WorkerId, cause: String) -> Result<(), Problem> {
        self.send(id, &ToWorker::Goodbye(Goodbye::Failed(format!("the coordinator let it go: {cause}"))));
        self.left(id, cause)
    }

    fn message(&mut self, id: WorkerId, message: ToCoordinator) -> Result<(), Problem> {
        match message {
            ToCoordinator::Alive(position) => {
                // All members are looked at only for a phase that has lasted: each of a large fleet says this every second.
                let at_work: Vec<WorkerId> = match Deadlines::is_long(&position) {
                    true => self.at_work().collect(),
                    false => Some(id).filter(|&id| self.is_at_work(id)).into_iter().collect(),
                };
                for (id, cause) in self.deadlines.take(id, position, self.generation, &at_work) {
                    self.evict(id, cause)?;
                }
            }
            ToCoordinator::Trace(trace) => self.hangs.take(id, &self.name(id), trace),
            ToCoordinator::Profile(profile) => self.profiled(id, profile),
            ToCoordinator::Connected { generation } => self.decide(Event::Connected(id, generation))?,
            ToCoordinator::Credit { generation, batches } if generation == self.generation => {
                if let Some(feeder) = self.feeders.get(&id) {
                    feeder.grant(batches);
                }
            }
            ToCoordinator::Step(report) => {
                self.compare_speed(id, &report)?;
                self.step_done(report)?;
            }
            ToCoordinator::Evaluation { generation, step, sums, control } if self.counts(generation) => {
                self.evaluated(step, &sums, control)?;
            }
            ToCoordinator::Sample { generation, step, tokens } if self.counts(generation) => {
                self.sampled(step, &tokens)?;
            }
            ToCoordinator::Digest { generation, step, digest } if generation == self.generation => {
                if self.may_come_back {
                    // Who is back so far is not all.
                    self.digests.keep(id, step, digest);
                    return Ok(());
                }
                let parted = self.digests.take(id, step, digest, self.membership.members());
                if !parted.is_empty() {
                    self.replicas_differ(step, &parted);
                }
                self.write_agreed()?;
            }
            ToCoordinator::Stopped { generation, state, why }
                if generation == self.generation && self.members().contains(&id) =>
            {
                self.feeders.remove(&id);
                self.deadlines.forget(id);
                // Whoever holds more than what is on record, when it has told of all that it did, is not of this run's time:
                // records went back meanwhile.
                let state = state.filter(|held| held.step <= self.step);
                let state = state.map(|held| Stage { step: held.step, whole: !held.owes_evaluation });
                self.stopped.insert(id, state);
                self.furthest = self.furthest.max(state);
                self.ending_goes_on();
                match why {
                    Stop::Finished => self.end(Ok(Exit::Done)),
                    Stop::Drained => self.end(Ok(Exit::Requeue)),
                    Stop::SkipLimit | Stop::Diverged | Stop::NoImprovement => self.end_early(&why)?,
                    // It has said more in words of its own.
                    Stop::NonFinite => {}
                    Stop::Paused | Stop::Aborted => {
                        self.decide(Event::Stopped { id, generation, state, broken: None })?;
                    }
                    Stop::Broken(cause) => {
                        self.decide(Event::Stopped { id, generation, state, broken: Some(cause) })?;
                    }
                }
            }
            // It came back when the others had gone on without it, or were about to.
            ToCoordinator::Stopped { state, .. } if !self.members().contains(&id) => {
                let state = state.filter(|held| held.step <= self.step && self.can_rejoin(id));
                let state = state.map(|held| Stage { step: held.step, whole: !held.owes_evaluation });
                self.decide(Event::Rests(id, state))?;
            }
            ToCoordinator::Failed { sentence, hint, is_final } => {
                let sentence = format!("worker {}: {sentence}", self.name(id));
                let exit = if is_final { Exit::Final } else { Exit::Failed };
                self.give_up(Problem { sentence, hint, exit })?;
            }
            // A late word of an older generation, or a second hello.
            _ => {}
        }
        Ok(())
    }

    /// Asks the membership what follows, and does it.
    fn decide(&mut self, event: Event) -> Result<(), Problem> {
        let state = std::mem::take(&mut self.membership);
        let (next, actions, reason) = (self.parts.decide)(self.started.elapsed(), state, event);
        self.membership = next;
        if !reason.is_empty() {
            tracing::debug!("{reason}");
        }
        for action in actions {
            match action {
                Action::Refuse(id, sentence) => {
                    self.parts.screen.notice(&format!("refused: {sentence}"));
                    self.send(id, &ToWorker::Goodbye(Goodbye::Failed(sentence)));
                    self.workers.remove(&id);
                    self.with_status(|status| status.workers.remove(&id));
                }
                Action::Evict(id, cause) => self.evict(id, cause)?,
                Action::Welcome(id) => {
                    self.send(id, &self.welcome(id));
                    if self.drain_asked {
                        self.send(id, &ToWorker::Drain);
                    }
                }
                Action::StandBy(id) => self.send(id, &ToWorker::StandBy),
                Action::Feed(id) => self.feed_again(id),
                Action::Adopt(generation, members) => self.adopt(generation, &members, &reason)?,
                Action::Form(generation, members, source) => {
                    self.form(generation, &members, source, &reason)?;
                }
                Action::Pause(generation, ids) => {
                    reach(Point::Admission, self.step);
                    for id in ids {
                        self.send(id, &ToWorker::Pause { generation });
                    }
                }
                Action::Abort(generation, ids) => {
                    self.hangs.broken(self.step, &reason);
                    for id in ids {
                        self.send(id, &ToWorker::Abort { generation });
                    }
                }
                Action::Fail(problem) => self.give_up(problem)?,
                Action::Notice(sentence) => self.parts.screen.notice(&sentence),
            }
        }
        let members = self.membership.members().len();
        self.parts.metrics.set_workers(members, self.membership.connected().saturating_sub(members));
        Ok(())
    }

    /// Members of the generation that are connected, by rank.
    fn members(&self) -> &[WorkerId] {
        self.membership.members()
    }

    fn name(&self, id: WorkerId) -> String {
        self.workers.get(&id).map_or_else(|| format!("number {id}"), |(_, hello)| hello.name.clone())
    }

    fn send(&self, id: WorkerId, message: &ToWorker) {
        if let Some((link, _)) = self.workers.get(&id) {
            link.send(message);
        }
    }

    fn send_all(&self, message: &ToWorker) {
        for (link, _) in self.workers.values() {
            link.send(message);
        }
    }

    fn with_status<T>(&self, change: impl FnOnce(&mut Status) -> T) {
        change(&mut self.parts.status.lock().expect("no holder of this lock can panic"));
    }
}
