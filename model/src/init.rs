//! Initial parameters: a pure function of the layout, the seed and the scheme.

use protocol::cell::Cell;
use protocol::job::Init;
use protocol::layout::StateLayout;
use protocol::random::{Purpose, Stream};

/// The flat parameter buffer `[P]` at step 0.
///
/// Each tensor draws from its own stream in row-major order, so a tensor's numbers do not depend on the tensors
/// before it. See [`Init`] for the schemes; the bounds are computed in f64 and rounded once.
pub fn initial_parameters(layout: &StateLayout, init: Init, seed: u64) -> Vec<f32> {
    let shape = &layout.shape;
    let (hidden, gates) = (shape.hidden_sizes[0], shape.cell.gates());
    let mut parameters = vec![0.0; layout.parameters()];
    for (index, tensor) in layout.tensors.iter().enumerate() {
        let values = &mut parameters[tensor.range.clone()];
        let layer = index / 4;
        let is_head = layer == shape.num_layers();
        let is_bias = tensor.shape.len() == 1;
        let bound = match init {
            Init::Pytorch => 1.0 / (hidden as f64).sqrt(),
            Init::Orthogonal | Init::TruncatedNormal | Init::Uniform | Init::Normal => todo!(),
            Init::Glorot if is_bias => 0.0,
            Init::Glorot if is_head => (6.0 / (hidden + shape.classes) as f64).sqrt(),
            Init::Glorot => (6.0 / (shape.layer(layer).input_size + hidden + gates * hidden) as f64).sqrt(),
        };
        if bound > 0.0 {
            let mut stream = Stream::new(seed, Purpose::Init, [index as u32, 0]);
            values.fill_with(|| (bound as f32) * (2.0 * stream.unit_f32() - 1.0));
        }
    }
    if init == Init::Glorot {
        let open_gates = match shape.cell {
            Cell::Rnn => 0..0,
            Cell::Lstm => hidden..2 * hidden, // f
            Cell::Gru => 0..2 * hidden,       // r, z
        };
        for layer in 0..shape.num_layers() {
            let bias = layout.layer(layer)[0].clone().bias_ih.start;
            parameters[bias + open_gates.start..bias + open_gates.end].fill(1.0);
        }
    }
    parameters
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::layout::{Head, Input, ModelShape};

    fn layout(cell: Cell) -> StateLayout {
        let shape = ModelShape {
            cell,
            num_layers: 2,
            hidden_size: 32,
            input: Input::OneHot(20),
            classes: 20,
            head: Head::EveryStep,
        };
        StateLayout::new(shape, 4)
    }

    #[test]
    fn glorot_fills_the_joint_bound_and_opens_gates() {
        let layout = layout(Cell::Lstm);
        let parameters = initial_parameters(&layout, Init::Glorot, 1);
        let first = layout.layer(0)[0].clone();
        let bound = (6.0f32 / (20 + 32 + 128) as f32).sqrt();
        for range in [first.weight_ih.clone(), first.weight_hh.clone()] {
            let largest = parameters[range].iter().fold(0.0f32, |a, w| a.max(w.abs()));
            assert!(largest <= bound && largest > 0.98 * bound, "{largest} of {bound}");
        }
        let bias = &parameters[first.bias_ih];
        assert!(bias[32..64].iter().all(|&b| b == 1.0));
        assert!(bias[..32].iter().chain(&bias[64..]).all(|&b| b == 0.0));
        assert!(parameters[first.bias_hh].iter().all(|&b| b == 0.0));
    }

    #[test]
    fn pytorch_fills_every_tensor_and_seeds_differ() {
        let layout = layout(Cell::Gru);
        let one = initial_parameters(&layout, Init::Pytorch, 1);
        let two = initial_parameters(&layout, Init::Pytorch, 2);
        let bound = 1.0 / 32f32.sqrt();
        assert!(one.iter().all(|w| w.abs() <= bound));
        let equal = one.iter().zip(&two).filter(|(a, b)| a == b).count();
        assert!(equal < 3, "{equal} of {} equal", one.len());
        assert_eq!(one, initial_parameters(&layout, Init::Pytorch, 1));
    }
}
