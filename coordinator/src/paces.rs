//! How fast the members of the generation compute, window by window. Pure; what it goes by is how long the workers say that
//! they computed.
//!
//! A window is ten seconds long, so that a moment in which a machine did something else says nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use protocol::message::WorkerId;

/// The paces that are measured.
#[derive(Debug)]
pub(crate) struct Paces {
    windows: Windows,
    members: BTreeMap<WorkerId, Member>,
    /// When the window began.
    since: Duration,
}

/// What a window is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Windows {
    pub(crate) length: Duration,
    /// Fewer steps of a worker in a window say nothing of it.
    pub(crate) least_steps: u32,
}

impl Windows {
    /// Those of a run.
    pub(crate) const OF_A_RUN: Self = Self { length: Duration::from_secs(10), least_steps: 4 };
}

#[derive(Debug)]
struct Member {
    shards: u32,
    /// In this window.
    steps: u32,
    computed: Duration,
}

/// What a window says of a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// What it computes in each step.
    pub shards: u32,
    /// How long it takes for one of them, if it has done enough steps.
    pub per_shard: Option<Duration>,
}

impl Paces {
    pub(crate) fn new(windows: Windows) -> Self {
        Self { windows, members: BTreeMap::new(), since: Duration::ZERO }
    }

    /// A generation of these members, with so many shards each.
    pub(crate) fn begin(&mut self, now: Duration, members: impl Iterator<Item = (WorkerId, u32)>) {
        let member = |(id, shards)| (id, Member { shards, steps: 0, computed: Duration::ZERO });
        self.members = members.map(member).collect();
        self.since = now;
    }

    /// A member has computed for so many seconds in a step. At the end of a window, gives what it says of each member.
    pub(crate) fn take(
        &mut self,
        now: Duration,
        id: WorkerId,
        seconds: f64,
    ) -> Option<BTreeMap<WorkerId, Pace>> {
        // What is no length of time says nothing.
        if let (Some(member), Ok(took)) = (self.members.get_mut(&id), Duration::try_from_secs_f64(seconds)) {
            member.steps += 1;
            member.computed = member.computed.saturating_add(took);
        }
        if now < self.since + self.windows.length {
            return None;
        }
        self.since = now;
        let least_steps = self.windows.least_steps;
        let pace = |(&id, member): (&WorkerId, &mut Member)| {
            let steps = std::mem::take(&mut member.steps);
            let computed = std::mem::take(&mut member.computed);
            let is_known = steps >= least_steps && member.shards > 0;
            let per_shard = is_known.then(|| computed / steps / member.shards);
            (id, Pace { shards: member.shards, per_shard })
        };
        Some(self.members.iter_mut().map(pace).collect())
    }
}

/// The one in the middle; of an even number, the faster one.
pub(crate) fn median(paces: impl Iterator<Item = Duration>) -> Option<Duration> {
    let mut paces: Vec<Duration> = paces.collect();
    paces.sort_unstable();
    paces.get(paces.len().saturating_sub(1) / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_window_says_how_long_each_takes_for_a_shard() {
        let mut paces = Paces::new(Windows::OF_A_RUN);
        paces.begin(SECOND, [(1, 6), (2, 2)].into_iter());
        for step in 1..10 {
            assert_eq!(paces.take(SECOND * (1 + step), 1, 0.3), None);
            assert_eq!(paces.take(SECOND * (1 + step), 2, 0.3), None);
        }
        let pace = |shards, ms| Pace { shards, per_shard: Some(Duration::from_millis(ms)) };
        let window = paces.take(SECOND * 11, 2, 0.3);
        assert_eq!(window, Some(BTreeMap::from([(1, pace(6, 50)), (2, pace(2, 150))])));
        // The next one begins from nothing, and one of too few steps says nothing.
        for step in [12, 13, 14] {
            assert_eq!(paces.take(SECOND * step, 1, 0.6), None);
        }
        let window = paces.take(SECOND * 21, 1, 0.6).unwrap();
        assert_eq!(window[&1], pace(6, 100));
        assert_eq!(window[&2], Pace { shards: 2, per_shard: None });
    }

    #[test]
    fn what_is_no_time_is_not_counted() {
        let mut paces = Paces::new(Windows::OF_A_RUN);
        paces.begin(Duration::ZERO, [(1, 1)].into_iter());
        for seconds in [f64::NAN, -1.0, f64::INFINITY, 1e300] {
            assert_eq!(paces.take(SECOND, 1, seconds), None);
        }
        assert_eq!(paces.take(SECOND * 10, 7, 1.0).unwrap()[&1].per_shard, None, "nor who is no member");
    }
}
