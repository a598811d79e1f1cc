//! Workers that come back to a coordinator that was started again, or that has lost them all.

use super::*;

fn back(id: WorkerId, holds: Holds) -> Event {
    Event::Joined(id, candidate(id), holds)
}

/// A coordinator that was started again after generation 7 of so many workers.
fn restarted(workers: u32) -> Membership {
    Membership::new(workers, 8, (7, workers), None)
}

fn place(rank: u32) -> Event {
    back(rank + 1, Holds::Place(rank))
}

#[test]
fn all_members_of_the_last_generation_go_on_in_it() {
    let (state, actions, reason) = play(restarted(3), vec![place(1), place(2)]);
    let fed = |id| [Action::Welcome(id), Action::Feed(id)];
    assert_eq!(actions, [fed(2), fed(3)].concat());
    assert_eq!(reason, "2 of 3 workers are here");
    let (state, actions, reason) = play(state, vec![Event::Connected(2, 7), place(0)]);
    assert_eq!(actions, [&fed(1)[..], &[Action::Adopt(7, vec![1, 2, 3])]].concat());
    assert_eq!(reason, "generation 7: all 3 workers are back and go on");
    assert_eq!(state.members(), [1, 2, 3]);
    // As if it had been formed a moment ago.
    let (state, _, reason) = play(state, vec![Event::Connected(1, 7), Event::Connected(3, 7)]);
    assert_eq!(reason, "generation 7 is connected and trains");
    let (_, actions, _) = play(state, vec![lost(2), stopped(1, 7, 41), stopped(3, 7, 42)]);
    assert_eq!(formed(&actions), (vec![(1, 0..4), (3, 4..8)], Source::Member(1, at(42))));
}

#[test]
fn who_does_not_come_back_is_not_waited_for_long() {
    let (state, ..) = play(restarted(3), vec![place(0), place(2)]);
    let later = |after| play_at(SOON + after, state.clone(), vec![Event::Tick]);
    assert_eq!(later(RETURN_LIMIT - Duration::from_millis(1)).1, []);
    let (state, actions, reason) = later(RETURN_LIMIT);
    assert_eq!(actions, [Action::Abort(7, vec![1, 3])]);
    assert_eq!(reason, "2 of 3 workers of generation 7 are back; 2 members have not stopped yet");
    let (_, actions, _) = play_at(SOON + RETURN_LIMIT, state, vec![stopped(3, 7, 42), stopped(1, 7, 41)]);
    assert_eq!(formed(&actions), (vec![(1, 0..4), (3, 4..8)], Source::Member(1, at(42))));
}

#[test]
fn a_new_worker_in_the_place_of_one_that_is_gone_ends_the_waiting() {
    let (state, actions, _) = play(restarted(2), vec![place(1), back(9, Holds::Nothing)]);
    assert_eq!(actions[2..], [Action::Welcome(9), Action::Abort(7, vec![2])]);
    let (_, actions, _) = play(state, vec![stopped(2, 7, 5)]);
    assert_eq!(formed(&actions), (vec![(2, 0..4), (9, 4..8)], Source::Member(0, at(5))));
}

#[test]
fn members_that_rest_bring_their_states() {
    let events = vec![back(1, Holds::State(at(5))), back(2, Holds::State(at(6)))];
    let (_, actions, _) = play(restarted(2), events);
    assert_eq!(formed(&actions), (vec![(1, 0..4), (2, 4..8)], Source::Member(1, at(6))));
    // One works on, one rests: the generation is over.
    let (state, actions, _) = play(restarted(2), vec![place(0), back(2, Holds::State(at(6)))]);
    assert_eq!(actions.last(), Some(&Action::Abort(7, vec![1])));
    let (_, actions, _) = play(state, vec![stopped(1, 7, 5)]);
    assert_eq!(formed(&actions).1, Source::Member(1, at(6)));
    // One that stops after it has come back has not left.
    let (_, actions, _) = play(restarted(2), vec![place(0), stopped(1, 7, 5), back(2, Holds::State(at(5)))]);
    assert_eq!(formed(&actions).1, Source::Kept(at(5)));
}

#[test]
fn when_nobody_holds_anything_the_disk_has_a_state() {
    let (_, actions, _) = play(restarted(2), vec![back(1, Holds::Nothing), back(2, Holds::Nothing)]);
    assert_eq!(formed(&actions).1, Source::Disk);
    // Fewer than the last generation had are enough, if as many as the run waits for, once nobody else may come.
    let grown = Membership::new(1, 8, (7, 3), None);
    let (state, actions, _) = play(grown, vec![back(1, Holds::Nothing)]);
    assert_eq!(actions, [Action::Welcome(1)]);
    let (_, actions, _) = play_at(RETURN_LIMIT, state, vec![Event::Tick]);
    assert_eq!(formed(&actions).1, Source::Disk);
}

