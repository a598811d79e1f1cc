//! Shards that are dealt by speed.

use super::*;

/// What a window says: of each worker its shards and the milliseconds that it takes for one of them, 0 if that is not known.
fn window(of: &[(WorkerId, u32, u64)]) -> Event {
    let pace = |&(id, shards, ms): &(WorkerId, u32, u64)| {
        (id, Pace { shards, per_shard: (ms > 0).then(|| Duration::from_millis(ms)) })
    };
    Event::Paces(of.iter().map(pace).collect())
}

/// Two workers of which the second is three times as slow.
fn slow() -> Event {
    window(&[(1, 4, 10), (2, 4, 30)])
}

fn by_speed(workers: u32, shards: u32) -> Membership {
    trains(workers, shards).with_balance(Balance::Speed)
}

/// Two workers that trained in their second generation from the start, which dealt by speed.
fn redealt() -> Membership {
    let rest = [slow(), slow(), stopped(1, 1, 7), stopped(2, 1, 7)];
    let events = rest.into_iter().chain([1, 2].map(|id| Event::Connected(id, 2))).collect();
    play(by_speed(2, 8), events).0
}

#[test]
fn a_generation_ends_when_other_shards_would_be_clearly_faster() {
    let (state, actions, _) = play(by_speed(2, 8), vec![slow()]);
    assert_eq!(actions, [], "once is chance");
    let (state, actions, reason) = play(state, vec![slow()]);
    assert_eq!(actions, [Action::Pause(1, vec![1, 2])]);
    assert_eq!(reason, "other shards would make a step shorter by more than a tenth");
    assert_eq!(state.phase(), "admission");
    let (_, actions, reason) = play(state, vec![slow(), stopped(2, 1, 7), stopped(1, 1, 7)]);
    assert_eq!(formed(&actions), (vec![(1, 0..6), (2, 6..8)], Source::Kept(at(7))));
    assert_eq!(reason, "generation 2: 2 workers share 8 shards by speed: w1 6, w2 2");
}

#[test]
fn nothing_follows_where_shards_are_dealt_evenly() {
    let (state, actions, _) = play(trains(2, 8), vec![slow(), slow(), slow(), slow()]);
    assert_eq!(actions, []);
    let (_, actions, _) = play(state, vec![lost(2), stopped(1, 1, 7)]);
    assert_eq!(formed(&actions).0, [(1, 0..8)]);
}

#[test]
fn a_little_or_a_moment_is_not_enough() {
    // 40 ms become 39, and 44 become 40.
    for little in [window(&[(1, 4, 10), (2, 4, 13)]), window(&[(1, 4, 10), (2, 4, 11)])] {
        assert_eq!(play(by_speed(2, 8), vec![little; 9]).1, []);
    }
    let quick = window(&[(1, 4, 10), (2, 4, 10)]);
    let events = (0..4).flat_map(|_| [slow(), quick.clone()]).collect();
    assert_eq!(play(by_speed(2, 8), events).1, []);
    // Where each has one shard, nothing can be dealt otherwise.
    assert_eq!(play(by_speed(2, 2), vec![window(&[(1, 1, 10), (2, 1, 90)]); 9]).1, []);
}

#[test]
fn each_deal_of_the_same_fleet_takes_longer_to_follow_the_last() {
    // Now the first is slow.
    let other = || window(&[(1, 6, 30), (2, 2, 10)]);
    let state = redealt();
    let (state, actions, _) = play(state, vec![other(), other(), other()]);
    assert_eq!(actions, []);
    let (state, actions, _) = play(state, vec![other()]);
    assert_eq!(actions, [Action::Pause(2, vec![1, 2])]);
    let (_, actions, _) = play(state, vec![stopped(1, 2, 9), stopped(2, 2, 9)]);
    assert_eq!(formed(&actions).0, [(1, 0..2), (2, 2..8)]);
    // A worker that comes makes another fleet.
    let events = [join(3..=3), vec![Event::Tick, stopped(1, 2, 9), stopped(2, 2, 9)]].concat();
    let (state, actions, _) = play(redealt(), events);
    // Of the newcomer it is presumed that it is as fast as the median.
    assert_eq!(formed(&actions).0, [(1, 0..4), (2, 4..5), (3, 5..8)]);
    let connected = [1, 2, 3].map(|id| Event::Connected(id, 3)).to_vec();
    let other = || window(&[(1, 4, 30), (2, 1, 10), (3, 3, 10)]);
    let (_, actions, _) = play(state, [connected, vec![other(), other()]].concat());
    assert_eq!(actions, [Action::Pause(3, vec![1, 2, 3])]);
}

#[test]
fn survivors_keep_the_speed_that_they_were_seen_at() {
    let seen = || window(&[(1, 3, 10), (2, 3, 10), (3, 2, 17)]);
    let events = vec![seen(), lost(1), stopped(2, 1, 7), stopped(3, 1, 7)];
    let (state, actions, reason) = play(by_speed(3, 8), events);
    assert_eq!(formed(&actions).0, [(2, 0..5), (3, 5..8)]);
    assert_eq!(reason, "generation 2: 2 workers share 8 shards by speed: w2 5, w3 3");
    // When all are gone, nothing is known any more.
    let (_, actions, reason) = play(state, [vec![lost(2), lost(3)], join(4..=6)].concat());
    assert_eq!(formed(&actions).0, [(4, 0..2), (5, 2..5), (6, 5..8)]);
    assert_eq!(reason, "generation 3: 3 workers share 8 shards, going back to what is on the disk");
}

#[test]
fn what_is_measured_while_members_connect_or_stop_ends_nothing() {
    let (state, ..) = play(Membership::new(2, 8, (0, 0), None), join(1..=2));
    let state = state.with_balance(Balance::Speed);
    assert_eq!(play(state, vec![slow(); 9]).1, []);
    let (state, ..) = play(by_speed(3, 8), vec![lost(3)]);
    assert_eq!(play(state, vec![slow(); 9]).1, []);
    let (state, ..) = play(by_speed(2, 8), vec![Event::Ending]);
    assert_eq!(play(state, vec![slow(); 9]).1, []);
}

#[test]
fn the_shares_of_many_are_told_by_their_extremes() {
    let share = |id| (id, 2, if id == 9 { 40 } else { 10 });
    let all: Vec<_> = (1..=9).map(share).collect();
    let rest = (1..=9).map(|id| stopped(id, 1, 7)).collect();
    let (_, _, reason) = play(by_speed(9, 18), [vec![window(&all); 2], rest].concat());
    assert_eq!(reason, "generation 2: 9 workers share 18 shards by speed: 1 to 3 each");
}
