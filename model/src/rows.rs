//! The rows of a batch, and the runs that they are cut into: unbroken sequences of steps that start from one state.

use protocol::batch::{Batch, Inputs};
use std::ops::Range;

/// An unbroken sequence of a row's steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) row: usize,
    /// Its first step.
    pub(crate) start: usize,
    pub(crate) length: usize,
    /// It goes on from the row's carried state; otherwise it starts from the initial state.
    pub(crate) is_fed: bool,
}

/// Cuts these rows into runs, which are put behind `runs`: a row is one run, or several if it reads `reset_token`, before
/// which the state becomes the initial state. `goes_on`: rows start from a carried state, unless they begin with that token.
pub(crate) fn cut(
    batch: &BatchRows<'_>,
    rows: Range<usize>,
    goes_on: bool,
    reset_token: Option<u16>,
    runs: &mut Vec<Run>,
) {
    for (at, row) in rows.enumerate() {
        let length = batch.length(row);
        let mut run = Run { row: at, start: 0, length: 0, is_fed: goes_on };
        let resets = reset_token.map(|reset| {
            let tokens = batch.tokens(row);
            (0..length).filter(move |&t| tokens[t] == reset)
        });
        for reset in resets.into_iter().flatten() {
            if reset > 0 {
                runs.push(Run { length: reset - run.start, ..run });
            }
            run = Run { start: reset, is_fed: false, ..run };
        }
        runs.push(Run { length: length - run.start, ..run });
    }
}

/// A batch and where each of its rows begins.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BatchRows<'a> {
    pub(crate) batch: &'a Batch,
    /// Of each row: its first token or byte.
    pub(crate) starts: &'a [usize],
}

impl BatchRows<'_> {
    /// Time steps of a row.
    pub(crate) fn length(&self, row: usize) -> usize {
        self.batch.lengths[row] as usize
    }

    /// The tokens of a row, its last target included; empty where bytes are read.
    pub(crate) fn tokens(&self, row: usize) -> &[u16] {
        let (start, length) = (self.starts[row], self.length(row));
        match &self.batch.inputs {
            Inputs::Tokens(tokens) => &tokens[start..start + length + 1],
            Inputs::LabelledTokens { tokens, .. } => &tokens[start..start + length],
            Inputs::Bytes { .. } => &[],
        }
    }
}

/// Where each row of a batch begins; `width` is that of a step of bytes.
pub(crate) fn row_starts(batch: &Batch, width: usize, starts: &mut Vec<usize>) {
    let mut start = 0;
    starts.clear();
    starts.extend(batch.lengths.iter().map(|&length| {
        let length = length as usize;
        let units = match batch.inputs {
            Inputs::Tokens(_) => length + 1,
            Inputs::LabelledTokens { .. } => length,
            Inputs::Bytes { .. } => length * width,
        };
        start += units;
        start - units
    }));
}
