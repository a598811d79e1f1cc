//! A batch: the rows that consecutive shards contribute to one piece of [`Work`], as they travel and as kernels
//! read them.

use std::ops::Range;

use bincode::{Decode, Encode};

use crate::layout::ModelShape;
use crate::schedule::{Schedule, Work};

/// What a data set looks like to a network: all that workers learn about it.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct DataShape {
    /// The network that fits it.
    pub model: ModelShape,
    /// The most time steps of a row, `T`.
    pub seq_len: usize,
    /// The order of work.
    pub schedule: Schedule,
}

/// The rows of one shard inside a [`Batch`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardBatch {
    /// The shard.
    pub shard: u32,
    /// Its rows, counted from the batch's first row. Empty where an evaluation has run out of samples.
    pub rows: Range<usize>,
}

/// The rows of one piece of work, for consecutive shards.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// Which work it is.
    pub work: Work,
    /// Slot of the first row. The rows fill consecutive slots.
    pub first_slot: u32,
    /// The shards, in order; their rows lie one after another.
    pub shards: Vec<ShardBatch>,
    /// What identifies each row's sample in the data set, for the ledger.
    pub sample_ids: Vec<u64>,
    /// Time steps of each row, from 1 to T.
    pub lengths: Vec<u32>,
    /// How many of them, at the row's start, are padding: they are read and have no target.
    pub paddings: Vec<u32>,
    /// What the network reads.
    pub inputs: Inputs,
}

/// What the network reads, row by row, without gaps between rows of different lengths.
#[derive(Debug, Clone, PartialEq)]
pub enum Inputs {
    /// Token ids, one more for each row than it has steps: input t is token t, target t is token t + 1.
    Tokens(Vec<u16>),
    /// Token ids, one for each step, and one label a row.
    LabelledTokens {
        /// The input.
        tokens: Vec<u16>,
        /// The class of each row.
        labels: Vec<u16>,
    },
    /// Bytes `[rows][T][I]` and one label a row. Every row has T steps.
    Bytes {
        /// The input, to be divided by 255.
        bytes: Vec<u8>,
        /// The class of each row.
        labels: Vec<u16>,
    },
}

