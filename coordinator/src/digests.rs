//! Comparison of the members' digests of one state.

use std::collections::{BTreeMap, HashMap};

use protocol::message::WorkerId;

/// Digests by step, until all members have sent theirs.
#[derive(Debug, Default)]
pub(crate) struct Digests {
    /// The last step after which all members' digests were the same.
    agreed: u64,
    by_step: BTreeMap<u64, HashMap<WorkerId, u64>>,
}

impl Digests {
    /// Takes in one digest. When it is the last of its step and they differ, gives the members that parted from
    /// the rest: the minority, or all where there is no clear majority.
    pub(crate) fn take(
        &mut self,
        id: WorkerId,
        step: u64,
        digest: u64,
        members: &[WorkerId],
    ) -> Vec<WorkerId> {
        self.keep(id, step, digest);
        self.compare(step, members)
    }

    /// Takes in one digest while it is not known yet who the members are.
    pub(crate) fn keep(&mut self, id: WorkerId, step: u64, digest: u64) {
        self.by_step.entry(step).or_default().insert(id, digest);
    }

    /// Compares what was kept, now that the members are known. Gives the first step after which they differ, and who parted.
    pub(crate) fn compare_kept(&mut self, members: &[WorkerId]) -> Option<(u64, Vec<WorkerId>)> {
        let steps: Vec<u64> = self.by_step.keys().copied().collect();
        let mut compared = steps.into_iter().map(|step| (step, self.compare(step, members)));
        compared.find(|(_, parted)| !parted.is_empty())
    }

    fn compare(&mut self, step: u64, members: &[WorkerId]) -> Vec<WorkerId> {
        let of_step = self.by_step.entry(step).or_default();
        if of_step.len() < members.len() || members.iter().any(|member| !of_step.contains_key(member)) {
            return Vec::new();
        }
        let of_step = self.by_step.remove(&step).unwrap_or_default();
        // Members are in step with each other: what is older will not be completed any more.
        self.by_step = self.by_step.split_off(&step);
        let parted = parted(&of_step);
        if parted.is_empty() {
            self.agreed = step;
        }
        parted
    }

    /// Begins anew with other members, whose state is that after `step` steps: what was said of later ones was said of
    /// states that are gone.
    pub(crate) fn begin(&mut self, step: u64) {
        self.by_step.clear();
        self.agreed = self.agreed.min(step);
    }

    /// The last step after which all members' digests were the same; 0 before the first.
    pub(crate) fn agreed(&self) -> u64 {
        self.agreed
    }
}

fn parted(digests: &HashMap<WorkerId, u64>) -> Vec<WorkerId> {
    let mut votes: HashMap<u64, usize> = HashMap::new();
    for digest in digests.values() {
        *votes.entry(*digest).or_default() += 1;
    }
    if votes.len() <= 1 {
        return Vec::new();
    }
    let most = votes.values().copied().max().unwrap_or(0);
    let is_clear = votes.values().filter(|&&count| count == most).count() == 1;
    let mut parted: Vec<WorkerId> =
        digests.iter().filter(|(_, digest)| !is_clear || votes[digest] < most).map(|(&id, _)| id).collect();
    parted.sort_unstable();
    parted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_minority_is_named_and_with_two_both() {
        let mut digests = Digests::default();
        let members = [1, 2, 3];
        let nobody: [WorkerId; 0] = [];
        assert_eq!(digests.take(1, 50, 7, &members), nobody);
        assert_eq!(digests.take(3, 50, 7, &members), nobody);
        assert_eq!(digests.take(2, 50, 8, &members), [2]);
        for id in members {
            assert_eq!(digests.take(id, 100, 9, &members), nobody);
        }
        assert_eq!(digests.take(1, 50, 7, &[1, 2]), nobody);
        assert_eq!(digests.take(2, 50, 8, &[1, 2]), [1, 2]);
        assert!(digests.by_step.is_empty());
        assert_eq!(digests.agreed(), 100);
    }

    #[test]
    fn what_comes_before_all_are_back_is_compared_when_they_are() {
        let mut digests = Digests::default();
        for (id, step, digest) in [(1, 10, 7), (1, 20, 8), (2, 10, 7), (2, 20, 9), (2, 30, 1)] {
            digests.keep(id, step, digest);
        }
        assert_eq!(digests.agreed(), 0, "one of two that are to come agrees with nobody");
        assert_eq!(digests.compare_kept(&[1, 2]), Some((20, vec![1, 2])));
        assert_eq!(digests.agreed(), 10);
        assert_eq!(digests.take(1, 30, 1, &[1, 2]), [0; 0]);
        assert_eq!(digests.agreed(), 30);
    }
}
