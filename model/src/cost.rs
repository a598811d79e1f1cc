//! What a network costs to train, before it is trained.

use protocol::layout::{Head, Input, StateLayout};

/// Floating-point operations of the matrix products of one batch.
///
/// A product of `[m, k]` and `[k, n]` is `2·m·n·k`. With `I_l` the input width of layer l:
///
/// | product | for each (row, step), layer and direction | forward | backward |
/// |---|---|---|---|
/// | recurrent, `W_hh h`, with R the width of h | `2·G·H·R` | once | twice: gradient of h, gradient of W |
/// | projection | `2·H·R` | once | twice |
/// | input, `W_ih x` | `2·G·H·I_l` | once | twice; in the first layer once, as nobody asks for x's gradient |
/// | head | `2·D·R·V` per target | once | twice |
///
/// Tokens are a table lookup and not a product: their layer's input counts 0 times. Implementations that multiply
/// one-hot vectors execute more than this. Pointwise operations and the optimizer are not counted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Flop {
    /// Of an evaluation, and of the first half of a training step.
    pub forward: f64,
    /// Of the rest of a training step.
    pub backward: f64,
}

impl Flop {
    /// The operations of all rows of a global batch with `seq_len` time steps.
    pub fn of_batch(layout: &StateLayout, seq_len: usize) -> Self {
        let shape = &layout.shape;
        let steps = layout.batch_size as f64 * seq_len as f64;
        let targets = if shape.head == Head::EveryStep { steps } else { layout.batch_size as f64 };
        let head = targets * 2.0 * shape.output_width() as f64 * shape.classes as f64;
        let mut flop = Self { forward: head, backward: 2.0 * head };
        for (index, layer) in shape.layers().enumerate() {
            let steps = steps * layer.directions as f64;
            let (gates, width) = (layer.gate_size() as f64, layer.output_size as f64);
            let projection = match shape.options.projection {
                Some(_) => width * layer.hidden_size as f64,
                None => 0.0,
            };
            let input = steps * 2.0 * gates * layer.input_size as f64;
            let recurrent = steps * 2.0 * (gates * width + projection);
            let (input_forward, input_backward) = match (index, shape.input) {
                (0, Input::OneHot(_)) => (0.0, 0.0),
                (0, Input::Bytes(_)) => (input, input),
                _ => (input, 2.0 * input),
            };
            flop.forward += recurrent + input_forward;
            flop.backward += 2.0 * recurrent + input_backward;
        }
        flop
    }

    /// Of a training step.
    pub fn step(&self) -> f64 {
        self.forward + self.backward
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::job::JobFile;

    #[test]
    fn operations_are_counted_as_by_hand() {
        let gflop = |preset, input_size, classes, seq_len| {
            let job = JobFile::resolve(preset, None, &[]).unwrap().job;
            Flop::of_batch(&StateLayout::of(&job, input_size, classes), seq_len).step() / 1e9
        };
        // 64·50 · 6 · (512·128 + 512·256 + 128·65)
        assert_eq!(gflop("char-lstm", 65, 65, 50), 3.934_617_6);
        // 150·28 · (6·150·150 + 4·150·28) + 150 · 6·150·10
        assert_eq!(gflop("mnist-rnn", 28, 10, 28), 0.638_91);
        // As other programs count them; where the input is one-hot they count its gradient too.
        let counted = [("mnist-lstm", 28, 10, 28, 2.55), ("mnist-gru", 28, 10, 28, 1.91)];
        for (preset, input_size, classes, seq_len, theirs) in counted {
            let ours = gflop(preset, input_size, classes, seq_len);
            assert!((ours - theirs).abs() < 0.006, "{preset}: {ours}, counted as {theirs}");
        }
        let one_hot_gradient = 64.0 * 50.0 * 2.0 * 512.0 * 65.0 / 1e9;
        assert!((gflop("char-lstm", 65, 65, 50) + one_hot_gradient - 4.15).abs() < 0.006);
    }
}
