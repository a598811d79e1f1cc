//! The shape that all sequence kernels share, how its steps are packed, and how kernels check their arguments.
//!
//! The rows of a block may differ in length. They are sorted by it, so that at each step the rows still running are the
//! first ones, and nothing is stored or computed for the others (PyTorch's `PackedSequence`):
//! - `[N][w]` holds the rows of step 0, then those of step 1, and so on; N is the number of (step, row) pairs;
//! - `[rows + N][w]` holds the start of every row before that;
//! - `[rows][w]` is a carry: one vector per row, read and written at the steps which the row has.

use super::gemm::Start;
use super::pack::PackedMatrix;
use std::ops::Range;

/// A block of rows run through all steps by one call, on one thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SequenceShape<'a> {
    /// Rows that are still running at each step, `[T]`, never growing, at least 1. The first are all rows of the block.
    pub active: &'a [usize],
    /// Units, `H`.
    pub hidden_size: usize,
    /// Width of h, `R`: `H`, or what an LSTM projects to.
    pub output_size: usize,
}

/// Where the input's part of the gates is, `W_ih x_t` and the biases, when a kernel begins.
#[derive(Clone, Copy, Debug)]
pub enum InputPart<'a> {
    /// In the places of the gates.
    InPlace,
    /// In the row of a table that belongs to each step's token.
    Table {
        /// `[V][G·H]`.
        table: &'a [f32],
        /// `[N]`, below V.
        tokens: &'a [u32],
    },
}

/// Where one step of a block lies in its arrays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    /// Rows that run at this step.
    pub(crate) rows: usize,
    /// (step, row) pairs before it.
    first: usize,
    /// Vectors of `[rows + N]` before the states that it starts from.
    before: usize,
    /// Vectors of `[rows + N]` before the states that it leaves.
    after: usize,
}

/// The lengths that one kernel expects of its arguments.
pub(crate) struct Check {
    kernel: &'static str,
    rows: usize,
    steps: usize,
}

impl<'a> SequenceShape<'a> {
    /// Rows of the block.
    pub fn rows(&self) -> usize {
        self.active[0]
    }

    /// (step, row) pairs, `N`.
    pub fn steps(&self) -> usize {
        self.active.iter().sum()
    }

    /// The steps from first to last.
    pub(crate) fn forward(self) -> impl Iterator<Item = Step> + use<'a> {
        let mut first = 0;
        (0..self.active.len()).map(move |t| {
            let step = self.step(t, first);
            first += step.rows;
            step
        })
    }

    /// The steps from last to first.
    pub(crate) fn backward(self) -> impl Iterator<Item = Step> + use<'a> {
        let mut first = self.steps();
        (0..self.active.len()).rev().map(move |t| {
            first -= self.active[t];
            self.step(t, first)
        })
    }

    fn step(&self, t: usize, first: usize) -> Step {
        // The states before a step are the last ones written: the starts, or the outputs of the step before.
        let written = if t == 0 { self.rows() } else { self.active[t - 1] };
        let after = self.rows() + first;
        Step { rows: self.active[t], first, before: after - written, after }
    }

    /// What `kernel` may be given.
    pub(crate) fn check(&self, kernel: &'static str) -> Check {
        let active = self.active;
        assert!(
            active.last().is_some_and(|&last| last > 0) && active.is_sorted_by(|now, next| now >= next),
            "{kernel}: the active rows {active:?} must be at least 1 and never grow"
        );
        Check { kernel, rows: self.rows(), steps: self.steps() }
    }

    /// As [`SequenceShape::check`], for a cell without a projection.
    pub(crate) fn check_unprojected(&self, kernel: &'static str) -> Check {
        let SequenceShape { hidden_size, output_size, .. } = *self;
        assert!(
            output_size == hidden_size,
            "{kernel}: output_size is {output_size}, expected hidden_size {hidden_size} without a projection"
        );
        self.check(kernel)
    }
}

impl<'a> InputPart<'a> {
    /// What the product with the state before this step is added to.
    pub(crate) fn start(self, step: Step) -> Start<'a> {
        match self {
            InputPart::InPlace => Start::Kept,
            InputPart::Table { table, tokens } => Start::Table { table, tokens: &tokens[step.range(1)] },
        }
    }

    pub(crate) fn check(self, check: &Check, gates: usize) {
        if let InputPart::Table { table, tokens } = self {
            let kernel = check.kernel;
            assert!(
                tokens.len() == check.steps && table.len().is_multiple_of(gates),
                "{kernel}: {} tokens and a table of {} elements, expected {} and rows of {gates}",
                tokens.len(),
                table.len(),
                check.steps
            );
        }
    }
}

impl Step {
    /// In `[N][width]`.
    pub(crate) fn range(self, width: usize) -> Range<usize> {
        self.first * width..(self.first + self.rows) * width
    }

    /// The states that it starts from, in `[rows + N][width]`.
    pub(crate) fn before(self, width: usize) -> Range<usize> {
        self.before * width..(self.before + self.rows) * width
    }

    /// The states that it leaves, in `[rows + N][width]`.
    pub(crate) fn after(self, width: usize) -> Range<usize> {
        self.after * width..(self.after + self.rows) * width
    }

    /// Its rows of a carry, in `[rows][width]`.
    pub(crate) fn carry(self, width: usize) -> Range<usize> {
        0..self.rows * width
    }

    /// The states before and after, of `states` `[rows + N][width]`.
    pub(crate) fn split(self, states: &mut [f32], width: usize) -> (&[f32], &mut [f32]) {
        let (past, future) = states.split_at_mut(self.after * width);
        (&past[self.before(width)], &mut future[..self.rows * width])
    }
}

