//! The pointwise functions of the cells. A slope is given from the function's value, as a trace keeps no more; at a
//! corner it is 0.

/// What a plain recurrent unit applies to its sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// Hyperbolic tangent.
    Tanh,
    /// `max(x, 0)`.
    Relu,
}

/// What the gates of LSTM and GRU apply to their sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecurrentActivation {
    /// `1 / (1 + e^-x)`.
    Sigmoid,
    /// Keras 2: `clip(0.2·x + 0.5, 0, 1)`.
    HardSigmoid,
}

impl Activation {
    /// The function's value.
    pub fn value(self, x: f64) -> f64 {
        match self {
            Activation::Tanh => libm::tanh(x),
            Activation::Relu => x.max(0.0),
        }
    }

    /// The derivative where the function's value is `y`.
    pub fn slope(self, y: f64) -> f64 {
        match self {
            Activation::Tanh => 1.0 - y * y,
            Activation::Relu => f64::from(y > 0.0),
        }
    }
}

impl RecurrentActivation {
    /// The function's value.
    pub fn value(self, x: f64) -> f64 {
        match self {
            RecurrentActivation::Sigmoid => 1.0 / (1.0 + libm::exp(-x)),
            RecurrentActivation::HardSigmoid => (0.2 * x + 0.5).clamp(0.0, 1.0),
        }
    }

    /// The derivative where the function's value is `y`.
    pub fn slope(self, y: f64) -> f64 {
        match self {
            RecurrentActivation::Sigmoid => y * (1.0 - y),
            RecurrentActivation::HardSigmoid if 0.0 < y && y < 1.0 => 0.2,
            RecurrentActivation::HardSigmoid => 0.0,
        }
    }
}