impl Batch {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.sample_ids.len()
    }

    /// The shards as a range.
    pub fn shard_range(&self) -> Range<u32> {
        match (self.shards.first(), self.shards.last()) {
            (Some(first), Some(last)) => first.shard..last.shard + 1,
            _ => 0..0,
        }
    }

    /// Whether rows start from the initial state whatever the state of their slots: the batch begins a pass over data.
    pub fn begins_pass(&self) -> bool {
        let (Work::Train { index, .. } | Work::Evaluate { index, .. }) = self.work;
        index == 0
    }

    /// Little-endian bytes: work, first slot, first shard, rows of each shard, sample ids, lengths, paddings,
    /// inputs.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let (kind, step, epoch, index) = match self.work {
            Work::Train { step, epoch, index } => (0u32, step, epoch, index),
            Work::Evaluate { step, index } => (1, step, 0, index),
        };
        let input_kind: u32 = match self.inputs {
            Inputs::Tokens(_) => 0,
            Inputs::Bytes { .. } => 1,
            Inputs::LabelledTokens { .. } => 2,
        };
        for word in [kind, input_kind, self.first_slot, self.shard_range().start, self.shards.len() as u32] {
            out.extend(word.to_le_bytes());
        }
        for word in [step, epoch, index] {
            out.extend(word.to_le_bytes());
        }
        for shard in &self.shards {
            out.extend((shard.rows.len() as u32).to_le_bytes());
        }
        for id in &self.sample_ids {
            out.extend(id.to_le_bytes());
        }
        for steps in self.lengths.iter().chain(&self.paddings) {
            out.extend(steps.to_le_bytes());
        }
        let mut push_words = |words: &[u16]| out.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        match &self.inputs {
            Inputs::Tokens(tokens) => push_words(tokens),
            Inputs::LabelledTokens { tokens, labels } => {
                push_words(labels);
                push_words(tokens);
            }
            Inputs::Bytes { bytes, labels } => {
                push_words(labels);
                out.extend_from_slice(bytes);
            }
        }
        out
    }

    /// The inverse of [`to_bytes`](Self::to_bytes) for a data set of this shape; `None` if the bytes are not
    /// exactly such a batch, a row has no steps or more than T, or a token or label is not one of the network's.
    pub fn from_bytes(bytes: &[u8], shape: &DataShape) -> Option<Self> {
        let mut rest = bytes;
        let [kind, input_kind, first_slot, first_shard, shard_count] =
            [(); 5].map(|()| take(&mut rest).map(u32::from_le_bytes));
        let [step, epoch, index] = [(); 3].map(|()| take(&mut rest).map(u64::from_le_bytes));
        let (step, index) = (step?, index?);
        let work = match kind? {
            0 => Work::Train { step, epoch: epoch?, index },
            1 => Work::Evaluate { step, index },
            _ => return None,
        };
        let (first_shard, shard_count) = (first_shard?, shard_count?);
        let mut shards = Vec::new();
        let mut rows = 0usize;
        for shard in first_shard..first_shard.checked_add(shard_count)? {
            let len = u32::from_le_bytes(take(&mut rest)?) as usize;
            shards.push(ShardBatch { shard, rows: rows..rows + len });
            rows += len;
        }
        if rest.len() / 16 < rows {
            return None;
        }
        let sample_ids = (0..rows).map(|_| take(&mut rest).map(u64::from_le_bytes)).collect::<Option<_>>()?;
        let mut steps =
            || (0..rows).map(|_| take(&mut rest).map(u32::from_le_bytes)).collect::<Option<Vec<u32>>>();
        let (lengths, paddings) = (steps()?, steps()?);
        let fits = |(&length, &padding): (&u32, &u32)| length as usize <= shape.seq_len && padding < length;
        if !lengths.iter().zip(&paddings).all(fits) {
            return None;
        }
        let all_steps: usize = lengths.iter().map(|&length| length as usize).sum();
        let mut words = |count: usize, below: usize| {
            let (words, after) = rest.split_at_checked(2 * count)?;
            rest = after;
            let words: Vec<u16> = words.chunks_exact(2).map(|w| u16::from_le_bytes([w[0], w[1]])).collect();
            words.iter().all(|&word| usize::from(word) < below).then_some(words)
        };
        let (classes, tokens) = (shape.model.classes, shape.model.input.tokens());
        let inputs = match (input_kind?, tokens) {
            (0, Some(tokens)) => Inputs::Tokens(words(all_steps + rows, tokens.min(classes))?),
            (1, None) => {
                let labels = words(rows, classes)?;
                let len = all_steps.checked_mul(shape.model.input.size())?;
                let (bytes, after) = rest.split_at_checked(len)?;
                rest = after;
                Inputs::Bytes { bytes: bytes.to_vec(), labels }
            }
            (2, Some(tokens)) => {
                let labels = words(rows, classes)?;
                Inputs::LabelledTokens { tokens: words(all_steps, tokens)?, labels }
            }
            _ => return None,
        };
        let batch = Self { work, first_slot: first_slot?, shards, sample_ids, lengths, paddings, inputs };
        let is_whole = |batch: &Self| match batch.inputs {
            Inputs::Bytes { .. } => batch.lengths.iter().all(|&length| length as usize == shape.seq_len),
            _ => true,
        };
        (rest.is_empty() && is_whole(&batch)).then_some(batch)
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (head, after) = rest.split_first_chunk::<N>()?;
    *rest = after;
    Some(*head)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cell::{Cell, CellOptions};
    use crate::job::{InitialState, Precision};
    use crate::layout::{Head, Input};
    use proptest::prelude::*;

    fn shape(input: Input, classes: usize) -> DataShape {
        let head = if matches!(input, Input::OneHot(_)) { Head::EveryStep } else { Head::Final };
        DataShape {
            model: ModelShape {
                cell: Cell::Rnn,
                options: CellOptions::PLAIN,
                hidden_sizes: vec![4],
                bidirectional: false,
                input,
                classes,
                head,
                initial_state: InitialState::Zero,
                carries_state: false,
                reset_token: None,
                precision: Precision::F32,
            },
            seq_len: 3,
            schedule: Schedule { steps_per_epoch: 1, evaluation_batches: 0, total_steps: 1 },
        }
    }

    fn tokens() -> Batch {
        Batch {
            work: Work::Train { step: 5, epoch: 1, index: 2 },
            first_slot: 4,
            shards: vec![ShardBatch { shard: 2, rows: 0..1 }, ShardBatch { shard: 3, rows: 1..3 }],
            sample_ids: vec![10, 20, 30],
            lengths: vec![3, 1, 2],
            paddings: vec![1, 0, 0],
            inputs: Inputs::Tokens((0..9).map(|t| t % 7).collect()),
        }
    }

    #[test]
    fn batches_come_back_from_their_bytes() {
        let batch = tokens();
        let shape7 = shape(Input::OneHot(7), 7);
        assert_eq!(Batch::from_bytes(&batch.to_bytes(), &shape7).as_ref(), Some(&batch));
        assert_eq!(Batch::from_bytes(&batch.to_bytes(), &shape(Input::OneHot(6), 6)), None, "a token of 6");

        let images = Batch {
            work: Work::Evaluate { step: 9, index: 1 },
            shards: vec![ShardBatch { shard: 0, rows: 0..2 }, ShardBatch { shard: 1, rows: 2..2 }],
            sample_ids: vec![1, 2],
            lengths: vec![3, 3],
            paddings: vec![0, 0],
            inputs: Inputs::Bytes { bytes: (0..12).collect(), labels: vec![0, 9] },
            ..batch
        };
        let shape2 = shape(Input::Bytes(2), 10);
        assert_eq!(Batch::from_bytes(&images.to_bytes(), &shape2), Some(images));

        let labelled = Batch {
            inputs: Inputs::LabelledTokens { tokens: vec![0, 1, 2, 3, 4, 5], labels: vec![8, 0, 9] },
            ..tokens()
        };
        assert_eq!(
            Batch::from_bytes(&labelled.to_bytes(), &shape(Input::OneHot(6), 10)),
            Some(labelled.clone())
        );
        assert_eq!(
            Batch::from_bytes(&labelled.to_bytes(), &shape(Input::OneHot(6), 9)),
            None,
            "a label of 9"
        );
        assert_eq!(
            Batch::from_bytes(&labelled.to_bytes(), &shape(Input::OneHot(5), 10)),
            None,
            "a token of 5"
        );
    }

    #[test]
    fn rows_of_impossible_lengths_are_refused() {
        let shape = shape(Input::OneHot(7), 7);
        let with = |lengths: [u32; 3], paddings: [u32; 3], tokens: usize| {
            let inputs = Inputs::Tokens(vec![0; tokens]);
            let batch =
                Batch { lengths: lengths.into(), paddings: paddings.into(), inputs, ..self::tokens() };
            Batch::from_bytes(&batch.to_bytes(), &shape)
        };
        assert!(with([3, 1, 2], [2, 0, 1], 9).is_some());
        assert_eq!(with([4, 1, 2], [0, 0, 0], 10), None, "more than T steps");
        assert_eq!(with([3, 0, 2], [0, 0, 0], 8), None, "no step");
        assert_eq!(with([3, 1, 2], [0, 1, 0], 9), None, "nothing but padding");
    }

    #[test]
    fn cut_or_extended_bytes_are_refused() {
        let bytes = tokens().to_bytes();
        let shape = shape(Input::OneHot(7), 7);
        for len in 0..bytes.len() {
            assert_eq!(Batch::from_bytes(&bytes[..len], &shape), None, "cut to {len}");
        }
        assert_eq!(Batch::from_bytes(&[&bytes[..], &[0]].concat(), &shape), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_decoded_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Batch::from_bytes(&bytes, &shape(Input::OneHot(7), 7));
        }
    }
}
