//! Reading with a trained network: a batch of one row and one step, again and again.

use cubecl::prelude::*;
use kernels::cube::buffer::Buffer;
use kernels::cube::elements;
use kernels::cube::output::Dropout;
use kernels::cube::rows::Extent;
use protocol::layout::StateLayout;

use super::tables::Tables;
use super::weights::{Recipe, Weights};
use super::work::{Network, Work};
use crate::device::{Result, StepInput};

/// One row on its way through a text or an image: the weights and the recurrent state.
pub struct CubeReader {
    parameters: Buffer,
    weights: Weights,
    work: Work,
    /// None of any layer's.
    dropout: Vec<Option<Dropout>>,
    is_new: bool,
}

impl CubeReader {
    /// A reader with these parameters `[P]` and the network's initial state.
    pub(super) fn new<R: Runtime>(
        client: &ComputeClient<R>,
        layout: &StateLayout,
        recipe: &Recipe,
        parameters: &Buffer,
    ) -> Self {
        let own = Buffer::new(client, parameters.len());
        elements::copy(client, parameters, 0..parameters.len(), &own, 0);
        let weights = recipe.weights(client, &layout.shape);
        recipe.derive(client, &own, &weights);
        let work = Work::new(client, layout, (Extent { steps: 1, runs: 1 }, 1), false, false);
        Self { parameters: own, weights, work, dropout: vec![None; layout.shape.num_layers()], is_new: true }
    }

    /// One step; `logits` is `[V]`.
    pub(super) fn read<R: Runtime>(
        &mut self,
        client: &ComputeClient<R>,
        layout: &StateLayout,
        input: StepInput<'_>,
        logits: &mut [f32],
    ) -> Result<()> {
        let shape = &layout.shape;
        let resets =
            matches!(input, StepInput::Token(token) if shape.reset_token.map(u32::from) == Some(token));
        let tables = Tables::of_input(client, shape, input);
        let Self { parameters, weights, work, dropout, is_new } = self;
        let network = Network { client, layout, parameters, weights, dropout };
        if *is_new || resets {
            // Nothing is read of the state: the run does not go on from any.
            work.load_state(&network, &tables, parameters);
            *is_new = false;
        } else {
            work.go_on(client);
        }
        let values = work.project(&network, &tables).read_floats(client, 0..shape.classes)?;
        logits.copy_from_slice(&values);
        Ok(())
    }
}
