//! How many shards each member is given: as many as any other, or in proportion to its measured speed; and when they are
//! dealt anew while a generation trains.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::Duration;

use protocol::job::Balance;
use protocol::message::WorkerId;
use protocol::slots::shards_of_rank;

use super::{Decision, Membership, Phase, pause};
use crate::paces::{Pace, median};

/// Another deal must have been clearly better in so many windows in a row.
const WINDOWS: u32 = 2;

/// With each deal of the same fleet it takes twice as many windows, up to so many: where a pace depends on the shards
/// themselves, or changes all the time, no deal is the best for long.
const MOST_WINDOWS: u32 = 64;

/// How shards are dealt, and what is known of the workers' speed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Balancing {
    pub(super) balance: Balance,
    /// How long each worker takes for a shard, as it was last measured.
    paces: BTreeMap<WorkerId, Duration>,
    /// Windows in a row in which another deal was clearly better.
    uneven: u32,
    /// Windows in a row that it takes.
    wanted: u32,
}

impl Balancing {
    pub(super) fn new(balance: Balance) -> Self {
        Self { balance, paces: BTreeMap::new(), uneven: 0, wanted: WINDOWS }
    }

    pub(super) fn forget(&mut self, id: WorkerId) {
        self.paces.remove(&id);
    }

    /// A generation begins, of another fleet than the last one or of the same.
    pub(super) fn begin(&mut self, is_other_fleet: bool) {
        self.uneven = 0;
        if is_other_fleet {
            self.wanted = WINDOWS;
        }
    }

    /// How many shards each of these workers is given, by rank.
    pub(super) fn deal(&self, shards: u32, members: &[WorkerId]) -> Vec<u32> {
        let paces: Vec<Option<Duration>> = members.iter().map(|id| self.paces.get(id).copied()).collect();
        match (self.balance, presumed(&paces)) {
            (Balance::Speed, Some(paces)) => split(shards, &paces),
            _ => even(shards, members.len()),
        }
    }

    /// Whether the members would take less than nine tenths of the time for a step if shards were dealt anew.
    fn is_uneven(&self, window: &BTreeMap<WorkerId, Pace>) -> bool {
        let (members, shares): (Vec<_>, Vec<_>) = window.iter().map(|(&id, pace)| (id, pace.shards)).unzip();
        let paces: Vec<Option<Duration>> = members.iter().map(|id| self.paces.get(id).copied()).collect();
        let Some(paces) = presumed(&paces) else { return false };
        let better = split(shares.iter().sum(), &paces);
        10 * step_time(&better, &paces) < 9 * step_time(&shares, &paces)
    }
}

/// What a window says of the members. Where shards are dealt by speed, and other ones would long have made steps clearly
/// shorter, the members are asked to stop after a step: the next generation deals anew.
pub(super) fn paced(mut next: Membership, now: Duration, window: &BTreeMap<WorkerId, Pace>) -> Decision {
    let is_training = matches!(&next.phase, Phase::Formed { waiting } if waiting.is_empty());
    let balancing = &mut next.balancing;
    if balancing.balance == Balance::Even || !is_training {
        return (next, vec![], String::new());
    }
    balancing.paces.extend(window.iter().filter_map(|(&id, pace)| Some((id, pace.per_shard?))));
    balancing.uneven = if balancing.is_uneven(window) { balancing.uneven + 1 } else { 0 };
    if balancing.uneven < balancing.wanted {
        return (next, vec![], String::new());
    }
    balancing.wanted = (2 * balancing.wanted).min(MOST_WINDOWS);
    pause(next, now, "other shards would make a step shorter by more than a tenth".to_owned())
}

/// These paces, the median where one is not known; `None` if none is.
fn presumed(paces: &[Option<Duration>]) -> Option<Vec<Duration>> {
    let median = median(paces.iter().flatten().copied())?;
    Some(paces.iter().map(|pace| pace.unwrap_or(median)).collect())
}

/// As many for each as for any other, within one.
pub(super) fn even(shards: u32, members: usize) -> Vec<u32> {
    let members = members as u32;
    (0..members).map(|rank| shards_of_rank(shards, members, rank).len() as u32).collect()
}

