//! Who slows the fleet down: a worker that needs clearly longer for a shard than the others, for some time. Pure; what it
//! goes by is how long the workers say that they computed.
//!
//! All wait for the slowest in every step, so one slow worker costs as much as if all were. A window is ten seconds long,
//! so that a moment in which a machine did something else names nobody.

use std::collections::BTreeMap;
use std::time::Duration;

use protocol::message::WorkerId;

/// Speeds are compared after so long.
const WINDOW: Duration = Duration::from_secs(10);

/// Fewer steps of a worker in a window say nothing of it.
const STEPS: u32 = 4;

/// How much longer than the fleet's median a shard must take.
const FACTOR: f64 = 1.5;

/// In so many windows in a row.
const WINDOWS: u32 = 3;

/// How fast the members of the generation compute.
#[derive(Debug, Default)]
pub(crate) struct Stragglers {
    members: BTreeMap<WorkerId, Member>,
    /// When the window began.
    since: Duration,
}

#[derive(Debug, Default)]
struct Member {
    shards: usize,
    /// In this window.
    steps: u32,
    seconds: f64,
    /// Windows in a row in which it was slow.
    slow: u32,
}

/// One that is to be named.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Straggler {
    pub(crate) id: WorkerId,
    /// Seconds that it computes for a shard.
    pub(crate) seconds: f64,
    /// The fleet's median.
    pub(crate) median: f64,
}

impl Stragglers {
    /// A generation of these members, with so many shards each. Who was slow before is still suspected.
    pub(crate) fn begin(&mut self, now: Duration, members: impl Iterator<Item = (WorkerId, usize)>) {
        let mut before = std::mem::take(&mut self.members);
        let member = |(id, shards)| {
            let slow = before.remove(&id).map_or(0, |member: Member| member.slow);
            (id, Member { shards, slow, ..Member::default() })
        };
        self.members = members.map(member).collect();
        self.since = now;
    }

    /// A member has computed for so many seconds in a step. At the end of a window, gives those that have now been slow for
    /// as long as it takes to be named; each once, unless it was as fast as others in between.
    pub(crate) fn take(&mut self, now: Duration, id: WorkerId, seconds: f64) -> Vec<Straggler> {
        if let Some(member) = self.members.get_mut(&id) {
            member.steps += 1;
            member.seconds += seconds;
        }
        if now < self.since + WINDOW {
            return Vec::new();
        }
        self.since = now;
        let pace = |member: &Member| {
            let is_known = member.steps >= STEPS && member.shards > 0;
            is_known.then(|| member.seconds / f64::from(member.steps) / member.shards as f64)
        };
        let mut paces: Vec<f64> = self.members.values().filter_map(pace).collect();
        paces.sort_by(f64::total_cmp);
        // Of two, the faster one.
        let median = paces.get(paces.len().saturating_sub(1) / 2).copied();
        let mut named = Vec::new();
        for (&id, member) in &mut self.members {
            if let (Some(seconds), Some(median)) = (pace(member), median) {
                member.slow = if seconds >= FACTOR * median { member.slow + 1 } else { 0 };
                if member.slow == WINDOWS {
                    named.push(Straggler { id, seconds, median });
                }
            }
            (member.steps, member.seconds) = (0, 0.0);
        }
        named
    }
}

impl Straggler {
    /// What the user is told of the worker of this name.
    pub(crate) fn sentence(&self, name: &str) -> String {
        let Self { seconds, median, .. } = self;
        format!(
            "worker {name} is slow: for {} s it has computed {:.3} ms per shard, {:.1} times the fleet's median; all wait for \
             it in each step",
            WINDOW.as_secs() * u64::from(WINDOWS),
            seconds * 1e3,
            seconds / median
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Plays so many windows; `pace` gives the seconds per shard of a member in a window. Gives who was named, and in which.
    fn play(shards: &[usize], windows: u32, pace: impl Fn(u32, WorkerId) -> f64) -> Vec<(u32, WorkerId)> {
        let mut stragglers = Stragglers::default();
        let members = || (0..).zip(shards.iter().copied());
        stragglers.begin(Duration::ZERO, members());
        let mut named = Vec::new();
        for window in 0..windows {
            for tenth in 1..=10 {
                let now = WINDOW * window + WINDOW / 10 * tenth;
                for (id, shards) in members() {
                    let took = pace(window, id) * shards as f64;
                    named.extend(
                        stragglers.take(now, id, took).iter().map(|straggler| (window, straggler.id)),
                    );
                }
            }
        }
        named
    }

    #[test]
    fn who_is_slow_for_three_windows_is_named_once() {
        let slow = |id: WorkerId, from: u32| {
            move |window, worker| if worker == id && window >= from { 0.02 } else { 0.01 }
        };
        assert_eq!(play(&[3, 3, 2], 9, slow(1, 0)), [(2, 1)]);
        assert_eq!(play(&[3, 3, 2], 9, slow(2, 4)), [(6, 2)]);
        assert_eq!(play(&[4, 4], 9, slow(0, 0)), [(2, 0)], "of two, the slower one");
        assert_eq!(play(&[8], 9, slow(0, 0)), [], "alone, nobody waits");
    }

    #[test]
    fn more_shards_are_not_slowness_and_a_moment_is_none() {
        assert_eq!(play(&[1, 1, 6], 9, |_, _| 0.01), []);
        assert_eq!(play(&[3, 3, 2], 9, |window, id| if id == 1 && window % 3 > 0 { 0.05 } else { 0.01 }), []);
        assert_eq!(play(&[3, 3, 2], 9, |_, id| if id == 1 { 0.014 } else { 0.01 }), []);
    }

    #[test]
    fn who_was_slow_is_still_suspected_in_the_next_generation() {
        let mut stragglers = Stragglers::default();
        let mut named = Vec::new();
        for window in 0..3 {
            stragglers.begin(WINDOW * window, [(1, 4), (2, 4 - window as usize)].into_iter());
            for step in 0..5 {
                let now = WINDOW * window + WINDOW / 4 * step;
                named.extend(stragglers.take(now, 1, 0.4));
                named.extend(stragglers.take(now, 2, 0.2 * f64::from(4 - window)));
            }
        }
        let [straggler] = &named[..] else { panic!("{named:?}") };
        assert_eq!(straggler.id, 2);
        let sentence = "worker w2 is slow: for 30 s it has computed 200.000 ms per shard, 2.0 times the fleet's median; all \
                        wait for it in each step";
        assert_eq!(straggler.sentence("w2"), sentence);
    }

    proptest! {
        /// Whoever is named is slower than the median by the factor, and never a majority.
        #[test]
        fn only_a_minority_is_named(paces in prop::collection::vec(0.001..1.0f64, 1..20)) {
            let named = play(&vec![2; paces.len()], 5, |_, id| paces[id as usize]);
            let mut sorted = paces.clone();
            sorted.sort_by(f64::total_cmp);
            let median = sorted[(sorted.len() - 1) / 2];
            let expected: Vec<WorkerId> =
                (0..).zip(&paces).filter(|(_, pace)| **pace >= FACTOR * median).map(|(id, _)| id).collect();
            // Within rounding of sums of ten.
            prop_assume!(paces.iter().all(|pace| (pace / median - FACTOR).abs() > 1e-6));
            prop_assert_eq!(named.iter().map(|(_, id)| *id).collect::<Vec<_>>(), expected.clone());
            prop_assert!(2 * expected.len() <= paces.len());
        }
    }
}
