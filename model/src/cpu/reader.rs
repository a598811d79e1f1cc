//! Reading with a trained network: one row, one step at a time, on the calling thread.
//!
//! It is the forward pass of a [`RowBlock`] of one row and one step, so its numbers are those of training and
//! evaluation by construction.

use kernels::Simd;
use protocol::layout::{ModelShape, StateLayout};

use super::block::{Network, RowBlock};
use super::weights::Weights;
use crate::device::StepInput;

/// One row on its way through a text or an image: the packed weights and the recurrent state.
pub struct CpuReader {
    weights: Weights,
    block: RowBlock,
}

impl CpuReader {
    /// A reader with these parameters `[P]` and the network's initial state.
    pub(super) fn new(simd: Simd, layout: &StateLayout, parameters: &[f32]) -> Self {
        let mut weights = Weights::new(layout, false);
        weights.pack(simd, layout, parameters, false);
        let mut block = RowBlock::default();
        block.begin_reading(&network(simd, &layout.shape, &weights));
        Self { weights, block }
    }

    /// One step; `logits` is `[V]`.
    pub(super) fn read(&mut self, simd: Simd, shape: &ModelShape, input: StepInput<'_>, logits: &mut [f32]) {
        let network = network(simd, shape, &self.weights);
        if matches!(input, StepInput::Token(token) if shape.reset_token.map(u32::from) == Some(token)) {
            self.block.begin_reading(&network);
        }
        logits.copy_from_slice(self.block.read_step(&network, input));
    }
}

fn network<'a>(simd: Simd, shape: &'a ModelShape, weights: &'a Weights) -> Network<'a> {
    Network { simd, shape, weights, dropout: None }
}
