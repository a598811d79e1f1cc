//! What the three cells have in common: the choice between them, their state, their trace and their gradient.
//!
//! A cell sees one unbroken run of steps. Of the input it sees the part `x = W_ih input + b_ih` that is ready before the
//! first step; `y = W_hh h_{t-1} + b_hh` is its own. `R` is the width of h: `H`, or what an LSTM projects to.

use super::activation::{Activation, RecurrentActivation};
use super::gru::{Gru, Reset, gru_backward, gru_forward};
use super::lstm::{Lstm, lstm_backward, lstm_forward};
use super::parameters::Recurrent;
use super::rnn::{Rnn, rnn_backward, rnn_forward};
use protocol::cell::CellOptions;

/// A cell with its options.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Cell {
    /// Plain recurrent unit, one gate.
    Rnn(Rnn),
    /// Gates i, f, g, o.
    Lstm(Lstm),
    /// Gates r, z, n.
    Gru(Gru),
}

/// What a cell carries from step to step, or the gradient of that.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// `[R]`: the output.
    pub h: Vec<f64>,
    /// `[H]`: the LSTM's cell state; empty for the other cells.
    pub c: Vec<f64>,
}

/// What the forward pass leaves for the backward pass.
#[derive(Clone, Debug)]
pub struct Trace {
    /// RNN: empty. LSTM `[T][4·H]`: the activated gates i, f, g, o. GRU `[T][4·H]`: r, z, n and q = y_n.
    pub gates: Vec<f64>,
    /// `[T + 1][R]`, the start first.
    pub h: Vec<f64>,
    /// `[T + 1][H]`, the start first; empty where the cell has none.
    pub c: Vec<f64>,
    /// The state after the last step.
    pub end: State,
}

/// The gradient of one run of steps.
#[derive(Clone, Debug)]
pub struct SequenceGradient {
    /// `[T][G·H]`: of the input's part x.
    pub d_x: Vec<f64>,
    /// `[T][G·H]`: of the recurrent part y. Differs from `d_x` in the n of a GRU with the reset after the product.
    pub d_y: Vec<f64>,
    /// Of the state before the first step.
    pub d_start: State,
    /// Of the recurrent parameters.
    pub recurrent: Recurrent<Vec<f64>>,
}

impl Cell {
    /// The cell that a job means.
    pub fn of(cell: protocol::cell::Cell, options: &CellOptions) -> Self {
        let recurrent_activation = match options.recurrent_activation {
            protocol::cell::RecurrentActivation::Sigmoid => RecurrentActivation::Sigmoid,
            protocol::cell::RecurrentActivation::HardSigmoid => RecurrentActivation::HardSigmoid,
        };
        match cell {
            protocol::cell::Cell::Rnn => Self::Rnn(Rnn {
                activation: match options.activation {
                    protocol::cell::Activation::Tanh => Activation::Tanh,
                    protocol::cell::Activation::Relu => Activation::Relu,
                },
            }),
            protocol::cell::Cell::Lstm => Self::Lstm(Lstm {
                recurrent_activation,
                forget_bias: options.forget_bias.into(),
                peepholes: options.peepholes,
                cell_clip: options.cell_clip.map(f64::from),
                projection: options.projection,
            }),
            protocol::cell::Cell::Gru => Self::Gru(Gru {
                recurrent_activation,
                reset: match options.reset {
                    protocol::cell::Reset::Before => Reset::Before,
                    protocol::cell::Reset::After => Reset::After,
                },
            }),
        }
    }

    /// Gates, `G`.
    pub fn gates(self) -> usize {
        match self {
            Cell::Rnn(_) => 1,
            Cell::Lstm(_) => 4,
            Cell::Gru(_) => 3,
        }
    }

    /// Runs over `x` `[T][G·H]` from `start`.
    pub fn forward(self, x: &[f64], weights: &Recurrent<&[f64]>, start: &State) -> Trace {
        match self {
            Cell::Rnn(options) => rnn_forward(options, x, weights, start),
            Cell::Lstm(options) => lstm_forward(options, x, weights, start),
            Cell::Gru(options) => gru_forward(options, x, weights, start),
        }
    }

    /// The gradient, given that of every output (`d_out` `[T][R]`) and that of the state after the last step beside it.
    pub fn backward(
        self,
        trace: &Trace,
        weights: &Recurrent<&[f64]>,
        d_out: &[f64],
        d_end: &State,
    ) -> SequenceGradient {
        match self {
            Cell::Rnn(options) => rnn_backward(options, trace, weights, d_out, d_end),
            Cell::Lstm(options) => lstm_backward(options, trace, weights, d_out, d_end),
            Cell::Gru(options) => gru_backward(options, trace, weights, d_out, d_end),
        }
    }
}

impl State {
    /// The state of a cell that has no c.
    pub fn of_h(h: Vec<f64>) -> Self {
        Self { h, c: Vec::new() }
    }

    /// h, then c.
    pub fn flat(&self) -> Vec<f64> {
        [&self.h[..], &self.c].concat()
    }
}

impl Trace {
    /// The outputs of all steps, `[T][R]`.
    pub fn outputs(&self) -> &[f64] {
        &self.h[self.end.h.len()..]
    }
}
