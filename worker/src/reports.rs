//! What a worker has lately told of its steps, kept for a coordinator that is started again.
//!
//! A coordinator that is killed may not have taken in the last reports, and none comes to it while it is away. The next
//! one says what it has on record and is told the rest again. Reports are idempotent by step, so telling too much is
//! harmless. While the coordinator lives, few reports are on their way to it: it feeds a worker no more batches than
//! the worker has granted, and grants travel behind the reports. The rest of the room is for a machine that goes down
//! with lines that had not reached its disk.

use std::collections::VecDeque;

use protocol::message::ToCoordinator;

/// Reports that are kept; a few hundred bytes each.
const LIMIT: usize = 4096;

/// The last reports, in the order in which they were made.
#[derive(Debug)]
pub(crate) struct Reports {
    /// Each with the steps done when it was made.
    kept: VecDeque<(u64, ToCoordinator)>,
    /// All reports of this step and later ones are here.
    from: u64,
    limit: usize,
}

impl Reports {
    pub(crate) fn new() -> Self {
        Self::with_limit(LIMIT)
    }

    fn with_limit(limit: usize) -> Self {
        Self { kept: VecDeque::new(), from: 1, limit }
    }

    /// A generation begins in the state after `step` steps. What lies before a state that came from elsewhere does not
    /// join on to what follows; what lies after it will be told again.
    pub(crate) fn begin(&mut self, step: u64) {
        while self.kept.back().is_some_and(|(last, _)| *last > step) {
            self.kept.pop_back();
        }
        if self.kept.back().is_none_or(|(last, _)| *last < step) {
            self.kept.clear();
            self.from = step + 1;
        }
    }

    /// Keeps a message if it is a report, and forgets the oldest if there are too many.
    pub(crate) fn keep(&mut self, message: &ToCoordinator) {
        let Some(step) = step_of(message) else { return };
        self.kept.push_back((step, message.clone()));
        if self.kept.len() > self.limit
            && let Some((oldest, _)) = self.kept.pop_front()
        {
            self.from = oldest + 1;
        }
    }

    /// The step from which on nothing is missing.
    pub(crate) fn from(&self) -> u64 {
        self.from
    }

    /// The reports of this step and all later ones.
    pub(crate) fn since(&self, step: u64) -> impl Iterator<Item = &ToCoordinator> {
        self.kept.iter().filter(move |(of, _)| *of >= step).map(|(_, message)| message)
    }
}

/// The step that a message reports of, if it does.
fn step_of(message: &ToCoordinator) -> Option<u64> {
    match message {
        ToCoordinator::Step(report) => Some(report.step),
        ToCoordinator::Evaluation { step, .. }
        | ToCoordinator::Digest { step, .. }
        | ToCoordinator::Sample { step, .. } => Some(*step),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(step: u64) -> ToCoordinator {
        ToCoordinator::Digest { generation: 1, step, digest: step }
    }

    fn kept(reports: &Reports, since: u64) -> Vec<u64> {
        reports.since(since).filter_map(step_of).collect()
    }

    #[test]
    fn what_is_not_on_record_is_told_again() {
        let mut reports = Reports::new();
        reports.begin(0);
        for step in [1, 2, 2, 3] {
            reports.keep(&digest(step));
        }
        reports.keep(&ToCoordinator::Connected { generation: 1 });
        assert_eq!((kept(&reports, 2), reports.from()), (vec![2, 2, 3], 1));
        assert_eq!(kept(&reports, 4), [0; 0]);
    }

    #[test]
    fn the_oldest_make_room_and_are_not_promised() {
        let mut reports = Reports::with_limit(3);
        for step in 1..=5 {
            reports.keep(&digest(step));
        }
        assert_eq!((kept(&reports, 0), reports.from()), (vec![3, 4, 5], 3));
    }

    #[test]
    fn a_generation_goes_on_from_its_state() {
        // State after the steps that are kept; where it begins; what is kept then, and from which step on.
        for (begins, left, from) in [(3, vec![1, 2, 3], 1), (2, vec![1, 2], 1), (5, vec![], 6)] {
            let mut reports = Reports::new();
            (1..=3).for_each(|step| reports.keep(&digest(step)));
            reports.begin(begins);
            assert_eq!((kept(&reports, 0), reports.from()), (left, from), "from step {begins}");
        }
    }
}
