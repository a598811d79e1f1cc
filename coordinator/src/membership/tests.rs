//! Decisions played event by event, and a property over whatever may happen.

use super::*;
use proptest::prelude::*;

mod by_speed;
mod returning;

fn candidate(id: WorkerId) -> Candidate {
    Candidate { name: format!("w{id}"), address: format!("10.0.0.{id}:7"), bits: "cpu 1".into() }
}

const SOON: Duration = Duration::from_secs(1);

/// Plays events, all one second after the start, and gives the final state, all actions, and the last reason.
fn play(state: Membership, events: Vec<Event>) -> Decision {
    play_at(SOON, state, events)
}

fn play_at(now: Duration, mut state: Membership, events: Vec<Event>) -> Decision {
    let (mut all, mut reason) = (Vec::new(), String::new());
    for event in events {
        let (next, actions, why) = membership(now, state, event);
        (state, reason) = (next, why);
        all.extend(actions);
    }
    (state, all, reason)
}

fn join(ids: std::ops::RangeInclusive<WorkerId>) -> Vec<Event> {
    ids.map(|id| Event::Joined(id, candidate(id), Holds::Nothing)).collect()
}

fn at(step: u64) -> Stage {
    Stage { step, whole: true }
}

fn stopped(id: WorkerId, generation: Generation, step: u64) -> Event {
    Event::Stopped { id, generation, state: Some(at(step)), broken: None }
}

fn broken(id: WorkerId, generation: Generation, step: u64, cause: &str) -> Event {
    Event::Stopped { id, generation, state: Some(at(step)), broken: Some(cause.into()) }
}

fn lost(id: WorkerId) -> Event {
    Event::Left(id, "connection reset".into())
}

/// A fleet that trains in its first generation.
fn trains(workers: u32, shards: u32) -> Membership {
    let mut events = join(1..=workers);
    events.extend((1..=workers).map(|id| Event::Connected(id, 1)));
    let (state, _, reason) = play(Membership::new(workers, shards, (0, 0), None), events);
    assert_eq!(reason, "generation 1 is connected and trains");
    state
}

/// Workers and their shards, and the source, of the generation that the last action forms.
fn formed(actions: &[Action]) -> (Vec<(WorkerId, std::ops::Range<u32>)>, Source) {
    let Some(Action::Form(_, members, source)) = actions.last() else { panic!("{actions:?}") };
    (members.iter().map(|member| (member.worker_id, member.shards.clone())).collect(), *source)
}

#[test]
fn a_generation_forms_when_all_are_there() {
    let (state, actions, reason) = play(Membership::new(3, 8, (4, 0), None), join(1..=3));
    assert_eq!(actions[2], Action::Welcome(3));
    assert_eq!(formed(&actions), (vec![(1, 0..2), (2, 2..5), (3, 5..8)], Source::Disk));
    assert_eq!(reason, "generation 5: 3 workers share 8 shards");
    assert_eq!(state.members(), [1, 2, 3]);
}

#[test]
fn surplus_workers_stand_by_with_a_hint() {
    let (state, actions, _) = play(Membership::new(8, 7, (0, 0), None), join(1..=8));
    assert_eq!(actions[7..9], [Action::Welcome(8), Action::StandBy(8)]);
    let Action::Notice(notice) = &actions[9] else { panic!("{actions:?}") };
    assert_eq!(notice, "1 of 8 workers stand by: there are only 7 shards (hint: --shards 8)");
    assert_eq!(state.members().len(), 7);
    let (state, actions, reason) = play(state, vec![lost(8)]);
    assert_eq!((actions.len(), reason.as_str()), (0, "worker w8 left the standby: connection reset"));
    assert_eq!(play(state, vec![Event::Tick]).1, [], "there is no room for anybody");
}

