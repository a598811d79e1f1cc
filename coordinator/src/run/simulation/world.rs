//! What happens, in the order of time: parcels arrive, timers wake, faults come, and the supervisor starts whatever has
//! died.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use protocol::frame::{BulkHeader, Frame, decode};
use protocol::message::{ToCoordinator, ToWorker};
use protocol::problem::Exit as RunExit;

use super::super::checkpoints::WrittenCheckpoint;
use super::dice::Dice;
use super::host::Host;
use super::network::{Network, Node, Parcel, Process, Sent, Wire};
use super::oracle::{Expected, Watch};
use super::replica::Job;
use super::script::{Fault, Script};
use super::worker::{Exit, Output, Timer, Worker, process_at};
use crate::membership::Decide;

/// As in `Run::run`.
const TICK: Duration = Duration::from_millis(200);

/// How long the supervisor waits before it starts something again, and a worker before it tries to connect again.
const RESTART_AFTER: Duration = Duration::from_millis(200);

/// When the last fault is over, the run is done after so long: several times the longest limit of any kind.
const DONE_WITHIN: Duration = Duration::from_secs(200);

/// What happened before a failure is told so far back.
const STORY_LENGTH: usize = 60;

/// Something that happens at a time.
enum Happening {
    Arrives(Sent),
    Wakes(Process, Timer),
    /// A worker looks for a coordinator.
    Seeks(Process),
    Tick(Process),
    /// The writer of checkpoints gets to a state.
    Write(Process, Vec<u8>),
    /// It says what came of that.
    Written(Process, WrittenCheckpoint),
    Start(Node),
    Fault(Fault),
    Continue(Node),
}

/// What became of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Report {
    /// What must hold and did not.
    pub(super) violation: Option<String>,
    /// Simulated time that it took.
    pub(super) took: Duration,
    /// Places at which a process could have been killed.
    pub(super) points: u64,
    /// The last generation.
    pub(super) generation: u64,
    /// What happened last, if it was to be told.
    pub(super) story: Vec<String>,
}

pub(super) struct World<'a> {
    job: Rc<Job>,
    dir: &'a Path,
    decide: Decide,
    expected: &'a Expected,
    script: Script,
    now: Duration,
    queue: BTreeMap<(Duration, u64), Happening>,
    /// Numbers what happens at the same time.
    queued: u64,
    network: Network,
    dice: Dice,
    host: Option<Host>,
    workers: BTreeMap<u32, Worker>,
    /// How often each node was started.
    lives: BTreeMap<Node, u32>,
    /// Nodes that the supervisor keeps alive.
    wanted: BTreeSet<Node>,
    stopped: BTreeMap<Node, Duration>,
    watch: Watch<'a>,
    points: u64,
    kill_at: BTreeSet<u64>,
    generation: u64,
    /// The coordinator that formed it.
    begun_by: Option<Process>,
    /// What happened last, in words, where it is told.
    story: Option<VecDeque<String>>,
    violation: Option<String>,
    is_done: bool,
}

impl<'a> World<'a> {
    pub(super) fn new(
        job: Rc<Job>,
        expected: &'a Expected,
        dir: &'a Path,
        decide: Decide,
        script: &Script,
    ) -> Self {
        let mut world = Self {
            job,
            dir,
            decide,
            expected,
            script: script.clone(),
            now: Duration::ZERO,
            queue: BTreeMap::new(),
            queued: 0,
            network: Network::new(script.seed),
            dice: Dice::new(script.seed, &[5]),
            host: None,
            workers: BTreeMap::new(),
            lives: BTreeMap::new(),
            wanted: BTreeSet::new(),
            stopped: BTreeMap::new(),
            watch: expected.watch(),
            points: 0,
            kill_at: BTreeSet::new(),
            generation: 0,
            begun_by: None,
            story: None,
            violation: None,
            is_done: false,
        };
        let nodes = (1..=script.workers).map(Node::Worker).chain([Node::Coordinator]);
        for node in nodes {
            world.want(node, Duration::ZERO);
        }
        for timed in &script.faults {
            match timed.fault {
                Fault::KillAt(point) => drop(world.kill_at.insert(point)),
                fault => world.put(timed.at, Happening::Fault(fault)),
            }
        }
        world
    }

    /// Remembers what happens, for people.
    pub(super) fn with_story(self) -> Self {
        Self { story: Some(VecDeque::new()), ..self }
    }

    /// Remembers this, if it is told at all.
    fn tell(&mut self, what: impl FnOnce() -> String) {
        let Some(story) = &mut self.story else { return };
        story.push_back(format!("{:>10.6} s  {}", self.now.as_secs_f64(), what()));
        if story.len() > STORY_LENGTH {
            story.pop_front();
        }
    }

