//! A worker as a machine of states: frames and timers in, frames out. It follows the worker's own code line by line where
//! that decides anything; what it computes, a [`Replica`] does.
//!
//! - here: its connection to the coordinator, and what it is told (`worker::session`).
//! - [`away`]: the coordinator is lost, and looked for (`worker::session::away`, `worker::reports`).
//! - [`training`]: a generation, from its first connection to its end (`worker::trainer`, `worker::train`).

mod away;
mod training;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use protocol::activity::{Phase, Position};
use protocol::batch::Batch;
use protocol::frame::{BULK_CHUNK_BYTES, BulkHeader, BulkKind, Frame, decode, encode_bulk};
use protocol::message::{Form, Generation, StateSource, Stop, ToCoordinator, ToWorker};

use self::away::{Link, Reports};
use self::training::Training;
use super::dice::Dice;
use super::network::{Node, Parcel, Plane, Process, Wire};
use super::replica::{Job, Replica};

/// As in `worker::session`.
const SIGN_OF_LIFE_INTERVAL: Duration = Duration::from_secs(1);
/// As in `worker::feed`.
pub(super) const BATCHES_AHEAD: u32 = 8;

/// What a worker does.
#[derive(Debug)]
pub(super) enum Output {
    Send(Wire, Bytes),
    Close(Wire),
    /// Looks for a coordinator.
    Seek,
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
    /// Something happened that must not.
    Wrong(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Timer {
    SignOfLife,
    /// The coordinator has not answered this connection's hello.
    Greeting(Plane),
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
    /// The run that it works for, once it was told.
    run_id: Option<String>,
    link: Link,
    /// Its last connection to a coordinator, if it ever had one.
    control: Option<Wire>,
    reports: Reports,
    /// The next coordinator could go on with what this worker holds: see [`held`](Self::held).
    is_of_use: bool,
    training: Option<Box<Training>>,
    /// The generation that begins when its state is here and the last one has ended.
    next: Option<Next>,
    replica: Option<Replica>,
    /// The last generation that it took part in with that: one may be over before its state has come.
    replica_of: Generation,
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

/// A generation that is to begin.
struct Next {
    form: Form,
    /// As much of the state as has arrived, if the coordinator sends it.
    image: Option<Vec<u8>>,
    /// It was given up before it began.
    is_over: bool,
}

impl Worker {
    /// A worker that has just been started.
    pub(super) fn start(me: Process, job: Rc<Job>, seed: u64) -> (Self, Vec<Output>) {
        let mut worker = Self {
            me,
            job,
            dice: Dice::new(seed, &[4, me.node.number(), me.life.into()]),
            run_id: None,
            link: Link::Away,
            control: None,
            reports: Reports::default(),
            is_of_use: false,
            training: None,
            next: None,
            replica: None,
            replica_of: 0,
            generation: 0,
            mail: BTreeMap::new(),
            drain: false,
            pause: None,
            states: Vec::new(),
            begun: 0,
            out: Vec::new(),
        };
        worker.out.push(Output::Seek);
        worker.wake(SIGN_OF_LIFE_INTERVAL, Timer::SignOfLife);
        let out = worker.taken();
        (worker, out)
    }

    pub(super) fn arrive(&mut self, wire: Wire, parcel: Parcel) -> Vec<Output> {
        match (wire.plane, parcel) {
            // Of a connection that it has given up.
            (Plane::Control(_), _)
                if self.control != Some(wire.back()) || matches!(self.link, Link::Away) => {}
            (Plane::Control(_), Parcel::End) => self.lose_coordinator(),
            (Plane::Control(_), Parcel::Frame(frame)) => match decode(frame) {
                Ok(Frame::Message(message)) => self.obey(message),
                Ok(Frame::Bulk(header, payload)) => self.take_in(&header, &payload),
                Err(error) => self.wrong(format!("the coordinator sent {error}")),
            },
            // Behind it there is nothing more.
            (Plane::Data(generation), _) if generation < self.generation => {}
            (Plane::Data(generation), Parcel::End) => {
                self.mail.entry(generation).or_default().ended.insert(wire.from);
            }
            (Plane::Data(generation), Parcel::Frame(frame)) => {
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
                if matches!(self.link, Link::Up) {
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
                }
                self.wake(SIGN_OF_LIFE_INTERVAL, Timer::SignOfLife);
            }
            Timer::Greeting(plane) => self.is_not_answered(plane),
            Timer::Computed(begun) if begun == self.begun => self.computed(),
            Timer::Silence(begun) if begun == self.begun => self.silence(),
            _ => {}
        }
        self.go_on();
        self.taken()
    }

    /// Its state, while it rests, if the run can go on with it: those who ask hold a coordinator to that.
    pub(super) fn held(&self) -> Option<(Generation, &Replica)> {
        let rests = self.training.is_none() && self.is_of_use;
        self.replica.as_ref().filter(|_| rests).map(|replica| (self.replica_of, replica))
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

    fn send_control(&mut self, frame: Bytes) {
        if let Some(wire) = self.control {
            self.out.push(Output::Send(wire, frame));
        }
    }

    fn obey(&mut self, message: ToWorker) {
        if matches!(self.link, Link::Greeting(_))
            && !matches!(message, ToWorker::Welcome(_) | ToWorker::Goodbye(_))
        {
            return self.wrong(format!("a coordinator began with {message:?}"));
        }
        match message {
            ToWorker::Welcome(welcome) => self.welcomed(&welcome),
            ToWorker::Goodbye(_) => self.exit(Exit::SentHome),
            ToWorker::Form(form) => {
                if self.training.as_ref().is_some_and(|training| training.begun_over == self.control) {
                    return self.wrong("a generation is formed while another one runs");
                }
                let image = (form.state == StateSource::Coordinator).then(Vec::new);
                self.next = Some(Next { form, image, is_over: false });
                // Of a generation that the coordinator has gone on without.
                self.abort();
                self.begin_next();
            }
            ToWorker::Drain => self.drain = true,
            ToWorker::Pause { generation } => self.pause = Some(generation),
            ToWorker::Abort { generation } => {
                if self.training.as_ref().is_some_and(|training| training.form.generation == generation) {
                    self.abort();
                }
                if let Some(next) = self.next.as_mut().filter(|next| next.form.generation == generation) {
                    next.is_over = true;
                    self.begin_next();
                }
            }
            ToWorker::SendState { at_step } => match &self.training {
                Some(_) => self.states.push(at_step),
                None => self.send_state(),
            },
            ToWorker::StandBy => self.abort(),
        }
    }

    fn take_in(&mut self, header: &BulkHeader, payload: &Bytes) {
        match header.kind {
            BulkKind::State => {
                let Some(Next { form, image: Some(image), .. }) = &mut self.next else { return };
                if header.generation != form.generation || header.tag != image.len() as u64 {
                    return self.wrong("a state in the wrong order");
                }
                image.extend_from_slice(payload);
                self.begin_next();
            }
            BulkKind::Batch => {
                let Some(training) = &mut self.training else { return };
                if header.generation != training.form.generation {
                    return;
                }
                match Batch::from_bytes(payload, self.job.data.shape()) {
                    Some(batch) => training.take_in(batch, self.job.schedule),
                    None => self.wrong("a batch that does not fit the job"),
                }
            }
            BulkKind::Reduce | BulkKind::Gather => self.wrong("data of the workers' own plane"),
        }
    }

    /// Begins the next generation, if its state is here and the last one has ended.
    fn begin_next(&mut self) {
        let size = self.job.layout.image_bytes();
        let is_here = |image: &Vec<u8>| image.len() >= size;
        let may_begin = |next: &Next| next.is_over || next.image.as_ref().is_none_or(is_here);
        if self.training.is_some() || !self.next.as_ref().is_some_and(may_begin) {
            return;
        }
        let Next { form, image, is_over } = self.next.take().expect("it was just looked at");
        if is_over {
            let (generation, state) = (form.generation, self.held_state(false));
            self.tell(ToCoordinator::Stopped { generation, state, why: Stop::Aborted });
        } else {
            self.begin(form, image);
        }
    }

    fn abort(&mut self) {
        if let Some(training) = &mut self.training {
            // Who computes notices it when it waits the next time.
            training.is_aborted = true;
        }
    }

    fn silence(&mut self) {
        if self.training.as_ref().is_some_and(|training| !training.awaits_batch()) {
            self.stop(Stop::Broken("a peer is silent".into()));
        }
    }

    /// `Outbox::after_step`.
    fn after_step(&mut self) {
        let Some(replica) = &self.replica else { return };
        let (step, digest, generation) = (replica.step, replica.digest(), self.generation);
        let digest_steps = self.job.file.run.digest_steps;
        let is_compared = self.job.schedule.digests_after(step, digest_steps);
        if is_compared {
            self.tell(ToCoordinator::Digest { generation, step, digest });
        }
        if !is_compared && digest_steps > 0 {
            return;
        }
        let before = self.states.len();
        self.states.retain(|&at_step| at_step > step);
        if self.states.len() < before {
            self.send_state();
        }
    }

    fn send_state(&mut self) {
        // Who asked for it is gone, if the coordinator is.
        let (Some(replica), Link::Up) = (&self.replica, &self.link) else { return };
        let (image, generation, step) = (replica.image(&self.job), self.generation, replica.step);
        for (chunk, sequence) in image.chunks(BULK_CHUNK_BYTES).zip(0u32..) {
            let tag = u64::from(sequence) * BULK_CHUNK_BYTES as u64;
            let header = BulkHeader { kind: BulkKind::State, generation, step, sequence, tag };
            self.send_control(encode_bulk(&header, chunk));
        }
    }

    fn send_peers(&mut self, round: Round, step: u64, payload: &[u8]) {
        let Some(training) = &self.training else { return };
        let generation = training.form.generation;
        let header = BulkHeader { kind: BulkKind::Gather, generation, step, sequence: round as u32, tag: 0 };
        let frame = encode_bulk(&header, payload);
        for &to in &training.peers {
            let wire = Wire { from: self.me, to, plane: Plane::Data(generation) };
            self.out.push(Output::Send(wire, frame.clone()));
        }
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
