//! Who trains: a pure state machine without sockets, clocks or await.
//!
//! Events go in, actions come out, together with the reason in words: the reason is what the log shows and what
//! tests assert on. Today the fleet is static: the generation forms when the expected number of workers is there,
//! and losing one of its members ends the run. Surviving that is a matter of other decisions on the same events.

use std::collections::BTreeMap;
use std::time::Duration;

use protocol::message::{Generation, Member, WorkerId};
use protocol::problem::Problem;
use protocol::slots::shards_of_rank;

/// Gathering takes this long before it is worth a word to the user.
const NOTICE_AFTER: Duration = Duration::from_secs(10);

/// What to do when a run has ended for a reason that may not come again.
pub(crate) const GO_ON: &str = "start the same command again to go on from the newest checkpoint";

const OTHER_BUILD: &str = "build the version that wrote the run, or give --fresh to start over";

/// The fleet as the coordinator sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Membership {
    /// Workers that the run waits for.
    expected: u32,
    /// Shards to spread over them.
    shards: u32,
    /// All that are connected, in the order in which they came.
    workers: BTreeMap<WorkerId, Candidate>,
    /// The last generation that was formed.
    generation: Generation,
    phase: Phase,
    last_notice: Duration,
    /// What the state to go on from was computed with, if there is such a state and it is known.
    recorded_bits: Option<String>,
    /// Workers sent away because they compute with something else.
    refused: u32,
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
    /// Waiting for workers.
    Gathering,
    /// A generation exists; `waiting` members have not yet connected to their peers.
    Formed { members: Vec<WorkerId>, waiting: Vec<WorkerId> },
    /// The run is ending; who leaves now may.
    Ending,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A worker said hello.
    Joined(WorkerId, Candidate),
    /// A worker's connection ended.
    Left(WorkerId, String),
    /// A member has connected to all its peers.
    Connected(WorkerId, Generation),
    /// All members have stopped, or the run is being given up.
    Ending,
    /// Time has passed.
    Tick,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Send the worker away with this sentence.
    Refuse(WorkerId, String),
    /// Tell the worker what the run is.
    Welcome(WorkerId),
    /// Tell the worker that it is not needed now.
    StandBy(WorkerId),
    /// Form this generation.
    Form(Generation, Vec<Member>),
    /// Tell these workers to drop the partial step of this generation.
    Abort(Generation, Vec<WorkerId>),
    /// Give the run up.
    Fail(Problem),
    /// Tell the user.
    Notice(String),
}

/// The state after an event, what to do, and why.
pub type Decision = (Membership, Vec<Action>, String);

impl Membership {
    /// A run that waits for `expected` workers to share `shards` shards. Generations are numbered from
    /// `last_generation + 1`. `recorded_bits` is what the state that the run goes on from was computed with, where
    /// there is one and that is known.
    pub fn new(
        expected: u32,
        shards: u32,
        last_generation: Generation,
        recorded_bits: Option<String>,
    ) -> Self {
        Self {
            expected,
            shards,
            workers: BTreeMap::new(),
            generation: last_generation,
            phase: Phase::Gathering,
            last_notice: Duration::ZERO,
            recorded_bits,
            refused: 0,
        }
    }

    /// Everything that the workers' bits depend on, equal for all of them; `None` while there is none.
    pub fn bits(&self) -> Option<&str> {
        self.workers.values().next().map(|worker| worker.bits.as_str())
    }

    /// Members of the generation, by rank; empty before there is one.
    pub fn members(&self) -> &[WorkerId] {
        if let Phase::Formed { members, .. } = &self.phase { members } else { &[] }
    }

    /// Workers connected, whether members or not.
    pub fn connected(&self) -> usize {
        self.workers.len()
    }

    fn name(&self, id: WorkerId) -> String {
        self.workers.get(&id).map_or_else(|| format!("number {id}"), |worker| worker.name.clone())
    }
}

