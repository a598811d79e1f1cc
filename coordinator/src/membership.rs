//! Who trains: a pure state machine without sockets, clocks or await.
//!
//! Events go in, actions come out, together with the reason in words: the reason is what the log shows and what
//! tests assert on.
//!
//! The fleet is elastic. A generation forms from whoever is there; it ends when a member is lost, when its members lose
//! each other, or when another worker is to be admitted. Its members then rest, each in the state after some whole step,
//! and the next generation goes on from the most advanced of these states. Only when no worker is left that holds one does
//! the run go back to what the disk has.
//!
//! Workers that have lost the coordinator, not each other, come back with what they hold. If all members of the last
//! generation do, and still work in it, they go on in it as if nothing had happened; else those that came stop, and the
//! next generation forms from what they hold.
//!
//! Where shards are dealt by speed, a generation also ends when another deal would make its steps clearly shorter.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use protocol::job::Balance;
use protocol::message::{Generation, Member, WorkerId};
use protocol::problem::Problem;

use self::balance::{Balancing, paced};
use self::gathering::{form, gathered};
use crate::paces::Pace;
use crate::stage::Stage;

/// Gathering takes this long before it is worth a word to the user.
const NOTICE_AFTER: Duration = Duration::from_secs(10);

/// When all workers were lost, so many as there were at first are waited for no longer than this.
const GATHER_LIMIT: Duration = Duration::from_secs(10);

/// Workers that hold something of the run and have lost the coordinator have this long to come back: from the moment at
/// which they can, and from that at which the first of them does.
pub(crate) const RETURN_LIMIT: Duration = Duration::from_secs(5);

/// When members have lost each other, the control connection of whoever caused it has this long to say so.
const BROKEN_GRACE: Duration = Duration::from_millis(300);

/// A member that was told to drop its step and has not stopped after so long hangs. Above the time of any step.
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// Generations in a row that may break before they have done a step.
const IN_VAIN_LIMIT: u32 = 3;

/// What to do when a run has ended for a reason that may not come again.
pub(crate) const GO_ON: &str = "start the same command again to go on from the newest checkpoint";

const OTHER_BUILD: &str = "build the version that wrote the run, or give --fresh to start over";

/// The fleet as the coordinator sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Membership {
    /// Workers that the first generation waits for.
    expected: u32,
    /// Shards to spread over them.
    shards: u32,
    balancing: Balancing,
    /// All that are connected, in the order in which they came.
    workers: BTreeMap<WorkerId, Candidate>,
    /// The states of workers that rest, members or not.
    states: BTreeMap<WorkerId, Stage>,
    /// The members of the last generation that are still connected, by rank.
    members: Vec<WorkerId>,
    /// The last generation that was formed.
    generation: Generation,
    /// How many members it had; 0 if none of them can be waited for.
    world_size: u32,
    phase: Phase,
    /// When the phase began.
    since: Duration,
    last_notice: Duration,
    /// A generation was formed.
    has_begun: bool,
    /// The state that the last generation began with, if its members held one.
    formed_from: Option<Stage>,
    in_vain: InVain,
    /// What the state to go on from was computed with, if there is such a state and it is known.
    recorded_bits: Option<String>,
    /// Workers sent away because they compute with something else.
    refused: u32,
}

/// Nobody, and nothing to do.
impl Default for Membership {
    fn default() -> Self {
        Self::new(0, 0, (0, 0), None)
    }
}

/// A worker that could be a member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Its name for people.
    pub name: String,
    /// `HOST:PORT` of its data plane.
    pub address: String,
    /// Everything its bits depend on.
    pub bits: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    /// Nobody trains; the next generation forms when enough workers are there, unless all of the last come back.
    Gathering(Returned),
    /// A generation exists; `waiting` members have not yet connected to their peers.
    Formed { waiting: Vec<WorkerId> },
    /// The generation is over; `at_work` members have not yet said so.
    Stopping {
        at_work: Vec<WorkerId>,
        why: String,
        /// Nobody knows whose fault it is yet.
        is_blameless: bool,
        /// When the members were told to drop their step, if they were.
        aborted: Option<Duration>,
    },
    /// The run is ending; who leaves now may.
    Ending,
}

