//! A run from its first worker to its end: events in, decisions of [`membership`] out, records on the way.

mod ending;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use protocol::control::ControlState;
use protocol::job::JobFile;
use protocol::layout::StateLayout;
use protocol::message::{
    Form, Goodbye, Hello, Member, StateSource, StepReport, Stop, ToCoordinator, ToWorker, Welcome, WorkerId,
};
use protocol::problem::{Exit, Problem};
use protocol::schedule::Schedule;
use protocol::sums::StepSums;
use tokio::sync::mpsc::{Receiver, UnboundedReceiver, unbounded_channel};

use crate::data::Dataset;
use crate::digests::Digests;
use crate::early_end::EarlyEnd;
use crate::epoch_clock::EpochClock;
use crate::epoch_sample::EpochSample;
use crate::feeder::Feeder;
use crate::http::{Status, WorkerStatus};
use crate::loss_plot::LossFile;
use crate::membership::{Action, Candidate, Event, Membership, membership};
use crate::metrics::Metrics;
use crate::records::{CheckpointWriter, Records, Stage};
use crate::screen::{EpochEnd, Screen};
use crate::server::{Arrival, Link};
use crate::state_stream::{Arriving, send_image};
use crate::store::files::write_atomic;
use crate::store::journal::{MemberLine, Record};
use crate::store::metrics_log::EpochLine;
use ending::Ending;

/// A lost peer's own connection has this long to say more than its neighbours can.
const BROKEN_GRACE: Duration = Duration::from_secs(2);

/// Steps that are left out are shown at most this often.
const SKIP_NOTICE_INTERVAL: Duration = Duration::from_secs(1);

