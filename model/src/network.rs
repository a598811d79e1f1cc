//! What a network's shape says about its passes, whatever computes them.

use protocol::layout::{Head, Input, ModelShape};

/// Whether somebody asks for the gradient of a layer's input: the layer below, or the embedding.
pub(crate) fn input_has_gradient(shape: &ModelShape, layer: usize) -> bool {
    layer > 0 || matches!(shape.input, Input::Embedding { .. })
}

/// Whether a layer's input is a one-hot vector.
pub(crate) fn reads_one_hot(shape: &ModelShape, layer: usize) -> bool {
    layer == 0 && matches!(shape.input, Input::OneHot(_))
}

/// Whether somebody reads a layer's output. Where the head reads the final state, nobody reads the last layer's: the
/// state is never dropped, neither on its way through time nor for the head.
pub(crate) fn has_droppable_output(shape: &ModelShape, layer: usize) -> bool {
    shape.head == Head::EveryStep || layer + 1 < shape.num_layers()
}