/// Who has come back of the last generation, and still works in it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Returned {
    /// By rank.
    places: BTreeMap<u32, WorkerId>,
    /// Those of them whose connections to their peers stand.
    connected: BTreeSet<WorkerId>,
    /// When the first came that holds anything.
    since: Option<Duration>,
}

/// What a worker holds that comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holds {
    /// Nothing of use.
    Nothing,
    /// The place of this rank in the last generation, in which it still works.
    Place(u32),
    /// A state, and it rests.
    State(Stage),
}

/// Generations that broke before they had done a step, one after another.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct InVain {
    count: u32,
    /// Why the first of them broke.
    cause: String,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A worker said hello.
    Joined(WorkerId, Candidate, Holds),
    /// A worker's connection ended.
    Left(WorkerId, String),
    /// A member has connected to all its peers.
    Connected(WorkerId, Generation),
    /// A member has stopped before the run's end.
    Stopped {
        /// The worker.
        id: WorkerId,
        /// The generation that it has left.
        generation: Generation,
        /// The state that it holds, if any.
        state: Option<Stage>,
        /// Why, if nobody asked for it.
        broken: Option<String>,
    },
    /// A window has passed: how fast the members of the generation compute.
    Paces(BTreeMap<WorkerId, Pace>),
    /// A worker that is no member has left the generation in which it worked when it came back, and rests with this state.
    Rests(WorkerId, Option<Stage>),
    /// All members have stopped for good, or the run is being given up.
    Ending,
    /// Time has passed.
    Tick,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Send the worker away with this sentence.
    Refuse(WorkerId, String),
    /// Close the connection of a worker; that it is lost, and why, is the next event.
    Evict(WorkerId, String),
    /// Tell the worker what the run is.
    Welcome(WorkerId),
    /// Tell the worker that it is not needed now.
    StandBy(WorkerId),
    /// Send the worker the batches that it lacks in its place in the last generation.
    Feed(WorkerId),
    /// All members of this generation are back, by rank, and go on.
    Adopt(Generation, Vec<WorkerId>),
    /// Form this generation.
    Form(Generation, Vec<Member>, Source),
    /// Tell these workers to stop after a step, all after the same one.
    Pause(Generation, Vec<WorkerId>),
    /// Tell these workers to drop the partial step of this generation.
    Abort(Generation, Vec<WorkerId>),
    /// Give the run up.
    Fail(Problem),
    /// Tell the user.
    Notice(String),
}

/// The state that a generation goes on from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// No worker has one: the newest on the disk, or that of step 0.
    Disk,
    /// All members hold it.
    Kept(Stage),
    /// The member of this rank holds it, others do not.
    Member(u32, Stage),
}

/// The state after an event, what to do, and why.
pub type Decision = (Membership, Vec<Action>, String);

/// What decides: [`membership`].
pub type Decide = fn(Duration, Membership, Event) -> Decision;

impl Membership {
    /// A run that waits for `expected` workers to share `shards` shards. Generations are numbered from
    /// `last_generation + 1`; that one had `world_size` members which may still be there, or 0. `recorded_bits` is what the state that the run goes on from was computed with, where
    /// there is one and that is known.
    pub fn new(
        expected: u32,
        shards: u32,
        (last_generation, world_size): (Generation, u32),
        recorded_bits: Option<String>,
    ) -> Self {
        Self {
            expected,
            shards,
            balancing: Balancing::new(Balance::Even),
            workers: BTreeMap::new(),
            states: BTreeMap::new(),
            members: Vec::new(),
            generation: last_generation,
            world_size,
            phase: Phase::Gathering(Returned::default()),
            since: Duration::ZERO,
            last_notice: Duration::ZERO,
            has_begun: false,
            formed_from: None,
            in_vain: InVain::default(),
            recorded_bits,
            refused: 0,
        }
    }

    /// Shards are dealt in this way.
    pub fn with_balance(self, balance: Balance) -> Self {
        Self { balancing: Balancing::new(balance), ..self }
    }

    /// Everything that the workers' bits depend on, equal for all of them; `None` while there is none.
    pub fn bits(&self) -> Option<&str> {
        self.workers.values().next().map(|worker| worker.bits.as_str())
    }

