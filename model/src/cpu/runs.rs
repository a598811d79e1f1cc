//! The rows of a block as runs: unbroken sequences of steps that start from one state.
//!
//! A row of its own length is one run; a row whose state is reset in the middle is several. Runs are sorted by length,
//! longest first, so that those that have a step t are the first ones, and their steps are stored without gaps: all of
//! step 0, then all of step 1, and so on. Kernels know runs only. Everything else asks here for the *place* of a row's
//! step in that storage.

use std::ops::Range;

use crate::rows::{BatchRows, Run, cut};

/// No place: the row has no such step.
const NOWHERE: u32 = u32::MAX;

/// The runs of a block's rows. Rows and steps count from the block's first row and the row's first step.
#[derive(Debug, Default)]
pub(super) struct Runs {
    runs: Vec<Run>,
    /// Runs that have step t, `[T]`: what kernels call it.
    active: Vec<usize>,
    /// Place of the first run's step t, `[T]`.
    offsets: Vec<usize>,
    rows: usize,
    /// Place of step t of each row, `[T][rows]`, T the longest row's.
    places: Vec<u32>,
    /// For a direction that reads backwards: where the step at each place is, `[N]`.
    mirrored: Vec<u32>,
    /// Where the state before the step at each place is, among the runs' starts followed by all places, `[N]`.
    before: Vec<u32>,
}

impl Runs {
    /// Takes over these rows of a batch. Keeps its memory. `goes_on`: rows start from a carried state, unless they begin
    /// with `reset_token`.
    pub(super) fn of_batch(
        &mut self,
        batch: &BatchRows<'_>,
        rows: Range<usize>,
        goes_on: bool,
        reset_token: Option<u16>,
    ) {
        self.runs.clear();
        cut(batch, rows.clone(), goes_on, reset_token, &mut self.runs);
        self.arrange(rows.len());
    }

    /// One row of one step, which starts from the initial state.
    pub(super) fn of_one_step(&mut self) {
        self.runs.clear();
        self.runs.push(Run { row: 0, start: 0, length: 1, is_fed: false });
        self.arrange(1);
    }

    /// Sorts the runs and gives every step its place.
    fn arrange(&mut self, rows: usize) {
        // Stable: runs of equal length stay in the order of the rows, so that places of even rows are as one expects.
        self.runs.sort_by_key(|run| std::cmp::Reverse(run.length));
        let steps = self.runs.iter().map(|run| run.start + run.length).max().unwrap_or(0);
        let longest = self.runs.first().map_or(0, |run| run.length);
        self.rows = rows;
        self.active.clear();
        self.offsets.clear();
        let (mut place, mut active) = (0, self.runs.len());
        for t in 0..longest {
            while self.runs[active - 1].length <= t {
                active -= 1;
            }
            self.active.push(active);
            self.offsets.push(place);
            place += active;
        }
        self.places.clear();
        self.places.resize(steps * rows, NOWHERE);
        self.mirrored.clear();
        self.mirrored.resize(place, 0);
        self.before.clear();
        self.before.extend(0..self.active.first().map_or(0, |&active| active as u32));
        for t in 1..longest {
            let (start, active) = ((self.runs.len() + self.offsets[t - 1]) as u32, self.active[t] as u32);
            self.before.extend(start..start + active);
        }
        for (at, run) in self.runs.iter().enumerate() {
            for t in 0..run.length {
                let place = self.offsets[t] + at;
                self.places[(run.start + t) * rows + run.row] = place as u32;
                self.mirrored[place] = (self.offsets[run.length - 1 - t] + at) as u32;
            }
        }
    }

    /// Number of runs.
    pub(super) fn len(&self) -> usize {
        self.runs.len()
    }