#[test]
fn survivors_go_on_from_the_most_advanced_state() {
    let (state, actions, reason) = play(trains(3, 8), vec![lost(2)]);
    let notice = Action::Notice("worker w2 was lost: connection reset".into());
    assert_eq!(actions, [notice, Action::Abort(1, vec![1, 3])]);
    assert_eq!(reason, "worker w2 was lost: connection reset; 2 members have not stopped yet");
    let (state, actions, _) = play(state, vec![stopped(1, 1, 41)]);
    assert_eq!(actions, []);
    let (state, actions, reason) = play(state, vec![stopped(3, 1, 42)]);
    assert_eq!(formed(&actions), (vec![(1, 0..4), (3, 4..8)], Source::Member(1, at(42))));
    assert_eq!(reason, "generation 2: 2 workers share 8 shards");
    // The one that is left holds what is needed.
    let (_, actions, _) = play(state, vec![lost(1), stopped(3, 2, 42)]);
    assert_eq!(formed(&actions), (vec![(3, 0..8)], Source::Kept(at(42))));
}

#[test]
fn a_state_that_owes_its_evaluation_is_behind_one_that_does_not() {
    let owes = Stage { step: 9, whole: false };
    let stopped_owing = Event::Stopped { id: 1, generation: 1, state: Some(owes), broken: None };
    let (_, actions, _) = play(trains(3, 8), vec![lost(2), stopped_owing.clone(), stopped(3, 1, 9)]);
    assert_eq!(formed(&actions).1, Source::Member(1, at(9)));
    let (_, actions, _) = play(trains(2, 8), vec![lost(2), stopped_owing]);
    assert_eq!(formed(&actions).1, Source::Kept(owes));
}

#[test]
fn a_worker_that_comes_later_is_admitted_between_two_steps() {
    let (state, actions, reason) = play(trains(2, 8), join(3..=4));
    let welcome = |id| [Action::Welcome(id), Action::StandBy(id)];
    assert_eq!(actions, [welcome(3), welcome(4)].concat());
    assert_eq!(reason, "worker w4 stands by");
    let (state, actions, reason) = play(state, vec![Event::Tick]);
    assert_eq!((&actions[..], reason.as_str()), (&[Action::Pause(1, vec![1, 2])][..], "worker w3, w4 joins"));
    let (_, actions, _) = play(state, vec![Event::Tick, stopped(2, 1, 7), stopped(1, 1, 7)]);
    assert_eq!(
        formed(&actions),
        (vec![(1, 0..2), (2, 2..4), (3, 4..6), (4, 6..8)], Source::Member(0, at(7)))
    );
}

#[test]
fn nobody_is_admitted_before_all_members_are_connected() {
    let (state, ..) = play(Membership::new(2, 8, (0, 0), None), join(1..=3));
    assert_eq!(play(state, vec![Event::Connected(1, 1), Event::Tick]).1, []);
}

#[test]
fn a_member_lost_while_the_others_pause_is_not_waited_for() {
    let mut events = join(3..=3);
    events.extend([Event::Tick, stopped(1, 1, 7), lost(2)]);
    let (_, actions, _) = play(trains(2, 8), events);
    assert!(actions.contains(&Action::Abort(1, vec![])), "{actions:?}");
    assert_eq!(formed(&actions), (vec![(1, 0..4), (3, 4..8)], Source::Member(0, at(7))));
}

#[test]
fn when_all_are_lost_the_run_goes_back_to_the_disk() {
    let (state, actions, _) = play(trains(2, 8), vec![lost(1), lost(2)]);
    assert!(
        !actions.iter().any(|action| matches!(action, Action::Form(..) | Action::Fail(_))),
        "{actions:?}"
    );
    // As many as before are at once enough, fewer only after a while.
    let (_, actions, _) = play(state.clone(), join(3..=4));
    assert_eq!(formed(&actions), (vec![(3, 0..4), (4, 4..8)], Source::Disk));
    let (state, actions, _) = play(state, join(3..=3));
    assert_eq!(actions, [Action::Welcome(3)]);
    let later = |after| play_at(SOON + after, state.clone(), vec![Event::Tick]).1;
    assert_eq!(later(GATHER_LIMIT - Duration::from_millis(1)), []);
    assert_eq!(formed(&later(GATHER_LIMIT)), (vec![(3, 0..8)], Source::Disk));
}