    /// Members of the last generation that are connected, or connected again, by rank; empty before there is one.
    pub fn members(&self) -> &[WorkerId] {
        &self.members
    }

    /// What the fleet is at, in a word for the log.
    pub fn phase(&self) -> &'static str {
        match &self.phase {
            Phase::Gathering(_) => "gathering",
            Phase::Formed { waiting } if waiting.is_empty() => "training",
            Phase::Formed { .. } => "forming",
            Phase::Stopping { aborted: None, is_blameless: false, .. } => "admission",
            Phase::Stopping { .. } => "recovery",
            Phase::Ending => "ending",
        }
    }

    /// Workers connected, whether members or not.
    pub fn connected(&self) -> usize {
        self.workers.len()
    }

    fn name(&self, id: WorkerId) -> String {
        self.workers.get(&id).map_or_else(|| format!("number {id}"), |worker| worker.name.clone())
    }

    /// Those that are no members.
    fn others(&self) -> impl Iterator<Item = WorkerId> + '_ {
        self.workers.keys().copied().filter(|id| !self.members.contains(id))
    }

    fn enter(&mut self, phase: Phase, now: Duration) {
        (self.phase, self.since) = (phase, now);
    }
}

/// What follows from an event at time `now` (since the coordinator's start). The state is taken, not copied: of a large
/// fleet it is large.
pub fn membership(now: Duration, state: Membership, event: Event) -> Decision {
    let mut next = state;
    match event {
        Event::Joined(id, candidate, holds) => joined(next, now, id, candidate, holds),
        Event::Left(id, cause) => left(next, now, id, &cause),
        Event::Connected(id, generation) => {
            if generation != next.generation {
                return (next, vec![], format!("worker {id} connected in the stale generation {generation}"));
            }
            let waiting = match &mut next.phase {
                Phase::Formed { waiting } => waiting,
                Phase::Gathering(returned) => {
                    returned.connected.insert(id);
                    return (next, vec![], format!("worker {id} is back and connected to its peers"));
                }
                _ => return (next, vec![], format!("worker {id} connected while no generation exists")),
            };
            waiting.retain(|&other| other != id);
            let reason = match waiting.len() {
                0 => format!("generation {generation} is connected and trains"),
                left => format!("generation {generation} waits for {left} more members to connect"),
            };
            (next, vec![], reason)
        }
        Event::Stopped { id, generation, state, broken } => {
            if generation != next.generation || !next.members.contains(&id) {
                return (next, vec![], format!("worker {id} stopped in the stale generation {generation}"));
            }
            next.states.remove(&id);
            next.states.extend(state.map(|stage| (id, stage)));
            stopped(next, now, id, broken)
        }
        Event::Paces(window) => paced(next, now, &window),
        Event::Rests(id, state) => rests(next, now, id, state),
        Event::Ending => {
            next.enter(Phase::Ending, now);
            (next, vec![], "the run is ending".into())
        }
        Event::Tick => tick(next, now),
    }
}

fn joined(mut next: Membership, now: Duration, id: WorkerId, candidate: Candidate, holds: Holds) -> Decision {
    if let Some(recorded) = next.recorded_bits.as_ref().filter(|recorded| **recorded != candidate.bits) {
        let sentence = format!(
            "this run was computed with {recorded}, worker {} computes with {}: going on would change the result",
            candidate.name, candidate.bits
        );
        return other_build(next, id, sentence);
    }
    // All that are here have the same.
    if let Some(other) = next.workers.values().next().filter(|other| other.bits != candidate.bits) {
        let sentence = format!(
            "worker {} computes other bits ({}) than worker {} ({}): the result would depend on the fleet",
            candidate.name, candidate.bits, other.name, other.bits
        );
        return (next, vec![Action::Refuse(id, sentence.clone())], sentence);
    }
    let name = candidate.name.clone();
    next.workers.insert(id, candidate);
    if let Holds::State(stage) = holds {
        next.states.insert(id, stage);
    }
    if let Phase::Gathering(returned) = &mut next.phase {
        let mut actions = vec![Action::Welcome(id)];
        match holds {
            Holds::Place(rank) if rank < next.world_size && !returned.places.contains_key(&rank) => {
                returned.places.insert(rank, id);
                returned.since.get_or_insert(now);
                next.members = returned.places.values().copied().collect();
                actions.push(Action::Feed(id));
            }
            Holds::State(_) => drop(returned.since.get_or_insert(now)),
            Holds::Place(_) | Holds::Nothing => {}
        }
        return gathered(next, now, actions);
    }
    if let (Phase::Stopping { at_work, .. }, Holds::Place(_)) = (&mut next.phase, holds) {
        // It was a member until its connection broke, and may have gone further than the others.
        at_work.push(id);
    }
    (next, vec![Action::Welcome(id), Action::StandBy(id)], format!("worker {name} stands by"))
}