impl Check {
    /// Asserts that an argument is `[N][width]`.
    pub(crate) fn steps(&self, name: &str, values: &[f32], width: usize) {
        self.rows_of(name, values, self.steps, width);
    }

    /// Asserts that an argument is `[rows + N][width]`.
    pub(crate) fn states(&self, name: &str, values: &[f32], width: usize) {
        self.rows_of(name, values, self.rows + self.steps, width);
    }

    /// Asserts that an argument is `[rows][width]`.
    pub(crate) fn carry(&self, name: &str, values: &[f32], width: usize) {
        self.rows_of(name, values, self.rows, width);
    }

    /// Asserts that an argument is `[width]`.
    pub(crate) fn vector(&self, name: &str, values: &[f32], width: usize) {
        self.rows_of(name, values, 1, width);
    }

    /// Asserts that packed weights have the shape `[k, n]`.
    pub(crate) fn weight(&self, name: &str, weight: &PackedMatrix, k: usize, n: usize) {
        let (got, kernel) = ((weight.k(), weight.n()), self.kernel);
        assert!(got == (k, n), "{kernel}: {name} is packed as {got:?}, expected {:?}", (k, n));
    }

    fn rows_of(&self, name: &str, values: &[f32], rows: usize, width: usize) {
        let (kernel, len, expected) = (self.kernel, values.len(), rows * width);
        assert!(
            len == expected,
            "{kernel}: {name} has {len} elements, expected {expected} ({rows} rows of {width})"
        );
    }
}

/// The `N` equal parts of a row, to be taken apart by name: `let [i, f, g, o] = parts(gates)`.
#[inline(always)]
pub(crate) fn parts<const N: usize>(row: &[f32]) -> [&[f32]; N] {
    let len = row.len() / N;
    std::array::from_fn(|part| &row[part * len..(part + 1) * len])
}

/// As [`parts`], to be written.
#[inline(always)]
pub(crate) fn parts_mut<const N: usize>(row: &mut [f32]) -> [&mut [f32]; N] {
    let len = row.len() / N;
    let mut rest = row;
    std::array::from_fn(|_| {
        let (part, behind) = std::mem::take(&mut rest).split_at_mut(len);
        rest = behind;
        part
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Numbers in [-scale, scale), different for each salt.
    pub(crate) fn numbers(len: usize, scale: f32, salt: u64) -> Vec<f32> {
        (0..len as u64)
            .map(|at| {
                let bits = protocol::random::mix64(at ^ (salt << 40));
                scale * ((bits >> 40) as f32 / (1 << 23) as f32 - 1.0)
            })
            .collect()
    }

    pub(crate) fn widen(x: &[f32]) -> Vec<f64> {
        x.iter().map(|x| f64::from(*x)).collect()
    }

    pub(crate) fn bits(x: &[f32]) -> Vec<u32> {
        x.iter().map(|x| x.to_bits()).collect()
    }

    /// max|got - want| / max|want| of one tensor of finite numbers.
    pub(crate) fn distance(got: &[f64], want: &[f64]) -> f64 {
        assert_eq!(got.len(), want.len());
        assert!(got.iter().all(|x| x.is_finite()), "not all numbers were written or finite");
        let scale = want.iter().fold(1e-30f64, |scale, x| scale.max(x.abs()));
        got.iter().zip(want).fold(0.0f64, |worst, (a, b)| worst.max((a - b).abs())) / scale
    }

    const MIXED: SequenceShape<'_> = SequenceShape { active: &[4, 4, 1], hidden_size: 2, output_size: 2 };

    #[test]
    fn the_steps_of_a_block_lie_one_behind_the_other() {
        assert_eq!((MIXED.rows(), MIXED.steps()), (4, 9));
        let step = |rows, first, before, after| Step { rows, first, before, after };
        // The third step's row starts from the first of the four states that the second left.
        let steps = [step(4, 0, 0, 4), step(4, 4, 4, 8), step(1, 8, 8, 12)];
        assert_eq!(MIXED.forward().collect::<Vec<_>>(), steps);
        assert_eq!(MIXED.backward().collect::<Vec<_>>(), steps.iter().rev().copied().collect::<Vec<_>>());
        assert_eq!((steps[2].range(2), steps[2].before(2), steps[2].after(2)), (16..18, 16..18, 24..26));
        assert_eq!(steps[1].carry(3), 0..12);
        let mut states: Vec<f32> = (0..26).map(|at| at as f32).collect();
        let (before, after) = steps[2].split(&mut states, 2);
        assert_eq!(before, [16.0, 17.0]);
        assert_eq!(after, [24.0, 25.0]);
    }

    #[test]
    fn parts_are_equal_and_in_order() {
        let mut row = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let [first, second, third] = parts(&row);
        assert_eq!((first, second, third), (&[1.0, 2.0][..], &[3.0, 4.0][..], &[5.0, 6.0][..]));
        let [_, second, _] = parts_mut(&mut row);
        second.fill(0.0);
        assert_eq!(row, [1.0, 2.0, 0.0, 0.0, 5.0, 6.0]);
    }

    #[test]
    #[should_panic(expected = "lstm_forward: gates has 31 elements, expected 72 (9 rows of 8)")]
    fn a_wrong_length_is_named() {
        MIXED.check("lstm_forward").steps("gates", &[0.0; 31], 8);
    }

    #[test]
    #[should_panic(expected = "gru_forward: the active rows [2, 3] must be at least 1 and never grow")]
    fn rows_that_come_late_are_refused() {
        SequenceShape { active: &[2, 3], ..MIXED }.check("gru_forward");
    }
}
