//! Who slows the fleet down: a worker that needs clearly longer for a shard than the others, for some time. Pure.
//!
//! All wait for the slowest in every step, so one slow worker costs as much as if all were, unless shards are dealt by
//! speed.

use std::collections::BTreeMap;
use std::time::Duration;

use protocol::job::Balance;
use protocol::message::WorkerId;

use crate::paces::{Pace, Windows, median};

/// How much longer than the fleet's median a shard must take.
const FACTOR: f64 = 1.5;

/// In so many windows in a row.
const WINDOWS: u32 = 3;

/// Who is suspected.
#[derive(Debug, Default)]
pub(crate) struct Stragglers {
    /// Windows in a row in which a worker was slow.
    slow: BTreeMap<WorkerId, u32>,
}

/// One that is to be named.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Straggler {
    pub(crate) id: WorkerId,
    /// How long it computes for a shard.
    pub(crate) pace: Duration,
    /// The fleet's median.
    pub(crate) median: Duration,
}

impl Stragglers {
    /// The worker is gone. Who was slow in one generation is still suspected in the next.
    pub(crate) fn forget(&mut self, id: WorkerId) {
        self.slow.remove(&id);
    }

    /// A window has passed. Gives those that have now been slow for as long as it takes to be named; each once, unless it
    /// was as fast as others in between.
    pub(crate) fn take(&mut self, window: &BTreeMap<WorkerId, Pace>) -> Vec<Straggler> {
        let Some(median) = median(window.values().filter_map(|pace| pace.per_shard)) else {
            return Vec::new();
        };
        let mut named = Vec::new();
        for (&id, pace) in window {
            let Some(pace) = pace.per_shard else { continue };
            let slow = self.slow.entry(id).or_default();
            *slow = if pace.as_secs_f64() >= FACTOR * median.as_secs_f64() { *slow + 1 } else { 0 };
            if *slow == WINDOWS {
                named.push(Straggler { id, pace, median });
            }
        }
        named
    }
}

impl Straggler {
    /// What the user is told of the worker of this name.
    pub(crate) fn sentence(&self, name: &str, balance: Balance) -> String {
        let Self { pace, median, .. } = self;
        let follows = match balance {
            Balance::Even => "all wait for it in each step",
            Balance::Speed => "shards are dealt by speed",
        };
        format!(
            "worker {name} is slow: for {} s it has computed {:.3} ms per shard, {:.1} times the fleet's median; {follows}",
            Windows::OF_A_RUN.length.as_secs() * u64::from(WINDOWS),
            pace.as_secs_f64() * 1e3,
            pace.as_secs_f64() / median.as_secs_f64()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn seconds(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    /// Plays so many windows of a fleet; `pace` gives the seconds per shard of a member in a window. Gives who was named,
    /// and in which.
    fn play(workers: WorkerId, windows: u32, pace: impl Fn(u32, WorkerId) -> f64) -> Vec<(u32, WorkerId)> {
        let mut stragglers = Stragglers::default();
        let mut named = Vec::new();
        for number in 0..windows {
            let of = |id| (id, Pace { shards: 2, per_shard: Some(seconds(pace(number, id))) });
            let window = (0..workers).map(of).collect();
            named.extend(stragglers.take(&window).iter().map(|straggler| (number, straggler.id)));
        }
        named
    }

    #[test]
    fn who_is_slow_for_three_windows_is_named_once() {
        let slow = |id: WorkerId, from: u32| {
            move |window, worker| if worker == id && window >= from { 0.02 } else { 0.01 }
        };
        assert_eq!(play(3, 9, slow(1, 0)), [(2, 1)]);
        assert_eq!(play(3, 9, slow(2, 4)), [(6, 2)]);
        assert_eq!(play(2, 9, slow(0, 0)), [(2, 0)], "of two, the slower one");
        assert_eq!(play(1, 9, slow(0, 0)), [], "alone, nobody waits");
    }

    #[test]
    fn a_moment_is_no_slowness() {
        assert_eq!(play(3, 9, |window, id| if id == 1 && window % 3 > 0 { 0.05 } else { 0.01 }), []);
        assert_eq!(play(3, 9, |_, id| if id == 1 { 0.014 } else { 0.01 }), []);
    }

    #[test]
    fn who_was_slow_is_still_suspected_in_the_next_generation() {
        let mut stragglers = Stragglers::default();
        let window = |shards, steps: u32| {
            let slow = Pace { shards, per_shard: (steps > 0).then(|| seconds(0.2)) };
            BTreeMap::from([(1, Pace { shards: 4, per_shard: Some(seconds(0.1)) }), (2, slow)])
        };
        assert_eq!(stragglers.take(&window(4, 5)), []);
        assert_eq!(stragglers.take(&window(3, 5)), []);
        assert_eq!(stragglers.take(&window(2, 0)), [], "nothing is known of this window");
        let named = stragglers.take(&window(2, 5));
        let [straggler] = &named[..] else { panic!("{named:?}") };
        assert_eq!(straggler.id, 2);
        let sentence = "worker w2 is slow: for 30 s it has computed 200.000 ms per shard, 2.0 times the fleet's median; all \
                        wait for it in each step";
        assert_eq!(straggler.sentence("w2", Balance::Even), sentence);
        let by_speed = straggler.sentence("w2", Balance::Speed);
        assert!(by_speed.ends_with("the fleet's median; shards are dealt by speed"), "{by_speed}");
        // Another worker, of whom nothing is suspected.
        stragglers.forget(2);
        assert_eq!(stragglers.take(&window(2, 5)), []);
    }

    proptest! {
        /// Whoever is named is slower than the median by the factor, and never a majority.
        #[test]
        fn only_a_minority_is_named(paces in prop::collection::vec(0.001..1.0f64, 1..20)) {
            let named = play(paces.len() as WorkerId, 5, |_, id| paces[id as usize]);
            let mut sorted = paces.clone();
            sorted.sort_by(f64::total_cmp);
            let median = sorted[(sorted.len() - 1) / 2];
            let expected: Vec<WorkerId> =
                (0..).zip(&paces).filter(|(_, pace)| **pace >= FACTOR * median).map(|(id, _)| id).collect();
            // Within rounding to nanoseconds.
            prop_assume!(paces.iter().all(|pace| (pace / median - FACTOR).abs() > 1e-6));
            prop_assert_eq!(named.iter().map(|(_, id)| *id).collect::<Vec<_>>(), expected.clone());
            prop_assert!(2 * expected.len() <= paces.len());
        }
    }
}