#[test]
fn the_bits_of_the_first_generation_bind_those_that_come_when_all_are_lost() {
    let (state, ..) = play(trains(1, 8), vec![lost(1)]);
    let other = Candidate { bits: "cpu 2".into(), ..candidate(2) };
    let (_, actions, reason) = play(state, vec![Event::Joined(2, other, Holds::Nothing)]);
    assert_eq!(actions, [Action::Refuse(2, reason.clone())]);
    assert!(reason.contains("was computed with cpu 1") && reason.contains("cpu 2"), "{reason}");
}

#[test]
fn who_does_not_stop_is_given_up_unless_it_was_only_asked_to_pause() {
    let (state, ..) = play(trains(3, 8), vec![lost(1), stopped(2, 1, 4)]);
    let later = |after| play_at(SOON + after, state.clone(), vec![Event::Tick]);
    assert_eq!(later(STOP_LIMIT - Duration::from_millis(1)).1, []);
    let (state, actions, _) = later(STOP_LIMIT);
    let cause = "it did not stop within 60 s".to_owned();
    assert_eq!(actions, [Action::Evict(3, cause.clone())]);
    let (_, actions, _) = play(state, vec![Event::Left(3, cause)]);
    assert_eq!(formed(&actions), (vec![(2, 0..8)], Source::Kept(at(4))));

    let (state, ..) = play(trains(2, 8), [join(3..=3), vec![Event::Tick]].concat());
    assert_eq!(play_at(SOON + 10 * STOP_LIMIT, state.clone(), vec![Event::Tick]).1, []);
    // Unless a member breaks meanwhile: then the rest waits for a step that never ends.
    let (state, actions, _) = play(state, vec![broken(1, 1, 4, "why")]);
    assert_eq!(actions, [Action::Abort(1, vec![2])]);
    let (_, actions, _) = play_at(SOON + STOP_LIMIT, state, vec![Event::Tick]);
    assert!(matches!(actions[..], [Action::Evict(2, _)]), "{actions:?}");
}

#[test]
fn members_that_lose_each_other_are_tried_again_but_not_for_ever() {
    let mut state = trains(2, 8);
    let mut now = SOON;
    for generation in 1..=4 {
        let events = vec![broken(2, generation, 5, "the line is cut"), stopped(1, generation, 5)];
        let (next, actions, reason) = play_at(now, state, events);
        assert_eq!(actions, [Action::Abort(generation, vec![1])]);
        assert_eq!(reason, "worker w2: the line is cut; whoever caused it may say so");
        now += BROKEN_GRACE;
        let (next, actions, _) = play_at(now, next, vec![Event::Tick]);
        assert_eq!(formed(&actions).1, Source::Kept(at(5)), "generation {generation}");
        state = next;
    }
    // The first break followed steps, so three were in vain; one that follows a step is forgiven.
    let events = |step| vec![broken(1, 5, step, "other words"), stopped(2, 5, step)];
    let again = |step| {
        let (next, ..) = play_at(now, state.clone(), events(step));
        play_at(now + BROKEN_GRACE, next, vec![Event::Tick]).1
    };
    assert_eq!(formed(&again(6)).1, Source::Kept(at(6)));
    let sentence = "4 generations broke without a step: worker w2: the line is cut";
    assert_eq!(again(5), [Action::Fail(Problem::failed(sentence).hint(GO_ON))]);
}

#[test]
fn a_cause_that_shows_in_time_ends_the_doubt() {
    let events = vec![broken(1, 1, 5, "lost w2"), lost(2)];
    let (_, actions, _) = play(trains(2, 8), events);
    assert_eq!(formed(&actions), (vec![(1, 0..8)], Source::Kept(at(5))));
}