    /// Runs to the end, or until something is wrong.
    pub(super) async fn run(mut self) -> Report {
        let deadline = self.script.end() + DONE_WITHIN;
        while !self.is_done && self.violation.is_none() {
            let Some(((at, number), happening)) = self.queue.pop_first() else {
                self.wrong("nothing happens any more");
                break;
            };
            if at > deadline {
                self.wrong("the run does not end");
                break;
            }
            if at > self.now {
                tokio::time::advance(at - self.now).await;
                self.now = at;
            }
            match self.held_until(&happening) {
                Some(until) => drop(self.queue.insert((until, number), happening)),
                None => self.happen(happening).await,
            }
        }
        if self.is_done && self.violation.is_none() {
            self.violation = self.expected.compare(&self.job, self.dir).err();
        }
        Report {
            violation: self.violation,
            took: self.now,
            points: self.points,
            generation: self.generation,
            story: self.story.unwrap_or_default().into(),
        }
    }

    fn wrong(&mut self, what: impl Into<String>) {
        self.violation.get_or_insert(what.into());
    }

    fn put(&mut self, at: Duration, happening: Happening) {
        self.queued += 1;
        self.queue.insert((at, self.queued), happening);
    }

    fn put_sent(&mut self, sent: impl IntoIterator<Item = (Duration, Sent)>) {
        for (at, sent) in sent {
            self.put(at, Happening::Arrives(sent));
        }
    }

    fn want(&mut self, node: Node, after: Duration) {
        self.wanted.insert(node);
        self.put(self.now + after, Happening::Start(node));
    }

    /// Until when this cannot happen, because a process is stopped or the network is cut.
    fn held_until(&mut self, happening: &Happening) -> Option<Duration> {
        let node = match happening {
            Happening::Arrives(sent) => {
                if let Some(until) = self.network.held_until(self.now, sent.wire) {
                    return Some(until);
                }
                sent.wire.to.node
            }
            Happening::Wakes(process, _)
            | Happening::Seeks(process)
            | Happening::Tick(process)
            | Happening::Write(process, _)
            | Happening::Written(process, _) => process.node,
            Happening::Start(_) | Happening::Fault(_) | Happening::Continue(_) => return None,
        };
        self.stopped.get(&node).copied().filter(|&until| until > self.now)
    }

