//! The pointwise functions that cells may choose from, and their slopes. A slope is given from the function's value, as
//! a trace keeps no more; at a corner it is 0. Reference: `oracle::activation`.
//!
//! The choice is a constant: each is compiled on its own, and the loop over units has no branch in it.

use super::math::{hard_sigmoid, relu, sigmoid, tanh};

/// What a plain recurrent unit does to its sum.
#[inline(always)]
pub(crate) fn unit<const RELU: bool>(x: f32) -> f32 {
    if RELU { relu(x) } else { tanh(x) }
}

/// The derivative of [`unit`] where its value is `y`.
#[inline(always)]
pub(crate) fn unit_slope<const RELU: bool>(y: f32) -> f32 {
    if RELU { f32::from(y > 0.0) } else { (-y).mul_add(y, 1.0) }
}

/// What the LSTM's i, f and o and the GRU's r and z do to their sums.
#[inline(always)]
pub(crate) fn gate<const HARD: bool>(x: f32) -> f32 {
    if HARD { hard_sigmoid(x) } else { sigmoid(x) }
}

/// The derivative of [`gate`] where its value is `y`.
#[inline(always)]
pub(crate) fn gate_slope<const HARD: bool>(y: f32) -> f32 {
    if HARD { if 0.0 < y && y < 1.0 { 0.2 } else { 0.0 } } else { y * (1.0 - y) }
}