#[test]
fn what_an_older_generation_says_counts_no_more() {
    let (state, ..) = play(trains(3, 8), vec![lost(2), stopped(1, 1, 4), stopped(3, 1, 4)]);
    let late = [stopped(1, 1, 4), Event::Connected(1, 1)];
    for event in late {
        let (next, actions, reason) = play(state.clone(), vec![event]);
        assert_eq!((&next, actions), (&state, vec![]));
        assert!(reason.ends_with("in the stale generation 1"), "{reason}");
    }
}

#[test]
fn once_the_run_is_ending_whoever_leaves_may() {
    let (_, actions, reason) = play(trains(2, 8), vec![Event::Ending, lost(1)]);
    assert_eq!((actions.len(), reason.as_str()), (0, "worker w1 is gone, as expected"));
}

#[test]
fn a_worker_of_other_bits_is_refused_with_both_values() {
    let mut other = candidate(2);
    other.bits = "cuda sm_90".into();
    let (state, actions, _) = play(
        Membership::new(2, 8, (0, 0), None),
        vec![Event::Joined(1, candidate(1), Holds::Nothing), Event::Joined(2, other, Holds::Nothing)],
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
        let events = words.iter().zip(1..).map(|(bits, id)| {
            let candidate = Candidate { bits: (*bits).to_owned(), ..candidate(id) };
            Event::Joined(id, candidate, Holds::Nothing)
        });
        let state = Membership::new(2, 8, (4, 0), recorded.map(str::to_owned));
        let (_, actions, _) = play(state, events.collect());
        assert_eq!(actions, expected, "recorded {recorded:?}, came {words:?}");
    }
}

#[test]
fn who_leaves_before_the_start_is_waited_for_again() {
    let mut events = join(1..=1);
    events.push(lost(1));
    events.extend(join(2..=3));
    let (state, actions, _) = play(Membership::new(2, 8, (0, 0), None), events);
    assert_eq!(actions.len(), 4, "three welcomes and a generation");
    assert_eq!(state.members(), [2, 3]);
}

#[test]
fn long_gathering_is_noticed_every_ten_seconds() {
    let state = Membership::new(2, 8, (0, 0), None);
    let (state, actions, _) = membership(Duration::from_secs(9), state, Event::Tick);
    assert_eq!(actions, []);
    let (state, actions, _) = membership(Duration::from_secs(10), state, Event::Tick);
    assert_eq!(actions, [Action::Notice("waiting for workers: 0 of 2 are here".into())]);
    assert_eq!(membership(Duration::from_secs(15), state, Event::Tick).1, []);
}

/// What may happen next to a fleet of which each worker does what it is told, or dies, in some order.
#[derive(Debug, Default)]
struct Fleet {
    next_id: WorkerId,
    /// Each with the state that it holds.
    alive: BTreeMap<WorkerId, Option<Stage>>,
    /// Members that have not stopped.
    at_work: Vec<WorkerId>,
    /// Those of them whose state is still on the way: if they stop, they hold none.
    receiving: Vec<WorkerId>,
    /// The shards of each member.
    shares: BTreeMap<WorkerId, u32>,
    generation: Generation,
    /// The most that any worker has ever done.
    furthest: u64,
}

