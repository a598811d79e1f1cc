//! A whole network over a batch: input, recurrent layers, a linear head, the summed cross-entropy and its gradient.
//!
//! Parameters are one flat slice: `embedding.weight [tokens, in]` where there is one, the stack's tensors in PyTorch's
//! order, `head.weight [V, D·R]`, `head.bias [V]`.

use super::algebra::add;
use super::head::{Head, head_forward_backward};
use super::parameters::Layout;
use super::stack::{Places, Row, Stack, StackTrace};
use std::ops::Range;

/// The architecture.
#[derive(Clone, Debug)]
pub struct Network {
    /// Number of tokens in the table whose rows, as wide as the stack's input, are the input. Without a table tokens are
    /// one-hot vectors.
    pub embedding: Option<usize>,
    /// The recurrent layers.
    pub stack: Stack,
    /// Where the head sits.
    pub head: Head,
    /// Number of classes, `V`.
    pub classes: usize,
}

/// The input of a batch.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// `[rows][T]` token ids.
    Tokens(&'a [u32]),
    /// `[rows][T][in]`.
    Dense(&'a [f64]),
}

/// The rows of a batch. What is `None` is not there: full rows, the initial state, no resets, nothing dropped.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// Number of rows.
    pub rows: usize,
    /// Steps of a row with its padding, `T`.
    pub seq_len: usize,
    /// What is read.
    pub input: Input<'a>,
    /// Classes, as [`Head`] wants them; those of padding are not looked at.
    pub targets: &'a [u32],
    /// `[rows]`: valid steps of each row.
    pub lengths: Option<&'a [usize]>,
    /// `[rows][state]`: where the rows start. Laid out as [`Outcome::final_state`].
    pub fed_state: Option<&'a [f64]>,
    /// `[rows]`: the steps of each row, ascending, before which its state becomes the initial state.
    pub resets: Option<&'a [Vec<usize>]>,
    /// Per layer `[rows][T][D·R]`: what the outputs are multiplied with, 0 or 1/keep.
    pub masks: Option<&'a [Vec<f64>]>,
}

/// What one batch yields.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// The sum, not the mean, of the predictions' cross-entropies, in nats.
    pub loss_sum: f64,
    /// Predictions whose first largest logit is the target's.
    pub correct: usize,
    /// Number of predictions.
    pub predictions: usize,
    /// `[rows][state]`: per layer, per direction: h, then (LSTM) c, after the last valid step.
    pub final_state: Vec<f64>,
    /// `[P]`: the gradient of `loss_sum`; zeros after an evaluation.
    pub gradient: Vec<f64>,
    /// `[rows][state]`: that of the fed state, zeros where none was; empty after an evaluation.
    pub d_fed_state: Vec<f64>,
    /// Each row's.
    pub traces: Vec<StackTrace>,
}

/// Where the tensors of a network lie.
struct NetworkPlaces {
    embedding: Option<Range<usize>>,
    stack: Places,
    head_weight: Range<usize>,
    head_bias: Range<usize>,
}

impl<'a> Batch<'a> {
    /// Full rows from the initial state, nothing reset, nothing dropped.
    pub fn new(rows: usize, seq_len: usize, input: Input<'a>, targets: &'a [u32]) -> Self {
        Self { rows, seq_len, input, targets, lengths: None, fed_state: None, resets: None, masks: None }
    }

    /// The part of one row of numbers that each row has equally many of.
    fn part<T>(&self, all: &'a [T], row: usize) -> &'a [T] {
        let len = all.len() / self.rows;
        &all[row * len..(row + 1) * len]
    }
}

impl Network {
    /// All tensors, by name.
    pub fn layout(&self) -> Layout {
        self.places().0
    }

    /// Forward and backward over a batch.
    pub fn forward_backward(&self, params: &[f64], batch: &Batch<'_>) -> Outcome {
        self.run(params, batch, true)
    }

    /// Forward alone.
    pub fn evaluate(&self, params: &[f64], batch: &Batch<'_>) -> Outcome {
        self.run(params, batch, false)
    }