/// What the run is made of.
pub(crate) struct Parts {
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

type WrittenCheckpoint = Result<(Stage, String), Problem>;

/// A run under way.
pub(crate) struct Run {
    parts: Parts,
    schedule: Schedule,
    started: Instant,
    membership: Membership,
    workers: HashMap<WorkerId, (Link, Hello)>,
    feeders: HashMap<WorkerId, Feeder>,
    generation: u64,
    /// Members of the generation, by rank.
    members: Vec<WorkerId>,
    /// Steps done, as far as reported.
    step: u64,
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
    arriving: Arriving,
    /// A state that is written when all members' digests of it agree.
    held: Option<(u64, Vec<u8>)>,
    checkpoint_asked: Instant,
    /// The step at which a state is announced to be asked for whatever the clock says.
    announced: u64,
    /// Checkpoints that are being written or wait for it.
    writing: usize,
    images: std::sync::mpsc::Sender<Vec<u8>>,
    /// Members that have stopped, and how far their states are.
    stopped: HashMap<WorkerId, Stage>,
    drain_asked: bool,
    /// What a member said about a lost peer, and until when a better reason may come.
    broken: Option<(Instant, String)>,
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
            if let Err(problem) = handled {
                run.fail(problem, true);
            }
            run.settle();
        }
        run.say_goodbye(&mut arrivals).await
    }

    fn new(parts: Parts, images: std::sync::mpsc::Sender<Vec<u8>>) -> Self {
        let step = parts.resumed.as_ref().map_or(0, |resumed| resumed.step);
        let control = parts.resumed.as_ref().map_or_else(ControlState::default, |resumed| resumed.control);
        parts.metrics.skipped_before(control.skipped_updates);
        let (fleet, last_generation) = (&parts.file.fleet, parts.records.last_generation);
        Self {
            schedule: parts.data.shape().schedule,
            started: Instant::now(),
            membership: Membership::new(
                fleet.workers,
                parts.file.job.shards,
                last_generation,
                parts.records.bits.clone(),
            ),
            workers: HashMap::new(),
            feeders: HashMap::new(),
            generation: last_generation,
            members: Vec::new(),
            step,
            last_report: None,
            validation: parts.records.evaluation_at(step),
            evaluated_at: None,
            control,
            epoch: EpochClock::new(),
            skip_shown: None,
            sample: EpochSample::new(&parts.file, parts.data.facts()),
            digests: Digests::default(),
            arriving: Arriving::default(),
            held: None,
            checkpoint_asked: Instant::now(),
            announced: 0,
            writing: 0,
            images,
            stopped: HashMap::new(),
            drain_asked: false,
            broken: None,
            ending: None,
            early_end: None,
            parts,
        }
    }

    fn arrive(&mut self, arrival: Arrival) -> Result<(), Problem> {
        match arrival {
            Arrival::Joined(id, hello, link) => self.joined(id, *hello, link),
            Arrival::Message(id, message) => self.message(id, message),
            // States are only asked of members; a late one of an older generation says nothing any more.
            Arrival::Bulk(id, header, _)
                if !self.members.contains(&id) || header.generation != self.generation =>
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
        self.with_status(|status| status.workers.insert(id, worker));
        self.workers.insert(id, (link, hello));
        self.decide(Event::Joined(id, candidate))
    }

    fn welcome(&self, id: WorkerId) -> ToWorker {
        ToWorker::Welcome(Box::new(Welcome {
            run_id: self.parts.records.run_id.clone(),
            coordinator_epoch: self.parts.records.coordinator_epoch,
            worker_id: id,
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
        self.arriving.forget(id);
        if let Some(ending) = &mut self.ending
            && ending.state_from == Some(id)
        {
            ending.state_from = None;
        }
        self.with_status(|status| status.workers.remove(&id));
        self.decide(Event::Left(id, cause))
    }

    fn message(&mut self, id: WorkerId, message: ToCoordinator) -> Result<(), Problem> {
        match message {
            ToCoordinator::Connected { generation } => self.decide(Event::Connected(id, generation))?,
            ToCoordinator::Credit { generation, batches } if generation == self.generation => {
                if let Some(feeder) = self.feeders.get(&id) {
                    feeder.grant(batches);
                }
            }
            ToCoordinator::Step(report) => self.step_done(report)?,
            ToCoordinator::Evaluation { generation, step, sums } if generation == self.generation => {
                self.evaluated(step, &sums)?;
            }
            ToCoordinator::Sample { generation, step, tokens }
                if generation == self.generation && self.members.first() == Some(&id) =>
            {
                self.sampled(step, &tokens)?;
            }
            ToCoordinator::Digest { generation, step, digest } if generation == self.generation => {
                let parted = self.digests.take(id, step, digest, &self.members);
                if !parted.is_empty() {
                    self.replicas_differ(step, &parted);
                }
                self.write_agreed()?;
            }
            ToCoordinator::Stopped { generation, step, owes_evaluation, why }
                if generation == self.generation =>
            {
                self.feeders.remove(&id);
                self.stopped.insert(id, Stage { step, whole: !owes_evaluation });
                self.ending_goes_on();
                match why {
                    Stop::Finished => self.end(Ok(Exit::Done)),
                    Stop::Drained => self.end(Ok(Exit::Requeue)),
                    // Its own connection usually says why; if it is silent, this is all that will be known.
                    Stop::Broken(cause) => {
                        let cause = format!("worker {}: {cause}", self.name(id));
                        self.broken.get_or_insert((Instant::now() + BROKEN_GRACE, cause));
                    }
                    Stop::SkipLimit | Stop::Diverged | Stop::NoImprovement => self.end_early(&why)?,
                    // Whoever caused it has said why.
                    Stop::Aborted | Stop::NonFinite => {}
                }
            }
            ToCoordinator::Failed { sentence, hint } => {
                let sentence = format!("worker {}: {sentence}", self.name(id));
                self.give_up(Problem { hint, ..Problem::failed(sentence) })?;
            }
            // A late word of an older generation, or a second hello.
            _ => {}
        }
        Ok(())
    }

    /// Asks the membership what follows, and does it.
    fn decide(&mut self, event: Event) -> Result<(), Problem> {
        let (next, actions, reason) = membership(self.started.elapsed(), &self.membership, event);
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
                Action::Welcome(id) => self.send(id, &self.welcome(id)),
                Action::StandBy(id) => self.send(id, &ToWorker::StandBy),
                Action::Form(generation, members) => self.form(generation, &members, &reason)?,
                Action::Abort(generation, ids) => {
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

    fn form(&mut self, generation: u64, members: &[Member], reason: &str) -> Result<(), Problem> {
        (self.generation, self.members) = (generation, members.iter().map(|m| m.worker_id).collect());
        self.parts.records.journal(&Record::Generation {
            generation,
            members: members.iter().map(MemberLine::from).collect(),
            reason: reason.to_owned(),
            bits: self.membership.bits().map(str::to_owned),
        })?;
        self.parts.metrics.generation();
        let resumed = self.parts.resumed.as_ref();
        let state = if resumed.is_some() { StateSource::Coordinator } else { StateSource::Initial };
        for (member, rank) in members.iter().zip(0..) {
            let Some((link, _)) = self.workers.get(&member.worker_id) else { continue };
            let form = Form { generation, rank, members: members.to_vec(), step: self.step, state };
            link.send(&ToWorker::Form(form));
            if let Some(StartState { step, image, .. }) = resumed {
                send_image(link, generation, *step, image);
            }
            let (data, shards) = (self.parts.data.handle(), member.shards.clone());
            let from = (self.step, resumed.is_some_and(|resumed| resumed.owes_evaluation));
            let feeder = Feeder::start(data, self.schedule, from, generation, shards, link.clone());
            self.feeders.insert(member.worker_id, feeder);
        }
        self.with_status(|status| {
            (status.phase, status.generation) = ("training", generation);
            for member in members {
                if let Some(worker) = status.workers.get_mut(&member.worker_id) {
                    worker.shards = Some((member.shards.start, member.shards.end));
                }
            }
        });
        if let Some((path, text)) = &self.parts.ready {
            write_atomic(path, format!("{text}generation={generation}\n").as_bytes())?;
        }
        self.parts.screen.notice(reason);
        self.epoch = EpochClock::new();
        self.announce_checkpoint();
        Ok(())
    }

    /// Takes in a step the first time it is reported; the reports of the other members say the same.
    fn step_done(&mut self, report: StepReport) -> Result<(), Problem> {
        if report.generation != self.generation || report.step != self.step + 1 {
            return Ok(());
        }
        let (epoch, index) = self.schedule.position(self.step);
        // For people and in their files, passes over the data count from 1.
        let epoch = epoch + 1;
        self.step = report.step;
        self.control.after_step(index, self.schedule.steps_per_epoch, &report.sums, report.gradient_norm);
        self.epoch.step(&report);
        self.last_report = Some(report);
        self.parts.records.step(&report, epoch, self.members.len() as u32)?;
        self.parts.metrics.step(&report);
        self.parts.losses.step(report.step, report.sums.mean_loss());
        self.parts.screen.step(&report);
        if report.is_skipped() {
            self.step_skipped(&report)?;
        }
        let speed = self.parts.screen.samples_per_second();
        self.with_status(|status| {
            (status.step, status.epoch) = (report.step, epoch);
            status.train_loss = Some(report.sums.mean_loss()).filter(|loss| loss.is_finite());
            status.samples_per_second = speed;
        });
        let interval = Duration::from_secs(self.parts.file.run.checkpoint_seconds);
        if self.checkpoint_asked.elapsed() >= interval && self.writing == 0 && !self.arriving.is_under_way() {
            self.checkpoint_asked = Instant::now();
            let digest_steps = self.parts.file.run.digest_steps.max(1);
            self.ask_state((self.step + 1).next_multiple_of(digest_steps));
        }
        Ok(())
    }

    /// Says that a step was left out: in the journal each time, on the screen no more often than anybody reads.
    fn step_skipped(&mut self, report: &StepReport) -> Result<(), Problem> {
        let StepReport { step, sums, gradient_norm, .. } = report;
        let loss = sums.mean_loss();
        let text = format!(
            "step {step} was left out: it is not finite (loss {loss}, gradient norm {gradient_norm})"
        );
        if self.skip_shown.is_none_or(|shown| shown.elapsed() >= SKIP_NOTICE_INTERVAL) {
            self.skip_shown = Some(Instant::now());
            let (skipped, limit) = (self.control.skipped_updates, self.parts.file.job.skip_limit);
            self.parts.screen.notice(&format!("{text}; {skipped} so far, skip_limit is {limit}"));
        }
        self.parts.records.journal(&Record::Event { text })
    }

    /// Takes in an evaluation the first time it is reported.
    fn evaluated(&mut self, step: u64, sums: &StepSums) -> Result<(), Problem> {
        if step != self.step || self.evaluated_at == Some(step) {
            return Ok(());
        }
        (self.evaluated_at, self.validation) = (Some(step), Some(*sums));
        if self.schedule.ends_epoch(step) {
            self.control.after_epoch(sums);
        }
        let train_loss = self.control.epoch.mean_loss();
        let validation = (sums.weight > 0).then_some(sums);
        let (loss, accuracy) = (validation.map(StepSums::mean_loss), validation.map(StepSums::accuracy));
        let (seconds, communication) = (self.epoch.seconds(), self.epoch.communication());
        let (workers, samples_per_second) = (self.members.len(), self.epoch.rows() as f64 / seconds);
        let (learning_rate, gradient_norm) = self
            .last_report
            .map_or((f64::NAN, f64::NAN), |report| (report.learning_rate, report.gradient_norm));
        let line = self.schedule.ends_epoch(step).then(|| EpochLine {
            step,
            epoch: step / self.schedule.steps_per_epoch,
            train_loss: train_loss.unwrap_or(f64::NAN),
            train_accuracy: self.control.epoch.accuracy().unwrap_or(f64::NAN),
            val_loss: loss,
            val_accuracy: accuracy,
            learning_rate,
            samples_per_second,
            seconds,
            communication_share: communication,
            workers: workers as u32,
        });
        self.parts.records.evaluation(step, sums, line.clone())?;
        self.parts.metrics.evaluation(sums);
        self.parts.screen.epoch(&EpochEnd {
            step,
            train_loss,
            validation,
            gradient_norm,
            learning_rate,
            samples_per_second,
            workers,
            communication,
            seconds,
        });
        self.with_status(|status| (status.val_loss, status.val_accuracy) = (loss, accuracy));
        if let Some(line) = line {
            // A picture is not worth the run.
            if let Err(problem) = self.parts.losses.epoch(line) {
                self.parts.screen.notice(&problem.to_string());
            }
            self.epoch = EpochClock::new();
        }
        Ok(())
    }

    /// Takes in what the network wrote at an epoch's end. Faster members may have reported later steps meanwhile.
    fn sampled(&mut self, step: u64, tokens: &[u32]) -> Result<(), Problem> {
        let Some(sample) = self.sample.as_ref().filter(|_| self.schedule.ends_epoch(step)) else {
            return Ok(());
        };
        let (epoch, text) = (step / self.schedule.steps_per_epoch, sample.text(tokens));
        if self.parts.records.sample(step, epoch, &text)? {
            self.parts.screen.sample(step, epoch, &text);
        }
        Ok(())
    }

    /// Stops the run because its replicas are no longer replicas. None of their states is written.
    fn replicas_differ(&mut self, step: u64, parted: &[WorkerId]) {
        let names: Vec<String> = parted.iter().map(|&id| self.name(id)).collect();
        let problem = Problem::failed(format!(
            "the replicas differ after step {step}: {} computed another state than the rest",
            names.join(" and ")
        ));
        let hint = "check the memory of these machines; the same command goes on from the newest checkpoint";
        self.fail(problem.hint(hint), false);
    }

    /// Asks the first member for its state at the next epoch's end, or at the run's.
    fn announce_checkpoint(&mut self) {
        let per_epoch = self.schedule.steps_per_epoch;
        self.announced = ((self.step / per_epoch + 1) * per_epoch).min(self.schedule.total_steps);
        self.ask_state(self.announced);
    }

    fn ask_state(&mut self, at_step: u64) {
        if let Some(&first) = self.members.first() {
            self.send(first, &ToWorker::SendState { at_step });
        }
    }

    /// A whole state has arrived.
    fn hold_checkpoint(&mut self, from: WorkerId, step: u64, image: Vec<u8>) -> Result<(), Problem> {
        self.checkpoint_asked = Instant::now();
        self.ending_goes_on();
        if let Some(ending) = &mut self.ending
            && ending.state_from == Some(from)
        {
            // Asked for when all that are left had stopped and their digests were compared. (Who was cut off inside an
            // evaluation has none.)
            ending.state_from = None;
            return self.write_checkpoint(image);
        }
        self.held = Some((step, image));
        self.write_agreed()
    }

    /// Hands the held state to the writer, if all members' digests of it agree or it has none.
    fn write_agreed(&mut self) -> Result<(), Problem> {
        let (agreed, digest_steps) = (self.digests.agreed(), self.parts.file.run.digest_steps);
        let may_be_written = |step: u64| agreed >= step || !self.schedule.digests_after(step, digest_steps);
        match self.held.take_if(|(step, _)| may_be_written(*step)) {
            Some((_, image)) => self.write_checkpoint(image),
            None => Ok(()),
        }
    }

    fn write_checkpoint(&mut self, image: Vec<u8>) -> Result<(), Problem> {
        self.writing += 1;
        self.images.send(image).map_err(|_| Problem::failed("the writer of checkpoints has ended"))
    }

    fn checkpoint_written(&mut self, result: WrittenCheckpoint) -> Result<(), Problem> {
        self.writing -= 1;
        self.ending_goes_on();
        match result {
            Ok((stage, file)) => {
                self.parts.metrics.checkpoint(Some(stage.step));
                self.with_status(|status| status.checkpoint_step = Some(stage.step));
                self.parts.records.checkpoint_written(stage, file)?;
                if self.ending.is_none() && self.writing == 0 && stage.step >= self.announced {
                    self.announce_checkpoint();
                }
                Ok(())
            }
            Err(problem) => {
                self.parts.metrics.checkpoint(None);
                let sentence = format!("the checkpoint was not written: {problem}");
                self.parts.screen.notice(&sentence);
                if self.ending.is_some() {
                    // Asking again would most likely meet the same obstacle.
                    self.distrust();
                    self.end(Err(problem));
                }
                self.parts.records.journal(&Record::Event { text: sentence })
            }
        }
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

/// Starts the thread that writes checkpoints, one after another; it ends when the sender is dropped.
fn write_in_order(
    mut writer: CheckpointWriter,
) -> (std::sync::mpsc::Sender<Vec<u8>>, UnboundedReceiver<WrittenCheckpoint>) {
    let (images, to_write) = std::sync::mpsc::channel();
    let (written, checkpoints) = unbounded_channel();
    std::thread::spawn(move || {
        for image in to_write {
            if written.send(writer.write(image)).is_err() {
                break;
            }
        }
    });
    (images, checkpoints)
}
