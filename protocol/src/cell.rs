//! The recurrent cells and their options, by the words of the job file.

use std::fmt;

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

/// The recurrent cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cell {
    /// `h' = act(W_ih x + b_ih + W_hh h + b_hh)`.
    Rnn,
    /// Long short-term memory, gates in the order i, f, g, o.
    Lstm,
    /// Gated recurrent unit, gates in the order r, z, n.
    Gru,
}

/// What the RNN does to its sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activation {
    /// `tanh(x)`.
    Tanh,
    /// `max(x, 0)`; its slope at 0 is 0.
    Relu,
}

/// What gates do to their sums: the LSTM's i, f and o, the GRU's r and z.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RecurrentActivation {
    /// `1 / (1 + e⁻ˣ)`.
    Sigmoid,
    /// Keras 2: `clip(0.2·x + 0.5, 0, 1)`; its slope where it is clipped is 0.
    HardSigmoid,
}

/// Where the GRU's reset gate acts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reset {
    /// On the state, before the product with `W_hn`: TensorFlow.
    Before,
    /// On the product and its bias: PyTorch, cuDNN.
    After,
}

/// The options of all cells; a cell looks at its own.
#[derive(Debug, Clone, Copy, PartialEq, Encode, Decode)]
pub struct CellOptions {
    /// RNN.
    pub activation: Activation,
    /// LSTM and GRU.
    pub recurrent_activation: RecurrentActivation,
    /// GRU.
    pub reset: Reset,
    /// LSTM: added to the forget gate's sum at every step; the stored biases do not contain it.
    pub forget_bias: f32,
    /// LSTM: diagonal weights from the cell state to the gates; i and f see `c_{t-1}`, o sees `c_t`.
    pub peepholes: bool,
    /// LSTM: largest size of a cell state, above 0; the gradient of what was cut off is zero.
    pub cell_clip: Option<f32>,
    /// LSTM: width of h where it is not the cell's own, at least 1.
    pub projection: Option<usize>,
}

impl CellOptions {
    /// PyTorch's cells with none of the extras.
    pub const PLAIN: Self = Self {
        activation: Activation::Tanh,
        recurrent_activation: RecurrentActivation::Sigmoid,
        reset: Reset::After,
        forget_bias: 0.0,
        peepholes: false,
        cell_clip: None,
        projection: None,
    };
}

/// The word of the job file: `lstm`.
impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rnn => "rnn",
            Self::Lstm => "lstm",
            Self::Gru => "gru",
        })
    }
}

impl Cell {
    /// Number of gates, `G`: blocks of `hidden_size` rows in `weight_ih` and `weight_hh`.
    pub fn gates(self) -> usize {
        match self {
            Self::Rnn => 1,
            Self::Lstm => 4,
            Self::Gru => 3,
        }
    }
}
