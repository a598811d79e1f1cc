//! Who hangs: workers whose process lives, and says so, while its training thread does not move. Pure; times are what the
//! workers say of themselves, so a coordinator that was stopped for a while blames nobody.
//!
//! Deadlines follow what was seen: a phase may take ten times as long as the longest of its kind before, on any worker,
//! and never less than five seconds; one that nobody has finished yet has a minute. They hold for work that a thread can
//! do by itself. Those that wait are not to blame, but for one case: where all members wait for the collective, and some
//! have entered fewer operations than the others, these are the ones that did not enter.

use std::collections::BTreeMap;
use std::time::Duration;

use protocol::activity::{Phase, Position};
use protocol::message::{Generation, WorkerId};

/// No phase hangs that has not lasted so long.
const FLOOR: Duration = Duration::from_secs(5);

/// How much longer than the longest before a phase may last.
const FACTOR: u32 = 10;

/// A phase that nobody has finished yet may last so long: first steps allocate, compile, and read from slow disks.
const FIRST: Duration = Duration::from_secs(60);

/// What the members of the generation said last.
#[derive(Debug, Default)]
pub(crate) struct Deadlines {
    longest: BTreeMap<Phase, Duration>,
    positions: BTreeMap<WorkerId, Position>,
}

impl Deadlines {
    /// Begins anew with other members. What their phases take is known.
    pub(crate) fn begin(&mut self) {
        self.positions.clear();
    }

    /// A member rests, or is gone.
    pub(crate) fn forget(&mut self, id: WorkerId) {
        self.positions.remove(&id);
    }

    /// Whether a worker has been where it is for so long that anything could follow from it.
    pub(crate) fn is_long(position: &Position) -> bool {
        Duration::from_millis(position.for_ms.into()) >= FLOOR
    }

    /// Takes in where a worker is. `at_work` are the members of this generation that have not stopped. Gives those that
    /// hang, and what they hang in, in words.
    pub(crate) fn take(
        &mut self,
        id: WorkerId,
        position: Position,
        generation: Generation,
        at_work: &[WorkerId],
    ) -> Vec<(WorkerId, String)> {
        if let Some(longest) = position.longest_ms {
            let known = self.longest.entry(position.phase).or_default();
            *known = (*known).max(Duration::from_millis(longest.into()));
        }
        if position.generation != generation || !at_work.contains(&id) {
            return Vec::new();
        }
        self.positions.insert(id, position);
        let so_far = Duration::from_millis(position.for_ms.into());
        if so_far < self.limit(position.phase) {
            return Vec::new();
        }
        if !position.waits {
            return vec![(id, self.sentence(&position))];
        }
        self.behind(at_work)
    }

    /// Where all members wait for the collective too long: those that have entered fewer operations than others.
    fn behind(&self, at_work: &[WorkerId]) -> Vec<(WorkerId, String)> {
        let is_stuck = |position: &Position| {
            matches!(position.phase, Phase::Reduce | Phase::Transfer)
                && Duration::from_millis(position.for_ms.into()) >= FLOOR
        };
        let positions: Option<Vec<_>> = at_work
            .iter()
            .map(|id| Some((*id, self.positions.get(id).filter(|position| is_stuck(position))?)))
            .collect();
        let Some(positions) = positions else { return Vec::new() };
        let entered = |(_, position): &(WorkerId, &Position)| position.operations;
        let most = positions.iter().map(entered).max();
        positions
            .iter()
            .filter(|position| Some(entered(position)) < most)
            .map(|(id, position)| {
                let others = most.unwrap_or_default();
                let more = format!("it entered {} operations, others {others}", position.operations);
                (*id, format!("{}; {more}", self.sentence(position)))
            })
            .collect()
    }

    fn limit(&self, phase: Phase) -> Duration {
        self.longest.get(&phase).map_or(FIRST, |longest| FLOOR.max(*longest * FACTOR))
    }

    fn sentence(&self, position: &Position) -> String {
        let Position { phase, step, for_ms, .. } = position;
        let before = match self.longest.get(phase) {
            Some(longest) => format!("the longest before took {:.3} s", longest.as_secs_f64()),
            None => "nobody has finished one before".to_owned(),
        };
        format!(
            "its training thread hangs in {} of step {}, for {:.1} s; {before}",
            phase.name(),
            step + 1,
            f64::from(*for_ms) / 1e3
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(phase: Phase, waits: bool, for_ms: u32, operations: u32) -> Position {
        let longest_ms = (for_ms < 1000).then_some(for_ms);
        Position {
            generation: 1,
            phase,
            step: 30,
            waits,
            for_ms,
            longest_ms,
            operations,
            bytes: 0,
            waits_for: None,
        }
    }

    #[test]
    fn a_thread_that_works_too_long_is_named_and_those_that_wait_for_it_are_not() {
        let mut deadlines = Deadlines::default();
        let members = [1, 2, 3];
        let mut take = |id, position| deadlines.take(id, position, 1, &members);
        assert_eq!(take(2, at(Phase::Compute, false, 59_000, 7)), [], "the first may take long");
        assert_eq!(take(1, at(Phase::Compute, false, 20, 7)), []);
        assert_eq!(take(2, at(Phase::Compute, false, 4_900, 7)), []);
        assert_eq!(take(1, at(Phase::Reduce, true, 70_000, 9)), []);
        assert_eq!(take(3, at(Phase::Reduce, true, 70_000, 9)), []);
        let hangs = take(2, at(Phase::Compute, false, 5_100, 7));
        let sentence =
            "its training thread hangs in compute of step 31, for 5.1 s; the longest before took 0.020 s";
        assert_eq!(hangs, [(2, sentence.to_owned())]);
        let mut old = at(Phase::Compute, false, 90_000, 7);
        old.generation = 0;
        assert_eq!(take(2, old), [], "that was another generation");
        assert_eq!(take(4, at(Phase::Compute, false, 90_000, 7)), [], "no member any more");
    }

    #[test]
    fn deadlines_grow_with_what_was_seen() {
        let mut deadlines = Deadlines::default();
        assert_eq!(deadlines.take(1, at(Phase::Evaluate, false, 900, 0), 1, &[1]), []);
        assert_eq!(deadlines.take(1, at(Phase::Evaluate, false, 8_900, 0), 1, &[1]), []);
        assert_eq!(deadlines.take(1, at(Phase::Evaluate, false, 9_100, 0), 1, &[1]).len(), 1);
    }

    #[test]
    fn where_all_wait_those_that_did_not_enter_are_named() {
        let mut deadlines = Deadlines::default();
        let members = [1, 2, 3];
        let mut take = |id, position| deadlines.take(id, position, 1, &members);
        assert_eq!(take(1, at(Phase::Reduce, true, 10, 8)), []);
        assert_eq!(take(1, at(Phase::Reduce, true, 6_000, 9)), []);
        assert_eq!(take(3, at(Phase::Reduce, true, 6_000, 9)), [], "the second may be on its way");
        let named: Vec<_> =
            take(2, at(Phase::Reduce, true, 6_000, 8)).into_iter().map(|(id, _)| id).collect();
        assert_eq!(named, [2]);
        assert_eq!(take(2, at(Phase::Reduce, true, 7_000, 9)), [], "the network is slow, nobody is behind");
        assert_eq!(take(2, at(Phase::Data, true, 7_000, 8)), [], "it waits for the coordinator");
    }
}