    async fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Arrives(sent) => self.arrive(sent).await,
            Happening::Wakes(process, timer) => {
                if self.is_alive(process)
                    && let Some(worker) = self.worker(process)
                {
                    let outputs = worker.wake_up(timer);
                    self.obey(process, outputs);
                }
            }
            Happening::Seeks(process) => self.seek(process),
            Happening::Tick(process) => {
                if self.is_alive(process)
                    && let Some(host) = &mut self.host
                {
                    for wire in host.tick(self.now) {
                        let told = self.network.close(self.now, wire);
                        self.put_sent(told);
                    }
                    self.put(self.now + TICK, Happening::Tick(process));
                    self.after_host().await;
                }
            }
            Happening::Write(process, image) => {
                if self.passes(process)
                    && let Some(host) = &mut self.host
                {
                    let result = host.write(image);
                    if self.passes(process) {
                        let takes = self.dice.between(Duration::from_millis(1)..Duration::from_millis(30));
                        self.put(self.now + takes, Happening::Written(process, result));
                    }
                }
            }
            Happening::Written(process, result) => {
                if self.is_alive(process)
                    && let Some(host) = &mut self.host
                {
                    host.written(result);
                    if self.passes(process) {
                        self.after_host().await;
                    }
                }
            }
            Happening::Start(node) => self.start(node),
            Happening::Fault(fault) => self.befall(fault).await,
            Happening::Continue(node) => {
                if node == Node::Coordinator
                    && let Some(host) = &mut self.host
                {
                    host.continued(self.now);
                }
            }
        }
    }

    /// The process of a node, if it lives.
    fn process(&self, node: Node) -> Option<Process> {
        let lives = match node {
            Node::Coordinator => self.host.is_some(),
            Node::Worker(number) => self.workers.contains_key(&number),
        };
        lives.then(|| Process { node, life: self.lives[&node] })
    }

    fn is_alive(&self, process: Process) -> bool {
        self.process(process.node) == Some(process)
    }

    fn worker(&mut self, process: Process) -> Option<&mut Worker> {
        self.workers.get_mut(&process.number()?)
    }

    /// One more point at which a process may be killed: false if it is, or was before.
    fn passes(&mut self, process: Process) -> bool {
        if !self.is_alive(process) {
            return false;
        }
        let point = self.points;
        self.points += 1;
        if self.kill_at.contains(&point) {
            self.kill(process.node);
            return false;
        }
        true
    }

    async fn arrive(&mut self, sent: Sent) {
        if self.network.is_lost(&sent) {
            return;
        }
        let Sent { wire, parcel, .. } = sent;
        if !self.passes(wire.to) {
            return;
        }
        self.tell(|| format!("{} ← {}: {}", wire.to.node, wire.from.node, content(wire, &parcel)));
        match wire.to.node {
            Node::Coordinator => {
                let Some(host) = &mut self.host else { return };
                host.arrive(self.now, wire, parcel);
                if self.passes(wire.to) {
                    self.after_host().await;
                }
            }
            Node::Worker(_) => {
                let Some(worker) = self.worker(wire.to) else { return };
                let outputs = worker.arrive(wire, parcel);
                if self.passes(wire.to) {
                    self.obey(wire.to, outputs);
                }
            }
        }
    }

    /// Sends what the coordinator has to say.
    async fn after_host(&mut self) {
        // Feeders are tasks of their own.
        for _ in 0..3 {
            tokio::task::yield_now().await;
        }
        let Some(host) = &mut self.host else { return };
        let (me, outgoing, image) = (host.me, host.outgoing(), host.next_image());
        let is_over = host.is_over();
        self.send_all(me, outgoing);
        if let Some(image) = image {
            let takes = self.dice.between(Duration::from_millis(1)..Duration::from_millis(60));
            self.put(self.now + takes, Happening::Write(me, image));
        }
        if is_over && self.is_alive(me) {
            let host = self.host.take().expect("it is alive");
            let (goodbyes, result) = host.end().await;
            self.send_all(me, goodbyes);
            // Those whose hello has not come either.
            let told = self.network.died(self.now, me, &mut self.dice);
            self.put_sent(told);
            self.watch.stopped();
            match result {
                Ok(RunExit::Done) => self.is_done = true,
                // Whoever asked it to stop starts it again. All workers end with it.
                Ok(_) => self.want(Node::Coordinator, RESTART_AFTER),
                // All that held the last state were lost when the run was at its end: the user is told to do the same.
                Err(problem) if problem.sentence.starts_with("the last state was not written") => {
                    self.want(Node::Coordinator, RESTART_AFTER);
                }
                Err(problem) => self.wrong(format!("the run failed: {problem}")),
            }
        }
    }

    fn send_all(&mut self, from: Process, outgoing: Vec<(Wire, Parcel)>) {
        for (wire, parcel) in outgoing {
            let frame = match parcel {
                Parcel::Frame(frame) => frame,
                Parcel::End => {
                    let told = self.network.close(self.now, wire);
                    self.put_sent(told);
                    continue;
                }
            };
            if let Ok(Frame::Message(ToWorker::Form(form))) = decode(frame.clone()) {
                let held = form.members.iter().filter_map(|member| {
                    let process = process_at(&member.address);
                    let worker = self.workers.get(&process.number()?).filter(|_| self.is_alive(process))?;
                    worker.held().map(|(generation, replica)| (generation, replica.step))
                });
                let held: Vec<_> = held.collect();
                if let Err(what) = self.watch.formed(from, &form, &held) {
                    self.wrong(what);
                }
                (self.generation, self.begun_by) = (form.generation, Some(from));
            }
            // A coordinator that is no more says goodbye all the same, and is not killed meanwhile.
            if self.host.is_some() && !self.passes(from) {
                return;
            }
            let sent = self.network.send(self.now, wire, Parcel::Frame(frame));
            self.put_sent(sent);
        }
    }

    /// Does what a worker wants.
    fn obey(&mut self, process: Process, outputs: Vec<Output>) {
        for output in outputs {
            match output {
                Output::Send(wire, frame) => {
                    if !self.send_from_worker(wire, frame) {
                        return;
                    }
                }
                Output::Close(wire) => {
                    let told = self.network.close(self.now, wire);
                    self.put_sent(told);
                }
                Output::Wake(after, timer) => self.put(self.now + after, Happening::Wakes(process, timer)),
                Output::Seek => self.put(self.now, Happening::Seeks(process)),
                Output::Advanced(generation, replica) => {
                    if let Err(what) = self.watch.advanced(process, generation, &replica) {
                        self.wrong(what);
                    }
                }
                Output::Exit(exit) => {
                    if let Exit::Wrong(what) = &exit {
                        self.wrong(format!("{}: {what}", process.node));
                    }
                    return self.kill(process.node);
                }
            }
        }
    }

    fn send_from_worker(&mut self, wire: Wire, frame: Bytes) -> bool {
        if !self.passes(wire.from) {
            return false;
        }
        // Nobody listens where a process has died.
        if self.is_alive(wire.to) {
            let sent = self.network.send(self.now, wire, Parcel::Frame(frame));
            self.put_sent(sent);
        }
        self.passes(wire.from)
    }

    /// The supervisor starts a node, if it is to live and does not.
    fn start(&mut self, node: Node) {
        if self.process(node).is_some() || !self.wanted.contains(&node) {
            return;
        }
        self.tell(|| format!("{node} starts"));
        let life = self.lives.get(&node).copied().unwrap_or(0) + 1;
        let me = Process { node, life };
        match node {
            // It is started for as many workers as there are to be.
            Node::Coordinator => {
                let fleet = (self.wanted.len() as u32 - 1, self.script.balance);
                match Host::start(me, &self.job, fleet, self.dir, self.decide) {
                    Ok(host) => {
                        self.host = Some(host);
                        self.put(self.now + TICK, Happening::Tick(me));
                    }
                    Err(problem) => return self.wrong(format!("the coordinator does not start: {problem}")),
                }
            }
            Node::Worker(number) => {
                let (worker, outputs) = Worker::start(me, self.job.clone(), self.script.seed);
                self.workers.insert(number, worker);
                self.lives.insert(node, life);
                return self.obey(me, outputs);
            }
        }
        self.lives.insert(node, life);
    }

    /// A worker greets the coordinator, if there is one, else it tries again later.
    fn seek(&mut self, process: Process) {
        if !self.is_alive(process) {
            return;
        }
        let Some(coordinator) = self.process(Node::Coordinator) else {
            return self.put(self.now + RESTART_AFTER, Happening::Seeks(process));
        };
        if let Some(worker) = self.worker(process) {
            let outputs = worker.greet(coordinator);
            self.obey(process, outputs);
        }
    }

    /// A process ends.
    fn kill(&mut self, node: Node) {
        let Some(process) = self.process(node) else { return };
        self.tell(|| format!("{node} ends"));
        match node {
            Node::Coordinator => self.host = None,
            Node::Worker(number) => drop(self.workers.remove(&number)),
        }
        let told = self.network.died(self.now, process, &mut self.dice);
        self.put_sent(told);
        if self.wanted.contains(&node) {
            self.put(self.now + RESTART_AFTER, Happening::Start(node));
        }
    }

    async fn befall(&mut self, fault: Fault) {
        self.tell(|| fault.to_string());
        match fault {
            Fault::Kill(node) => self.kill(node),
            Fault::KillAt(_) => {}
            Fault::Stop(node, length) => {
                let until = self.now + length;
                self.stopped.insert(node, until);
                self.put(until, Happening::Continue(node));
            }
            Fault::Lose(from, to, length) => self.network.disturb(from, to, self.now + length, None),
            Fault::Cut(one, other, length) => {
                self.network.disturb(one, other, self.now + length, None);
                self.network.disturb(other, one, self.now + length, None);
            }
            Fault::Slow(one, other, by, length) => {
                self.network.disturb(one, other, self.now + length, Some(by));
                self.network.disturb(other, one, self.now + length, Some(by));
            }
            Fault::Reset(one, other) => {
                let told = self.network.reset(self.now, one, other);
                self.put_sent(told);
            }
            Fault::Join(number) => self.want(Node::Worker(number), Duration::ZERO),
            Fault::Leave(number) => {
                // One is left: a run without workers does not end. And a run begins with as many as it was told to.
                let node = Node::Worker(number);
                let has_begun = self.begun_by.is_some_and(|process| self.is_alive(process));
                if has_begun && self.wanted.len() > 2 && self.wanted.remove(&node) {
                    self.kill(node);
                }
            }
            Fault::Drain => {
                if let Some(host) = &mut self.host {
                    host.signal();
                    self.after_host().await;
                }
            }
        }
    }
}

/// What a parcel holds, for people.
fn content(wire: Wire, parcel: &Parcel) -> String {
    let Parcel::Frame(frame) = parcel else { return "the connection ends".to_owned() };
    if let Ok((header, _)) = BulkHeader::decode(frame) {
        return format!("{header:?}");
    }
    let mut text = match wire.to.node {
        Node::Coordinator => format!("{:?}", decode::<ToCoordinator>(frame.clone())),
        Node::Worker(_) => format!("{:?}", decode::<ToWorker>(frame.clone())),
    };
    if let Some((end, _)) = text.char_indices().nth(200) {
        text.truncate(end);
    }
    text
}