fn rests(mut next: Membership, now: Duration, id: WorkerId, state: Option<Stage>) -> Decision {
    if next.members.contains(&id) || !next.workers.contains_key(&id) {
        return (next, vec![], format!("worker {id} rested too late to matter"));
    }
    next.states.extend(state.map(|stage| (id, stage)));
    if let Phase::Stopping { at_work, .. } = &mut next.phase {
        at_work.retain(|&other| other != id);
        return rest(next, now, vec![]);
    }
    let reason = format!("worker {} rests while others train", next.name(id));
    (next, vec![], reason)
}

/// Refuses a worker that would change the result. When that befell as many as the run waits for, and nobody else
/// is there, it would wait in vain.
fn other_build(mut next: Membership, id: WorkerId, sentence: String) -> Decision {
    next.refused += 1;
    let mut actions = vec![Action::Refuse(id, sentence.clone())];
    let is_hopeless = !next.has_begun && next.workers.is_empty() && next.refused >= next.expected;
    if is_hopeless && matches!(next.phase, Phase::Gathering(_)) {
        next.phase = Phase::Ending;
        actions.push(Action::Fail(Problem::failed(sentence.clone()).hint(OTHER_BUILD)));
    }
    (next, actions, sentence)
}

fn left(mut next: Membership, now: Duration, id: WorkerId, cause: &str) -> Decision {
    let name = next.name(id);
    next.workers.remove(&id);
    next.states.remove(&id);
    next.balancing.forget(id);
    let was_member = next.members.contains(&id);
    next.members.retain(|&member| member != id);
    let lost = format!("worker {name} was lost: {cause}");
    match &mut next.phase {
        Phase::Ending => (next, vec![], format!("worker {name} is gone, as expected")),
        Phase::Gathering(returned) => {
            returned.places.retain(|_, other| *other != id);
            (next, vec![], format!("worker {name} left while others are waited for: {cause}"))
        }
        Phase::Formed { .. } if was_member => {
            let at_work = next.members.clone();
            let actions = vec![Action::Notice(lost.clone()), Action::Abort(next.generation, at_work.clone())];
            next.enter(Phase::Stopping { at_work, why: lost, is_blameless: false, aborted: Some(now) }, now);
            rest(next, now, actions)
        }
        Phase::Stopping { at_work, why, is_blameless, aborted } if was_member => {
            at_work.retain(|&member| member != id);
            let mut actions = vec![Action::Notice(lost.clone())];
            (*why, *is_blameless) = (lost, false);
            if aborted.is_none() {
                *aborted = Some(now);
                actions.push(Action::Abort(next.generation, at_work.clone()));
            }
            rest(next, now, actions)
        }
        Phase::Stopping { at_work, .. } => {
            at_work.retain(|&other| other != id);
            rest(next, now, vec![])
        }
        Phase::Formed { .. } => (next, vec![], format!("worker {name} left the standby: {cause}")),
    }
}

