//! Reading with a trained network: one row, one step at a time, on the calling thread.
//!
//! It is the forward pass of a [`RowBlock`] of one row and one step, so its numbers are those of training and
//! evaluation by construction.

use kernels::Simd;
use protocol::layout::{ModelShape, StateLayout};

use super::block::RowBlock;
use super::weights::Weights;
use crate::device::StepInput;

/// One row on its way through a text or an image: the packed weights and the recurrent state.
pub struct CpuReader {
    weights: Weights,
    block: RowBlock,
}

impl CpuReader {
    /// A reader with these parameters `[P]` and a state of zeros.
    pub(super) fn new(layout: &StateLayout, parameters: &[f32]) -> Self {
        let mut weights = Weights::new(&layout.shape, false);
        weights.pack(layout, parameters, false);
        let mut block = RowBlock::default();
        block.resize(&layout.shape, 1, 0..1);
        Self { weights, block }
    }

    /// One step; `logits` is `[V]`.
    pub(super) fn read(&mut self, simd: Simd, shape: &ModelShape, input: StepInput<'_>, logits: &mut [f32]) {
        logits.copy_from_slice(self.block.forward_one_step(simd, shape, &self.weights, input));
    }
}