/// What follows from an event at time `now` (since the coordinator's start).
pub fn membership(now: Duration, state: &Membership, event: Event) -> Decision {
    let mut next = state.clone();
    match event {
        Event::Joined(id, candidate) => joined(next, id, candidate),
        Event::Left(id, cause) => left(next, id, &cause),
        Event::Connected(id, generation) => {
            if generation != next.generation {
                return (next, vec![], format!("worker {id} connected in the stale generation {generation}"));
            }
            let Phase::Formed { waiting, .. } = &mut next.phase else {
                return (next, vec![], format!("worker {id} connected while no generation exists"));
            };
            waiting.retain(|&other| other != id);
            let reason = match waiting.len() {
                0 => format!("generation {generation} is connected and trains"),
                left => format!("generation {generation} waits for {left} more members to connect"),
            };
            (next, vec![], reason)
        }
        Event::Ending => {
            next.phase = Phase::Ending;
            (next, vec![], "the run is ending".into())
        }
        Event::Tick => {
            if next.phase != Phase::Gathering || now < next.last_notice + NOTICE_AFTER {
                return (next, vec![], String::new());
            }
            next.last_notice = now;
            let notice = format!("waiting for workers: {} of {} are here", next.workers.len(), next.expected);
            (next, vec![Action::Notice(notice)], "gathering takes long".into())
        }
    }
}

fn joined(mut next: Membership, id: WorkerId, candidate: Candidate) -> Decision {
    if let Some(recorded) = next.recorded_bits.as_ref().filter(|recorded| **recorded != candidate.bits) {
        let sentence = format!(
            "this run was computed with {recorded}, worker {} computes with {}: going on would change the result",
            candidate.name, candidate.bits
        );
        return other_build(next, id, sentence);
    }
    if let Some(other) = next.workers.values().find(|other| other.bits != candidate.bits) {
        let sentence = format!(
            "worker {} computes other bits ({}) than worker {} ({}): the result would depend on the fleet",
            candidate.name, candidate.bits, other.name, other.bits
        );
        return (next, vec![Action::Refuse(id, sentence.clone())], sentence);
    }
    let name = candidate.name.clone();
    next.workers.insert(id, candidate);
    if next.phase != Phase::Gathering {
        let actions = vec![Action::Welcome(id), Action::StandBy(id)];
        return (next, actions, format!("worker {name} stands by: the fleet is complete"));
    }
    if (next.workers.len() as u32) < next.expected {
        let reason = format!("worker {name} is here: {} of {}", next.workers.len(), next.expected);
        return (next, vec![Action::Welcome(id)], reason);
    }
    form(next, id)
}

/// Refuses a worker that would change the result. When that befell as many as the run waits for, and nobody else
/// is there, it would wait in vain.
fn other_build(mut next: Membership, id: WorkerId, sentence: String) -> Decision {
    next.refused += 1;
    let mut actions = vec![Action::Refuse(id, sentence.clone())];
    let is_hopeless = next.workers.is_empty() && next.refused >= next.expected;
    if is_hopeless && next.phase == Phase::Gathering {
        next.phase = Phase::Ending;
        actions.push(Action::Fail(Problem::failed(sentence.clone()).hint(OTHER_BUILD)));
    }
    (next, actions, sentence)
}

/// Gives the first workers contiguous ranges of shards; the rest stand by.
fn form(mut next: Membership, last: WorkerId) -> Decision {
    next.generation += 1;
    let world_size = next.expected.min(next.shards);
    let ids: Vec<WorkerId> = next.workers.keys().copied().collect();
    let (members, surplus) = ids.split_at(world_size as usize);
    let placed = members
        .iter()
        .zip(0..)
        .map(|(&id, rank)| {
            let worker = &next.workers[&id];
            Member {
                worker_id: id,
                name: worker.name.clone(),
                address: worker.address.clone(),
                shards: shards_of_rank(next.shards, world_size, rank),
            }
        })
        .collect();
    let mut actions = vec![Action::Welcome(last)];
    actions.extend(surplus.iter().map(|&id| Action::StandBy(id)));
    if !surplus.is_empty() {
        actions.push(Action::Notice(format!(
            "{} of {} workers stand by: there are only {} shards (hint: --shards {})",
            surplus.len(),
            ids.len(),
            next.shards,
            ids.len()
        )));
    }
    actions.push(Action::Form(next.generation, placed));
    next.phase = Phase::Formed { members: members.to_vec(), waiting: members.to_vec() };
    let who = if world_size == 1 { "1 worker has".to_owned() } else { format!("{world_size} workers share") };
    let reason = format!("generation {}: {who} {} shards", next.generation, next.shards);
    (next, actions, reason)
}