impl Fleet {
    fn event(&mut self, choice: u64) -> Event {
        let pick = |ids: &[WorkerId]| ids.get((choice >> 8) as usize % ids.len().max(1)).copied();
        let alive: Vec<WorkerId> = self.alive.keys().copied().collect();
        match choice % 9 {
            0 | 1 if alive.len() < 6 => {
                self.next_id += 1;
                self.alive.insert(self.next_id, None);
                Event::Joined(self.next_id, candidate(self.next_id), Holds::Nothing)
            }
            2 => match pick(&alive) {
                Some(id) => {
                    self.alive.remove(&id);
                    self.at_work.retain(|&other| other != id);
                    lost(id)
                }
                None => Event::Tick,
            },
            3..=5 => match pick(&self.at_work) {
                Some(id) => {
                    self.at_work.retain(|&other| other != id);
                    // Some have done a step that others have not.
                    let state = self.alive[&id]
                        .filter(|_| !self.receiving.contains(&id))
                        .map(|stage| at(stage.step + (choice >> 16) % 2));
                    self.alive.insert(id, state);
                    self.furthest = self.furthest.max(state.map_or(0, |stage| stage.step));
                    let broken = (choice >> 20).is_multiple_of(3).then(|| "why".to_owned());
                    Event::Stopped { id, generation: self.generation, state, broken }
                }
                None => Event::Tick,
            },
            6 => match pick(&self.at_work) {
                Some(id) => {
                    self.receiving.retain(|&other| other != id);
                    Event::Connected(id, self.generation)
                }
                None => Event::Tick,
            },
            7 => {
                let pace = |(&id, &shards): (&WorkerId, &u32)| {
                    let ms = (choice >> 8).rotate_left(7 * id) % 100;
                    (id, Pace { shards, per_shard: (ms > 20).then(|| Duration::from_millis(ms)) })
                };
                Event::Paces(self.shares.iter().map(pace).collect())
            }
            _ => Event::Tick,
        }
    }
}

proptest! {
    #[test]
    fn whatever_happens_no_state_that_survives_is_lost(
        expected in 1u32..5,
        shards in 1u32..9,
        balance in prop_oneof![Just(Balance::Even), Just(Balance::Speed)],
        choices in proptest::collection::vec(any::<u64>(), 1..300),
    ) {
        let mut fleet = Fleet::default();
        let mut state = Membership::new(expected, shards, (0, 0), None).with_balance(balance);
        for (choice, second) in choices.into_iter().zip(0..) {
            let event = fleet.event(choice);
            let (next, actions, _) = membership(Duration::from_secs(second), state, event);
            state = next;
            for action in actions {
                let (generation, members, source) = match action {
                    Action::Form(generation, members, source) => (generation, members, source),
                    Action::Fail(_) => return Ok(()),
                    _ => continue,
                };
                prop_assert!(fleet.at_work.is_empty(), "members of the last generation still train");
                prop_assert_eq!(generation, fleet.generation + 1);
                let mut end = 0;
                for member in &members {
                    prop_assert!(fleet.alive.contains_key(&member.worker_id));
                    prop_assert_eq!(member.shards.start, end);
                    prop_assert!(member.shards.end > end);
                    end = member.shards.end;
                }
                prop_assert_eq!(end, shards);
                prop_assert_eq!(members.len(), fleet.alive.len().min(shards as usize));
                // Nobody who is alive holds a more advanced state than the one that all go on from.
                let best = fleet.alive.values().copied().flatten().max();
                let of = |rank: usize| fleet.alive[&members[rank].worker_id];
                let stage = match source {
                    Source::Disk => None,
                    Source::Kept(stage) => {
                        prop_assert!((0..members.len()).all(|rank| of(rank) == Some(stage)));
                        Some(stage)
                    }
                    Source::Member(rank, stage) => {
                        prop_assert_eq!(of(rank as usize), Some(stage));
                        Some(stage)
                    }
                };
                prop_assert_eq!(stage, best);
                let behind = |member: &&Member| fleet.alive[&member.worker_id] != stage;
                let receiving = members.iter().filter(behind).map(|member| member.worker_id);
                fleet.receiving = receiving.collect();
                for member in &members {
                    fleet.alive.insert(member.worker_id, Some(stage.unwrap_or(at(0))));
                }
                fleet.shares =
                    members.iter().map(|member| (member.worker_id, member.shards.len() as u32)).collect();
                (fleet.generation, fleet.at_work) =
                    (generation, members.iter().map(|member| member.worker_id).collect());
            }
        }
    }
}