#[test]
fn a_place_is_held_once_and_only_in_the_last_generation() {
    let events = vec![place(0), back(5, Holds::Place(0)), back(6, Holds::Place(9))];
    let (state, actions, _) = play(restarted(4), events);
    let fed = actions.iter().filter(|action| matches!(action, Action::Feed(_))).count();
    assert_eq!((fed, state.members()), (1, &[1][..]));
    // While others train, nobody gets a place back.
    let (_, actions, _) = play(trains(2, 8), vec![back(3, Holds::Place(0)), back(4, Holds::State(at(90)))]);
    let stands_by = |id| [Action::Welcome(id), Action::StandBy(id)];
    assert_eq!(actions, [stands_by(3), stands_by(4)].concat());
}

#[test]
fn who_is_lost_again_before_all_are_back_is_waited_for_again() {
    let (state, actions, _) = play(restarted(2), vec![place(0), lost(1), place(1)]);
    assert!(!actions.iter().any(|action| matches!(action, Action::Adopt(..))), "{actions:?}");
    let (_, actions, _) = play(state, vec![back(8, Holds::Place(0))]);
    assert_eq!(actions.last(), Some(&Action::Adopt(7, vec![8, 2])));
}

#[test]
fn workers_that_lost_the_coordinator_and_not_each_other_go_on_with_it() {
    let (state, ..) = play(trains(2, 8), vec![lost(1), lost(2)]);
    let (_, actions, _) = play(state, vec![back(3, Holds::Place(1)), back(4, Holds::Place(0))]);
    assert_eq!(actions.last(), Some(&Action::Adopt(1, vec![4, 3])));
}

proptest! {
    /// Some workers of the last generation come back, in any order, some with a place, some with a state, beside new ones.
    #[test]
    fn whoever_comes_back_no_state_is_lost_and_only_whole_generations_go_on(
        world_size in 1u32..6,
        coming in proptest::collection::vec((0u32..6, 0u8..4, 0u64..3), 0..9),
        expected in 1u32..6,
    ) {
        let mut state = Membership::new(expected, 8, (7, world_size), None);
        let (mut places, mut states) = (BTreeMap::new(), BTreeMap::new());
        let mut now = Duration::ZERO;
        let mut all = Vec::new();
        for ((rank, kind, step), id) in coming.into_iter().zip(1..) {
            now += Duration::from_millis(100);
            let holds = match kind {
                0 | 1 => Holds::Place(rank),
                2 => Holds::State(at(step)),
                _ => Holds::Nothing,
            };
            let (next, actions, _) = membership(now, state, back(id, holds));
            state = next;
            if actions.contains(&Action::Feed(id)) {
                prop_assert!(places.insert(id, (rank, at(10 + step))).is_none());
            }
            if let Holds::State(stage) = holds {
                states.insert(id, stage);
            }
            all.extend(actions);
            if all.iter().any(|action| matches!(action, Action::Abort(..) | Action::Adopt(..) | Action::Form(..))) {
                break;
            }
        }
        // Time goes by; who is told to stop does.
        for _ in 0..4 {
            now += RETURN_LIMIT;
            let (next, actions, _) = membership(now, state, Event::Tick);
            state = next;
            for id in actions.iter().chain(&all).filter_map(|action| match action {
                Action::Abort(7, ids) => Some(ids.clone()),
                _ => None,
            }).flatten().collect::<BTreeSet<_>>() {
                let held = places.remove(&id).map(|(_, stage)| stage);
                if let Some(stage) = held {
                    states.insert(id, stage);
                    let event = Event::Stopped { id, generation: 7, state: Some(stage), broken: None };
                    let (next, actions, _) = membership(now, state, event);
                    state = next;
                    all.extend(actions);
                }
            }
            all.extend(actions);
        }
        let adopted = all.iter().find_map(|action| match action {
            Action::Adopt(generation, members) => Some((*generation, members.clone())),
            _ => None,
        });
        let formed = all.iter().find_map(|action| match action {
            Action::Form(_, members, source) => Some((members.clone(), *source)),
            _ => None,
        });
        match (adopted, formed) {
            (Some((generation, members)), None) => {
                prop_assert_eq!((generation, members.len()), (7, world_size as usize));
                let ranks: Vec<u32> = members.iter().map(|id| places[id].0).collect();
                prop_assert_eq!(ranks, Vec::from_iter(0..world_size));
            }
            (None, Some((members, source))) => {
                let best = members.iter().filter_map(|member| states.get(&member.worker_id)).max().copied();
                let stage = match source {
                    Source::Disk => None,
                    Source::Kept(stage) | Source::Member(_, stage) => Some(stage),
                };
                prop_assert_eq!(stage, best);
            }
            (None, None) => prop_assert!((state.connected() as u32) < expected && states.is_empty()),
            (Some(_), Some(_)) => prop_assert!(false, "a generation that goes on is not formed anew"),
        }
    }
}