/// At least one shard for each member, such that the last of them is done as early as can be: each further shard goes to
/// the member that would be done with it first, of several to the one of lowest rank. Even, if that is as good.
fn split(shards: u32, paces: &[Duration]) -> Vec<u32> {
    let mut shares = vec![1; paces.len()];
    let done = |shares: &[u32], rank: usize| Reverse((time(shares[rank] + 1, paces[rank]), rank));
    let mut first: BinaryHeap<_> = (0..paces.len()).map(|rank| done(&shares, rank)).collect();
    for _ in paces.len()..shards as usize {
        let Some(Reverse((_, rank))) = first.pop() else { break };
        shares[rank] += 1;
        first.push(done(&shares, rank));
    }
    let even = even(shards, paces.len());
    if step_time(&even, paces) <= step_time(&shares, paces) { even } else { shares }
}

/// When the last member is done, in nanoseconds.
fn step_time(shares: &[u32], paces: &[Duration]) -> u128 {
    shares.iter().zip(paces).map(|(&shards, &pace)| time(shards, pace)).max().unwrap_or(0)
}

fn time(shards: u32, pace: Duration) -> u128 {
    u128::from(shards) * pace.as_nanos()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn paces(nanoseconds: &[u64]) -> Vec<Duration> {
        nanoseconds.iter().copied().map(Duration::from_nanos).collect()
    }

    /// The least time of all deals that give each member a shard.
    fn least_time(shards: u32, paces: &[Duration]) -> u128 {
        let (&first, rest) = paces.split_first().unwrap();
        if rest.is_empty() {
            return time(shards, first);
        }
        let most = shards - rest.len() as u32;
        (1..=most).map(|share| time(share, first).max(least_time(shards - share, rest))).min().unwrap()
    }

    #[test]
    fn shares_are_in_proportion_to_speed() {
        let cases: [(u32, &[u64], &[u32]); 7] = [
            (8, &[10, 10], &[4, 4]),
            (8, &[10, 30], &[6, 2]),
            (8, &[1000, 1], &[1, 7]),
            (8, &[20, 10, 20], &[2, 4, 2]),
            (3, &[900, 1, 1], &[1, 1, 1]),
            // As if nothing were known, where all are as fast.
            (8, &[7, 7, 7], &[2, 3, 3]),
            (5, &[10, 11], &[3, 2]),
        ];
        for (shards, nanoseconds, shares) in cases {
            assert_eq!(split(shards, &paces(nanoseconds)), shares, "{shards} shards, {nanoseconds:?}");
        }
    }

    #[test]
    fn who_is_not_known_counts_as_the_median() {
        let known = |nanoseconds: &[u64]| {
            let known = |&ns: &u64| (ns > 0).then(|| Duration::from_nanos(ns));
            presumed(&nanoseconds.iter().map(known).collect::<Vec<_>>())
        };
        assert_eq!(known(&[0, 30, 10, 20]), Some(paces(&[20, 30, 10, 20])));
        assert_eq!(known(&[0, 30, 10]), Some(paces(&[10, 30, 10])), "of two, the faster one");
        assert_eq!(known(&[0, 0]), None);
    }

    proptest! {
        #[test]
        fn no_deal_is_better_and_nobody_is_without_a_shard(
            nanoseconds in prop::collection::vec(0..100u64, 1..5),
            more in 0..7u32,
        ) {
            let (shards, paces) = (nanoseconds.len() as u32 + more, paces(&nanoseconds));
            let shares = split(shards, &paces);
            prop_assert_eq!(step_time(&shares, &paces), least_time(shards, &paces));
            prop_assert!(shares.iter().all(|&share| share > 0));
        }

        #[test]
        fn every_shard_is_dealt_once_and_no_worse_than_evenly(
            nanoseconds in prop::collection::vec(any::<u64>(), 1..60),
            more in 0..2000u32,
        ) {
            let (shards, paces) = (nanoseconds.len() as u32 + more, paces(&nanoseconds));
            let shares = split(shards, &paces);
            prop_assert_eq!(shares.iter().sum::<u32>(), shards);
            prop_assert!(shares.iter().all(|&share| share > 0));
            prop_assert!(step_time(&shares, &paces) <= step_time(&even(shards, paces.len()), &paces));
            // Members that change places change nothing but who has which share.
            let reversed: Vec<Duration> = paces.iter().rev().copied().collect();
            prop_assert_eq!(step_time(&split(shards, &reversed), &reversed), step_time(&shares, &paces));
        }
    }
}