    /// All runs, longest first.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Run> {
        self.runs.iter()
    }

    /// The runs of a row that start from the initial state, as positions among all runs, in the order of the steps.
    pub(super) fn fresh(&self, row: usize) -> impl Iterator<Item = usize> + '_ {
        let mut fresh: Vec<(usize, usize)> = (self.runs.iter().enumerate())
            .filter(|(_, run)| run.row == row && !run.is_fed)
            .map(|(at, run)| (run.start, at))
            .collect();
        fresh.sort_unstable();
        fresh.into_iter().map(|(_, at)| at)
    }

    /// Runs that have a step t, `[T]`.
    pub(super) fn active(&self) -> &[usize] {
        &self.active
    }

    /// Steps of all rows together, `N`.
    pub(super) fn steps(&self) -> usize {
        self.mirrored.len()
    }

    /// Steps of the longest row.
    pub(super) fn seq_len(&self) -> usize {
        self.places.len().checked_div(self.rows).unwrap_or(0)
    }

    /// The place of a row's step; `None` past the row's end.
    pub(super) fn place(&self, t: usize, row: usize) -> Option<usize> {
        let place = *self.places.get(t * self.rows + row)?;
        (place != NOWHERE).then_some(place as usize)
    }

    /// The places of a row's steps.
    pub(super) fn places_of(&self, row: usize) -> impl DoubleEndedIterator<Item = usize> + '_ {
        let places = self.places.iter().skip(row).step_by(self.rows.max(1));
        places.filter(|&&place| place != NOWHERE).map(|&place| place as usize)
    }

    /// Where a direction that reads backwards has the step that is at `place` in the other direction, and the reverse.
    pub(super) fn mirrored(&self, place: usize) -> usize {
        self.mirrored[place] as usize
    }

    /// All places with the row and its step, in no order that sums may rely on.
    pub(super) fn placed(&self) -> impl Iterator<Item = (usize, usize, usize)> + '_ {
        let rows = self.rows;
        let all = self.places.iter().enumerate().filter(|(_, place)| **place != NOWHERE);
        all.map(move |(at, &place)| (place as usize, at / rows, at % rows))
    }

    /// The position among all runs of the one whose step is at `place`.
    pub(super) fn run_at(&self, place: usize) -> usize {
        let t = self.offsets.partition_point(|&offset| offset <= place) - 1;
        place - self.offsets[t]
    }

    /// Where the state before the step at `place` is, among the runs' starts followed by all places.
    pub(super) fn state_before(&self, place: usize) -> usize {
        self.before[place] as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::row_starts;
    use proptest::prelude::*;
    use protocol::batch::{Batch, Inputs, ShardBatch};
    use protocol::schedule::Work;

    fn batch(lines: &[&[u16]]) -> Batch {
        Batch {
            work: Work::Evaluate { step: 0, index: 1 },
            first_slot: 0,
            shards: vec![ShardBatch { shard: 0, rows: 0..lines.len() }],
            sample_ids: vec![0; lines.len()],
            lengths: lines.iter().map(|line| line.len() as u32 - 1).collect(),
            paddings: vec![0; lines.len()],
            inputs: Inputs::Tokens(lines.concat()),
        }
    }

    fn runs(lines: &[&[u16]], reset_token: Option<u16>) -> Runs {
        let (batch, mut starts, mut runs) = (batch(lines), Vec::new(), Runs::default());
        row_starts(&batch, 0, &mut starts);
        runs.of_batch(&BatchRows { batch: &batch, starts: &starts }, 0..lines.len(), true, reset_token);
        runs
    }

    #[test]
    fn even_rows_have_the_places_of_a_matrix() {
        let runs = runs(&[&[1, 2, 3], &[1, 2, 3], &[1, 2, 3]], None);
        assert_eq!(runs.active(), [3, 3]);
        for t in 0..2 {
            for row in 0..3 {
                assert_eq!(runs.place(t, row), Some(3 * t + row));
                assert_eq!(runs.state_before(3 * t + row), 3 * t + row);
            }
        }
        assert_eq!(runs.place(2, 0), None);
    }

    #[test]
    fn a_reset_begins_a_run_that_is_not_fed() {
        // Rows: 9 | 1 2 9 3, and 4 5.
        let runs = runs(&[&[9, 1, 2, 9, 3, 9], &[4, 5, 6]], Some(9));
        let run = |row, start, length, is_fed| Run { row, start, length, is_fed };
        let all: Vec<Run> = runs.iter().copied().collect();
        assert_eq!(all, [run(0, 0, 3, false), run(0, 3, 2, false), run(1, 0, 2, true)]);
        assert_eq!(runs.active(), [3, 3, 1]);
        assert_eq!(runs.places_of(0).collect::<Vec<_>>(), [0, 3, 6, 1, 4]);
        assert_eq!(runs.places_of(1).collect::<Vec<_>>(), [2, 5]);
        assert_eq!(runs.fresh(0).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(runs.fresh(1).count(), 0);
        assert_eq!((0..7).map(|place| runs.mirrored(place)).collect::<Vec<_>>(), [6, 4, 5, 3, 1, 2, 0]);
        assert_eq!((0..7).map(|place| runs.state_before(place)).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5, 6]);
    }

    proptest! {
        #[test]
        fn every_step_has_one_place(
            lines in proptest::collection::vec(proptest::collection::vec(0u16..4, 2..12), 1..9),
            reset in proptest::option::of(0u16..4),
        ) {
            let lines: Vec<&[u16]> = lines.iter().map(|line| &line[..]).collect();
            let runs = runs(&lines, reset);
            let mut seen = vec![false; lines.iter().map(|line| line.len() - 1).sum()];
            prop_assert_eq!(seen.len(), runs.steps());
            prop_assert!(runs.active().is_sorted_by(|a, b| a >= b));
            for (row, line) in lines.iter().enumerate() {
                prop_assert_eq!(runs.places_of(row).count(), line.len() - 1);
                for t in 0..line.len() - 1 {
                    let place = runs.place(t, row).unwrap();
                    prop_assert!(!std::mem::replace(&mut seen[place], true));
                    prop_assert_eq!(runs.mirrored(runs.mirrored(place)), place);
                    let before = runs.state_before(place);
                    let starts_run = t == 0 || reset == Some(line[t]);
                    prop_assert_eq!(before < runs.len(), starts_run);
                    if !starts_run {
                        prop_assert_eq!(before - runs.len(), runs.place(t - 1, row).unwrap());
                    }
                }
            }
        }
    }
}