    fn run(&self, params: &[f64], batch: &Batch<'_>, backward: bool) -> Outcome {
        let (layout, places) = self.places();
        assert_eq!(params.len(), layout.parameter_count());
        let mut outcome = Outcome { gradient: vec![0.0; params.len()], ..Outcome::default() };
        for at in 0..batch.rows {
            let inputs = self.inputs(&places, params, batch, at);
            let masks: Vec<&[f64]> =
                batch.masks.iter().copied().flatten().map(|mask| batch.part(mask, at)).collect();
            let row = Row {
                inputs: &inputs,
                length: batch.lengths.map_or(batch.seq_len, |lengths| lengths[at]),
                fed_state: batch.fed_state.map(|states| batch.part(states, at)),
                resets: batch.resets.map_or(&[], |resets| &resets[at]),
                masks: &masks,
            };
            let trace = self.stack.forward(&places.stack, params, row);
            let head = head_forward_backward(
                self.head,
                (&params[places.head_weight.clone()], &params[places.head_bias.clone()]),
                &self.stack,
                (&trace, row.length),
                batch.part(batch.targets, at),
            );
            outcome.loss_sum += head.predictions.iter().map(|prediction| prediction.loss).sum::<f64>();
            outcome.correct += head.predictions.iter().filter(|prediction| prediction.correct).count();
            outcome.predictions += head.predictions.len();
            if backward {
                let d_ends = (&head.d_outputs[..], &head.d_final_state[..]);
                let total = &mut outcome.gradient;
                add(&mut total[places.head_weight.clone()], &head.d_weight);
                add(&mut total[places.head_bias.clone()], &head.d_bias);
                let gradient = self.stack.backward(&places.stack, params, row, &trace, d_ends, total);
                self.add_embedding_gradient(&places, batch, at, &gradient.d_inputs, total);
                outcome.d_fed_state.extend(gradient.d_fed_state);
            }
            outcome.final_state.extend(&trace.final_state);
            outcome.traces.push(trace);
        }
        outcome
    }

    /// One row's inputs, `[T][in]`.
    fn inputs(&self, places: &NetworkPlaces, params: &[f64], batch: &Batch<'_>, row: usize) -> Vec<f64> {
        let width = self.stack.input_size;
        let one_hot = |token: u32| (0..width).map(move |at| f64::from(at == token as usize));
        match (batch.input, &places.embedding) {
            (Input::Dense(values), _) => batch.part(values, row).to_vec(),
            (Input::Tokens(tokens), None) => {
                batch.part(tokens, row).iter().flat_map(|&token| one_hot(token)).collect()
            }
            (Input::Tokens(tokens), Some(table)) => {
                let table = &params[table.clone()];
                let rows =
                    batch.part(tokens, row).iter().map(|&token| &table[token as usize * width..][..width]);
                rows.flatten().copied().collect()
            }
        }
    }

    fn add_embedding_gradient(
        &self,
        places: &NetworkPlaces,
        batch: &Batch<'_>,
        row: usize,
        d_inputs: &[f64],
        total: &mut [f64],
    ) {
        let width = self.stack.input_size;
        if let (Input::Tokens(tokens), Some(table)) = (batch.input, &places.embedding) {
            let table = &mut total[table.clone()];
            for (&token, d_input) in batch.part(tokens, row).iter().zip(d_inputs.chunks_exact(width)) {
                add(&mut table[token as usize * width..][..width], d_input);
            }
        }
    }

    fn places(&self) -> (Layout, NetworkPlaces) {
        let mut layout = Layout::default();
        let mut place = |name: &str, shape: &[usize]| layout.place(name.into(), shape);
        let embedding =
            self.embedding.map(|tokens| place("embedding.weight", &[tokens, self.stack.input_size]));
        let stack = self.stack.place(&mut layout);
        let head_weight = layout.place("head.weight".into(), &[self.classes, self.stack.output_size()]);
        let head_bias = layout.place("head.bias".into(), &[self.classes]);
        (layout, NetworkPlaces { embedding, stack, head_weight, head_bias })
    }
}
