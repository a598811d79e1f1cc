//! A worker's session as a machine of states: frames and timers in, frames out. It follows `worker::session`,
//! `worker::trainer` and `worker::train` line by line where they decide anything; what these compute, a [`Replica`] does.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use protocol::activity::{Phase, Position};
use protocol::batch::Batch;
use protocol::frame::{BULK_CHUNK_BYTES, BulkHeader, BulkKind, Frame, decode, encode_bulk, encode_message};
use protocol::message::{
    Form, Generation, HeldState, Hello, PhaseSeconds, StateSource, StepReport, Stop, ToCoordinator, ToWorker,
};
use protocol::schedule::Work;

use super::dice::Dice;
use super::network::{Node, Parcel, Process, Wire};
use super::replica::{Job, Part, Replica};

/// As in `worker::session`.
const SIGN_OF_LIFE_INTERVAL: Duration = Duration::from_secs(1);
/// As in `worker::feed`.
const BATCHES_AHEAD: u32 = 8;
/// As in `worker::collective::mesh`.
const FORM_LIMIT: Duration = Duration::from_secs(30);
/// As in `worker::collective::tcp`.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);

/// What a worker does.
#[derive(Debug)]
pub(super) enum Output {
    Send(Wire, Bytes),
    Close(Wire),
    /// Wakes it after a while.
    Wake(Duration, Timer),
    /// It has done a step, or the evaluation that belongs to it.
    Advanced(Generation, Replica),
    /// Its process ends.
    Exit(Exit),
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Exit {
    /// It was sent home.
    SentHome,
    /// The coordinator is gone.
    Lost,
    /// Something happened that must not.
    Wrong(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Timer {
    SignOfLife,
    /// The work begun at this count is done.
    Computed(u64),
    /// What was waited for since this count has not come.
    Silence(u64),
}

/// What peers send each other, in the order of one step: their key is step and position.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Round {
    /// The connection stands.
    Greeting = 0,
    /// The state, from the member that has it.
    State = 1,
    /// What each member's shards add, and its wish.
    Parts = 2,
    /// The sender has everybody's parts.
    Gathered = 3,
    /// What each member's shards add to an evaluation.
    Evaluation = 4,
}

/// What has come from peers, of one generation.
#[derive(Debug, Default)]
struct Mail {
    frames: HashMap<(Process, Round, u64), Bytes>,
    ended: BTreeSet<Process>,
}

pub(super) struct Worker {
    me: Process,
    job: Rc<Job>,
    dice: Dice,
    coordinator: Process,
    stage: Stage,
    is_welcome: bool,
    replica: Option<Replica>,
    /// The last generation it belonged to.
    generation: Generation,
    mail: BTreeMap<Generation, Mail>,
    drain: bool,
    pause: Option<Generation>,
    /// Steps after which the state is to be streamed.
    states: Vec<u64>,
    /// Counts what it has begun.
    begun: u64,
    out: Vec<Output>,
}

enum Stage {
    Idle,
    AwaitingImage(Form, Vec<u8>),
    Training(Box<Training>),
}

struct Training {
    form: Form,
    rank: u32,
    peers: Vec<Process>,
    image: Option<Vec<u8>>,
    batches: VecDeque<Batch>,
    /// What is left of the evaluation that is due, and what was computed of it.
    evaluation: VecDeque<Work>,
    evaluated: Vec<Vec<Part>>,
    wish: Wish,
    at: At,
    is_aborted: bool,
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

impl Worker {
    /// A worker that has reached the coordinator and says hello.
    pub(super) fn start(me: Process, coordinator: Process, job: Rc<Job>, seed: u64) -> (Self, Vec<Output>) {
        let mut worker = Self {
            me,
            job,
            dice: Dice::new(seed, &[4, me.node.number(), me.life.into()]),
            coordinator,
            stage: Stage::Idle,
            is_welcome: false,
            replica: None,
            generation: 0,
            mail: BTreeMap::new(),
            drain: false,
            pause: None,
            states: Vec::new(),
            begun: 0,
            out: Vec::new(),
        };
        worker.tell(ToCoordinator::Hello(Hello {
            name: me.node.to_string(),
            build: "simulated".into(),
            device: "simulated".into(),
            bits: "simulated".into(),
            threads: 1,
            // How peers find this process: see `process_at`.
            data_port: me.life as u16,
            advertise: None,
            metrics: None,
            incarnation: me.node.number() << 32 | u64::from(me.life),
            held: None,
        }));
        worker.wake(SIGN_OF_LIFE_INTERVAL, Timer::SignOfLife);
        let out = worker.taken();
        (worker, out)
    }

    pub(super) fn arrive(&mut self, wire: Wire, parcel: Parcel) -> Vec<Output> {
        match (wire.generation, parcel) {
            (None, Parcel::End) => self.exit(Exit::Lost),
            (None, Parcel::Frame(frame)) => match decode(frame) {
                Ok(Frame::Message(message)) => self.obey(message),
                Ok(Frame::Bulk(header, payload)) => self.take_in(&header, &payload),
                Err(error) => self.exit(Exit::Wrong(format!("the coordinator sent {error}"))),
            },
            // Behind it there is nothing more.
            (Some(generation), _) if generation < self.generation => {}
            (Some(generation), Parcel::End) => {
                self.mail.entry(generation).or_default().ended.insert(wire.from);
            }
            (Some(generation), Parcel::Frame(frame)) => {
                let (header, payload) = BulkHeader::decode(&frame).expect("peers send whole frames");
                assert_eq!(header.generation, generation);
                let round = [Round::Greeting, Round::State, Round::Parts, Round::Gathered, Round::Evaluation]
                    [header.sequence as usize];
                let mail = self.mail.entry(generation).or_default();
                mail.frames.insert((wire.from, round, header.step), Bytes::copy_from_slice(payload));
            }
        }
        self.go_on();
        self.taken()
    }

    pub(super) fn wake_up(&mut self, timer: Timer) -> Vec<Output> {
        match timer {
            Timer::SignOfLife => {
                // Threads do not hang here.
                self.tell(ToCoordinator::Alive(Position {
                    generation: self.generation,
                    phase: Phase::Idle,
                    step: 0,
                    waits: true,
                    for_ms: 0,
                    longest_ms: None,
                    operations: 0,
                    bytes: 0,
                    waits_for: None,
                }));
                self.wake(SIGN_OF_LIFE_INTERVAL, Timer::SignOfLife);
            }
            Timer::Computed(begun) if begun == self.begun => self.computed(),
            Timer::Silence(begun) if begun == self.begun => {
                if let Stage::Training(training) = &self.stage
                    && !matches!(training.at, At::AwaitingBatch(_))
                {
                    self.stop(Stop::Broken("a peer is silent".into()));
                }
            }
            _ => {}
        }
        self.go_on();
        self.taken()
    }

    /// Its state, while it rests.
    pub(super) fn held(&self) -> Option<&Replica> {
        match &self.stage {
            Stage::Training(_) => None,
            Stage::Idle | Stage::AwaitingImage(..) => self.replica.as_ref(),
        }
    }

    fn taken(&mut self) -> Vec<Output> {
        std::mem::take(&mut self.out)
    }

    fn exit(&mut self, exit: Exit) {
        self.out.push(Output::Exit(exit));
    }

    fn wrong(&mut self, what: impl Into<String>) {
        self.exit(Exit::Wrong(what.into()));
    }

    fn wake(&mut self, after: Duration, timer: Timer) {
        self.out.push(Output::Wake(after, timer));
    }

    fn tell(&mut self, message: ToCoordinator) {
        self.send_control(encode_message(&message));
    }

    fn send_control(&mut self, frame: Bytes) {
        let wire = Wire { from: self.me, to: self.coordinator, generation: None };
        self.out.push(Output::Send(wire, frame));
    }

    fn send_peers(&mut self, round: Round, step: u64, payload: &[u8]) {
        let Stage::Training(training) = &self.stage else { return };
        let generation = training.form.generation;
        let header = BulkHeader { kind: BulkKind::Gather, generation, step, sequence: round as u32, tag: 0 };
        let frame = encode_bulk(&header, payload);
        for &to in &training.peers {
            let wire = Wire { from: self.me, to, generation: Some(generation) };
            self.out.push(Output::Send(wire, frame.clone()));
        }
    }

    fn obey(&mut self, message: ToWorker) {
        match message {
            ToWorker::Welcome(_) if !self.is_welcome => self.is_welcome = true,
            ToWorker::Goodbye(_) => self.exit(Exit::SentHome),
            ToWorker::Form(form) if form.state == StateSource::Coordinator => {
                self.stage = match std::mem::replace(&mut self.stage, Stage::Idle) {
                    Stage::Training(_) => return self.wrong("a generation is formed while another one runs"),
                    Stage::Idle | Stage::AwaitingImage(..) => Stage::AwaitingImage(form, Vec::new()),
                }
            }
            ToWorker::Form(form) => self.begin(form, None),
            ToWorker::Drain => self.drain = true,
            ToWorker::Pause { generation } => self.pause = Some(generation),
            ToWorker::Abort { generation } => {
                if let Stage::Training(training) = &mut self.stage
                    && training.form.generation == generation
                {
                    // Who computes notices it when it waits the next time.
                    training.is_aborted = true;
                }
            }
            ToWorker::SendState { at_step } => match &self.stage {
                Stage::Training(_) => self.states.push(at_step),
                _ => self.send_state(),
            },
            ToWorker::StandBy => {}
            ToWorker::Welcome(_) => self.wrong("a second welcome"),
        }
    }

    fn take_in(&mut self, header: &BulkHeader, payload: &Bytes) {
        match (header.kind, &mut self.stage) {
            (BulkKind::State, Stage::AwaitingImage(form, image)) => {
                if header.generation != form.generation || header.tag != image.len() as u64 {
                    return self.wrong("a state in the wrong order");
                }
                image.extend_from_slice(payload);
                if image.len() == self.job.layout.image_bytes() {
                    let (form, image) = (form.clone(), std::mem::take(image));
                    self.stage = Stage::Idle;
                    self.begin(form, Some(image));
                }
            }
            (BulkKind::Batch, Stage::Training(training)) if header.generation == training.form.generation => {
                match Batch::from_bytes(payload, self.job.data.shape()) {
                    Some(batch) => training.batches.push_back(batch),
                    None => self.wrong("a batch that does not fit the job"),
                }
            }
            (BulkKind::State | BulkKind::Batch, _) => {}
            (BulkKind::Reduce | BulkKind::Gather, _) => self.wrong("data of the workers' own plane"),
        }
    }

    /// `Session::start` and the first lines of `Trainer::work`.
    fn begin(&mut self, form: Form, image: Option<Vec<u8>>) {
        if matches!(self.stage, Stage::Training(_)) {
            return self.wrong("a generation is formed while another one runs");
        }
        (self.pause, self.generation) = (None, form.generation);
        self.states.clear();
        self.mail = self.mail.split_off(&form.generation);
        let mut peers: Vec<Process> = form.members.iter().map(|member| process_at(&member.address)).collect();
        let place = peers.iter().position(|peer| *peer == self.me);
        let Some(place) = place else { return self.wrong("a generation without this worker") };
        peers.remove(place);
        self.tell(ToCoordinator::Credit { generation: form.generation, batches: BATCHES_AHEAD });
        let training = Training {
            form,
            rank: place as u32,
            peers,
            image,
            batches: VecDeque::new(),
            evaluation: VecDeque::new(),
            evaluated: Vec::new(),
            wish: Wish::GoOn,
            at: At::Connecting,
            is_aborted: false,
        };
        self.stage = Stage::Training(Box::new(training));
        self.send_peers(Round::Greeting, 0, &[]);
        self.turn_to(At::Connecting, FORM_LIMIT);
    }

    fn turn_to(&mut self, at: At, limit: Duration) {
        self.begun += 1;
        let Stage::Training(training) = &mut self.stage else { return };
        training.at = at;
        self.wake(limit, Timer::Silence(self.begun));
    }

    /// What has come from all peers in a round, by rank with an empty place for this worker's own; or who is gone
    /// without having sent it.
    fn all_of(&mut self, round: Round, step: u64) -> Result<Option<Vec<Bytes>>, String> {
        let Stage::Training(training) = &self.stage else { return Ok(None) };
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
    fn go_on(&mut self) {
        loop {
            let begun = self.begun;
            let Stage::Training(training) = &self.stage else { return };
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
        let Stage::Training(training) = &mut self.stage else { return };
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
        let Stage::Training(training) = &self.stage else { return Ok(()) };
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
        let (Stage::Training(training), Some(replica)) = (&mut self.stage, &self.replica) else { return };
        let (step, owes) = (training.form.step, training.form.owes_evaluation);
        if replica.step != step {
            let held = replica.step;
            return self.wrong(format!("the state is that after step {held}, not after {step}"));
        }
        if owes {
            training.evaluation = self.job.schedule.evaluation(step).collect();
        }
        let generation = training.form.generation;
        self.tell(ToCoordinator::Connected { generation });
        self.next();
    }

    /// The head of the loop in `Generation::train`.
    fn next(&mut self) {
        let (Stage::Training(training), Some(replica)) = (&mut self.stage, &self.replica) else { return };
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
        let Stage::Training(training) = &mut self.stage else { return };
        let Some(batch) = training.batches.pop_front() else { return };
        if batch.work != work {
            let got = batch.work;
            return self.wrong(format!("batch {got:?} arrived, expected {work:?}"));
        }
        let generation = training.form.generation;
        self.tell(ToCoordinator::Credit { generation, batches: 1 });
        self.turn_to(At::Computing(batch), SILENCE_LIMIT);
        let takes = self.dice.between(Duration::from_millis(10)..Duration::from_millis(60));
        self.wake(takes, Timer::Computed(self.begun));
    }

    fn computed(&mut self) {
        let (Stage::Training(training), Some(replica)) = (&mut self.stage, &self.replica) else { return };
        let At::Computing(batch) = training.at.clone() else { return };
        if training.is_aborted {
            return;
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
        let (Some(all), Stage::Training(training)) = (all, &mut self.stage) else { return };
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
        let (Stage::Training(training), Some(replica)) = (&mut self.stage, &mut self.replica) else { return };
        if parts.len() != self.job.file.job.shards as usize {
            let count = parts.len();
            return self.wrong(format!("{count} shards were summed"));
        }
        let (generation, schedule) = (training.form.generation, self.job.schedule);
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
            seconds: PhaseSeconds { data: 0.0, compute: 0.03, reduce: 0.01, update: 0.01 },
        }));
        if !schedule.evaluates_after(step) {
            self.after_step();
        }
        self.next();
    }

    fn take_evaluation(&mut self, all: Option<Vec<Bytes>>) {
        let (Some(all), Stage::Training(training), Some(replica)) = (all, &mut self.stage, &mut self.replica)
        else {
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

    /// `Outbox::after_step`.
    fn after_step(&mut self) {
        let Some(replica) = &self.replica else { return };
        let (step, digest, generation) = (replica.step, replica.digest(), self.generation);
        if self.job.schedule.digests_after(step, self.job.file.run.digest_steps) {
            self.tell(ToCoordinator::Digest { generation, step, digest });
        }
        let before = self.states.len();
        self.states.retain(|&at_step| at_step > step);
        if self.states.len() < before {
            self.send_state();
        }
    }

    fn send_state(&mut self) {
        let Some(replica) = &self.replica else { return };
        let (image, generation, step) = (replica.image(&self.job), self.generation, replica.step);
        for (chunk, sequence) in image.chunks(BULK_CHUNK_BYTES).zip(0u32..) {
            let tag = u64::from(sequence) * BULK_CHUNK_BYTES as u64;
            let header = BulkHeader { kind: BulkKind::State, generation, step, sequence, tag };
            self.send_control(encode_bulk(&header, chunk));
        }
    }

    /// `Session::rest`.
    fn stop(&mut self, why: Stop) {
        let Stage::Training(training) = std::mem::replace(&mut self.stage, Stage::Idle) else { return };
        self.begun += 1;
        let (generation, schedule) = (training.form.generation, self.job.schedule);
        if matches!(training.at, At::ReceivingState) {
            // What arrives last is all that one of the same step lacks.
            self.replica = self.replica.take().filter(|kept| kept.step == training.form.step);
        }
        for &to in &training.peers {
            self.out.push(Output::Close(Wire { from: self.me, to, generation: Some(generation) }));
        }
        let held = self.replica.clone();
        if let Some(replica) = held.as_ref().filter(|replica| !replica.owes_evaluation(schedule)) {
            self.tell(ToCoordinator::Digest { generation, step: replica.step, digest: replica.digest() });
        }
        let state = held.map(|replica| {
            let step = replica.step;
            let owes_last =
                why != Stop::Finished && schedule.evaluates_after(step) && !schedule.ends_epoch(step);
            HeldState { step, owes_evaluation: replica.owes_evaluation(schedule) || owes_last }
        });
        self.tell(ToCoordinator::Stopped { generation, state, why });
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

/// The address of a worker's host, as the coordinator sees it.
pub(super) fn host_of(process: Process) -> std::net::SocketAddr {
    ([10, 0, 0, process.node.number() as u8], 4000).into()
}

/// Who listens at `HOST:PORT`.
pub(super) fn process_at(address: &str) -> Process {
    let address: std::net::SocketAddr = address.parse().unwrap();
    let std::net::IpAddr::V4(host) = address.ip() else { panic!("{address}") };
    Process { node: Node::Worker(host.octets()[3].into()), life: address.port().into() }
}