fn stopped(mut next: Membership, now: Duration, id: WorkerId, broken: Option<String>) -> Decision {
    let name = next.name(id);
    let cause = broken.map(|cause| format!("worker {name}: {cause}"));
    match &mut next.phase {
        Phase::Formed { .. } => {
            let at_work: Vec<WorkerId> = next.members.iter().copied().filter(|&other| other != id).collect();
            let actions = vec![Action::Abort(next.generation, at_work.clone())];
            let why = cause.unwrap_or_else(|| format!("worker {name} stopped"));
            next.enter(Phase::Stopping { at_work, why, is_blameless: true, aborted: Some(now) }, now);
            rest(next, now, actions)
        }
        Phase::Stopping { at_work, aborted, .. } => {
            at_work.retain(|&other| other != id);
            let mut actions = Vec::new();
            if cause.is_some() && aborted.is_none() {
                // The others wait in vain for the step after which they were to pause.
                *aborted = Some(now);
                actions.push(Action::Abort(next.generation, at_work.clone()));
            }
            rest(next, now, actions)
        }
        Phase::Gathering(returned) => {
            returned.places.retain(|_, other| *other != id);
            next.members.retain(|&member| member != id);
            gathered(next, now, vec![])
        }
        Phase::Ending => (next, vec![], format!("worker {name} has stopped")),
    }
}

/// Goes on to the next generation once all members of the last one rest.
fn rest(mut next: Membership, now: Duration, actions: Vec<Action>) -> Decision {
    let Phase::Stopping { at_work, why, is_blameless, .. } = &next.phase else {
        return (next, actions, String::new());
    };
    if !at_work.is_empty() {
        let reason = format!("{why}; {} members have not stopped yet", at_work.len());
        return (next, actions, reason);
    }
    if *is_blameless && now < next.since + BROKEN_GRACE {
        let reason = format!("{why}; whoever caused it may say so");
        return (next, actions, reason);
    }
    let is_in_vain = next.states.values().max() == next.formed_from.as_ref();
    next.in_vain = match (*is_blameless && is_in_vain, std::mem::take(&mut next.in_vain)) {
        (false, _) => InVain::default(),
        (true, InVain { count: 0, .. }) => InVain { count: 1, cause: why.clone() },
        (true, InVain { count, cause }) => InVain { count: count + 1, cause },
    };
    if next.in_vain.count > IN_VAIN_LIMIT {
        let sentence =
            format!("{} generations broke without a step: {}", next.in_vain.count, next.in_vain.cause);
        let mut actions = actions;
        actions.push(Action::Fail(Problem::failed(sentence.clone()).hint(GO_ON)));
        next.enter(Phase::Ending, now);
        return (next, actions, sentence);
    }
    next.enter(Phase::Gathering(Returned::default()), now);
    match next.states.is_empty() {
        true => gathered(next, now, actions),
        false => form(next, now, actions),
    }
}

fn tick(mut next: Membership, now: Duration) -> Decision {
    match &next.phase {
        Phase::Stopping { at_work, .. } if at_work.is_empty() => rest(next, now, vec![]),
        Phase::Stopping { at_work, aborted: Some(aborted), .. } if now >= *aborted + STOP_LIMIT => {
            let evict = |&id: &WorkerId| {
                Action::Evict(id, format!("it did not stop within {} s", STOP_LIMIT.as_secs()))
            };
            let actions = at_work.iter().map(evict).collect();
            (next, actions, "members that do not stop are not waited for".into())
        }
        Phase::Formed { waiting }
            if waiting.is_empty()
                && next.workers.len() > next.members.len()
                && (next.members.len() as u32) < next.shards =>
        {
            let names: Vec<String> = next.others().map(|id| next.name(id)).collect();
            let why = format!("worker {} joins", names.join(", "));
            pause(next, now, why)
        }
        Phase::Gathering(_) => {
            let mut actions = Vec::new();
            if now >= next.last_notice + NOTICE_AFTER && now >= next.since + NOTICE_AFTER {
                next.last_notice = now;
                let (here, expected) = (next.workers.len(), next.expected);
                actions.push(Action::Notice(format!("waiting for workers: {here} of {expected} are here")));
            }
            gathered(next, now, actions)
        }
        _ => (next, vec![], String::new()),
    }
}

/// Ends the generation that trains, after a step.
fn pause(mut next: Membership, now: Duration, why: String) -> Decision {
    let at_work = next.members.clone();
    let actions = vec![Action::Pause(next.generation, at_work.clone())];
    next.enter(Phase::Stopping { at_work, why: why.clone(), is_blameless: false, aborted: None }, now);
    (next, actions, why)
}

mod balance;
#[cfg(test)]
pub(crate) mod broken;
mod gathering;
#[cfg(test)]
mod tests;