fn left(mut next: Membership, id: WorkerId, cause: &str) -> Decision {
    let name = next.name(id);
    next.workers.remove(&id);
    match &next.phase {
        Phase::Formed { members, .. } if members.contains(&id) => {
            let survivors = members.iter().copied().filter(|&other| other != id).collect();
            let sentence = format!("worker {name} was lost: {cause}");
            let problem = Problem::failed(sentence.clone()).hint(GO_ON);
            let actions = vec![Action::Abort(next.generation, survivors), Action::Fail(problem)];
            next.phase = Phase::Ending;
            (next, actions, sentence)
        }
        Phase::Formed { .. } => (next, vec![], format!("worker {name} left the standby: {cause}")),
        Phase::Gathering => (next, vec![], format!("worker {name} left before the start: {cause}")),
        Phase::Ending => (next, vec![], format!("worker {name} is gone, as expected")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(id: WorkerId) -> Candidate {
        Candidate { name: format!("w{id}"), address: format!("10.0.0.{id}:7"), bits: "cpu 1".into() }
    }

    /// Plays events and gives the final state, all actions, and the last reason.
    fn play(mut state: Membership, events: Vec<Event>) -> Decision {
        let (mut all, mut reason) = (Vec::new(), String::new());
        for event in events {
            let (next, actions, why) = membership(Duration::from_secs(1), &state, event);
            (state, reason) = (next, why);
            all.extend(actions);
        }
        (state, all, reason)
    }

    fn join(ids: std::ops::RangeInclusive<WorkerId>) -> Vec<Event> {
        ids.map(|id| Event::Joined(id, candidate(id))).collect()
    }

    #[test]
    fn a_generation_forms_when_all_are_there() {
        let (state, actions, reason) = play(Membership::new(3, 8, 4, None), join(1..=3));
        let [.., Action::Welcome(3), Action::Form(5, members)] = &actions[..] else { panic!("{actions:?}") };
        let shards: Vec<_> = members.iter().map(|m| m.shards.clone()).collect();
        assert_eq!(shards, [0..2, 2..5, 5..8]);
        assert_eq!(reason, "generation 5: 3 workers share 8 shards");
        assert_eq!(state.members(), [1, 2, 3]);
    }

    #[test]
    fn surplus_workers_stand_by_with_a_hint() {
        let (state, actions, _) = play(Membership::new(8, 7, 0, None), join(1..=8));
        assert_eq!(actions[7..9], [Action::Welcome(8), Action::StandBy(8)]);
        let Action::Notice(notice) = &actions[9] else { panic!("{actions:?}") };
        assert_eq!(notice, "1 of 8 workers stand by: there are only 7 shards (hint: --shards 8)");
        assert_eq!(state.members().len(), 7);
        let (_, actions, reason) = play(state, vec![Event::Left(8, "gone".into())]);
        assert_eq!((actions.len(), reason.as_str()), (0, "worker w8 left the standby: gone"));
    }

    #[test]
    fn losing_a_member_ends_the_run_and_names_it() {
        let mut events = join(1..=2);
        events.extend([Event::Connected(1, 1), Event::Connected(2, 1)]);
        let (state, _, reason) = play(Membership::new(2, 8, 0, None), events);
        assert_eq!(reason, "generation 1 is connected and trains");
        let (state, actions, _) = play(state, vec![Event::Left(2, "connection reset".into())]);
        let sentence = "worker w2 was lost: connection reset".to_owned();
        let problem = Problem::failed(sentence).hint(GO_ON);
        assert_eq!(actions, [Action::Abort(1, vec![1]), Action::Fail(problem)]);
        let (_, actions, reason) = play(state, vec![Event::Left(1, "closed".into())]);
        assert_eq!((actions.len(), reason.as_str()), (0, "worker w1 is gone, as expected"));
    }

    #[test]
    fn a_worker_of_other_bits_is_refused_with_both_values() {
        let mut other = candidate(2);
        other.bits = "cuda sm_90".into();
        let (state, actions, _) = play(
            Membership::new(2, 8, 0, None),
            vec![Event::Joined(1, candidate(1)), Event::Joined(2, other)],
        );
        let [Action::Welcome(1), Action::Refuse(2, sentence)] = &actions[..] else { panic!("{actions:?}") };
        assert!(sentence.contains("cuda sm_90") && sentence.contains("cpu 1"), "{sentence}");
        assert_eq!(state.connected(), 1);
    }

    #[test]
    fn a_state_is_gone_on_with_only_by_what_computed_it() {
        let sentence = |id: WorkerId| {
            format!(
                "this run was computed with cpu 1, worker w{id} computes with cpu 2: going on would change the \
                 result"
            )
        };
        let refuse = |id| Action::Refuse(id, sentence(id));
        let fail = |id| Action::Fail(Problem::failed(sentence(id)).hint(OTHER_BUILD));
        let welcome = Action::Welcome;
        // What is recorded, whose words come one after another, and what follows until the first generation.
        let cases: [(Option<&str>, &[&str], Vec<Action>); 6] = [
            (None, &["cpu 2"], vec![welcome(1)]),
            (Some("cpu 1"), &["cpu 1"], vec![welcome(1)]),
            (Some("cpu 1"), &["cpu 2"], vec![refuse(1)]),
            (Some("cpu 1"), &["cpu 2", "cpu 2"], vec![refuse(1), refuse(2), fail(2)]),
            // One that fits may be followed by another.
            (Some("cpu 1"), &["cpu 1", "cpu 2", "cpu 2"], vec![welcome(1), refuse(2), refuse(3)]),
            (Some("cpu 1"), &["cpu 2", "cpu 1", "cpu 2"], vec![refuse(1), welcome(2), refuse(3)]),
        ];
        for (recorded, words, expected) in cases {
            let events = words
                .iter()
                .zip(1..)
                .map(|(bits, id)| Event::Joined(id, Candidate { bits: (*bits).to_owned(), ..candidate(id) }));
            let state = Membership::new(2, 8, 4, recorded.map(str::to_owned));
            let (_, actions, _) = play(state, events.collect());
            assert_eq!(actions, expected, "recorded {recorded:?}, came {words:?}");
        }
    }

    #[test]
    fn who_leaves_before_the_start_is_waited_for_again() {
        let mut events = join(1..=1);
        events.push(Event::Left(1, "gone".into()));
        events.extend(join(2..=3));
        let (state, actions, _) = play(Membership::new(2, 8, 0, None), events);
        assert_eq!(actions.len(), 4, "three welcomes and a generation");
        assert_eq!(state.members(), [2, 3]);
    }

    #[test]
    fn long_gathering_is_noticed_every_ten_seconds() {
        let state = Membership::new(2, 8, 0, None);
        let (state, actions, _) = membership(Duration::from_secs(9), &state, Event::Tick);
        assert_eq!(actions, []);
        let (state, actions, _) = membership(Duration::from_secs(10), &state, Event::Tick);
        assert_eq!(actions, [Action::Notice("waiting for workers: 0 of 2 are here".into())]);
        assert_eq!(membership(Duration::from_secs(15), &state, Event::Tick).1, []);
    }
}
