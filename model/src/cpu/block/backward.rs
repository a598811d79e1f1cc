//! A block on its way back: from the gradient of the logits to those of the gates and of what each layer has read.

use kernels::cpu::reduce::tree_add;
use kernels::{Start, gemm};
use protocol::layout::{Head, LayerShape};

use super::{LayerWork, Network, RowBlock};
use crate::cpu::direction::{gate_width, resize_exactly};
use crate::cpu::weights::InputWeights;
use crate::network::input_has_gradient;

impl RowBlock {
    /// Back through the head.
    pub(in crate::cpu) fn head_backward(&mut self, network: &Network<'_>) {
        let (shape, width) = (network.shape, network.shape.output_width());
        resize_exactly(&mut self.d_out, self.runs.steps() * width);
        let d_read = match shape.head {
            Head::EveryStep => &mut self.d_out,
            Head::Final => {
                self.d_out.fill(0.0);
                resize_exactly(&mut self.d_features, self.rows.len() * width);
                &mut self.d_features
            }
        };
        let weights = &network.weights.head_backward;
        gemm(
            network.simd,
            self.targets.len(),
            &self.logits,
            shape.classes,
            weights,
            d_read,
            width,
            Start::Zero,
        );
    }

    /// Back through one layer, to the gradients of its gates and, if somebody asks for it, of its input.
    pub(in crate::cpu) fn layer_backward(&mut self, network: &Network<'_>, index: usize) {
        let (shape, last) = (network.shape, network.shape.num_layers() - 1);
        let layer = shape.layer(index);
        if self.works.len() < shape.num_layers() && index < last {
            self.layer_forward(network, index);
        }
        let mut d_out = std::mem::take(&mut self.d_out);
        let mut room = std::mem::take(&mut self.room);
        let work_at = self.work_of(index);
        let mut work = std::mem::take(&mut self.works[work_at]);
        self.drop(network, index, &mut d_out);
        for (at, work) in work.directions.iter_mut().enumerate() {
            work.clear_carry(&layer, &self.runs);
            if index == last && shape.head == Head::Final {
                self.carry_of_features(&layer, at, &mut work.d_h);
            }
            let d_out = if layer.directions == 1 {
                &d_out
            } else {
                self.part_of_direction(&layer, at, &d_out, &mut room.d_out);
                &room.d_out
            };
            let direction = Self::direction(network, index, at);
            direction.backward(&self.runs, &self.traces[index][at], d_out, work);
        }
        if input_has_gradient(shape, index) {
            resize_exactly(&mut d_out, self.runs.steps() * layer.input_size);
            self.input_backward(network, index, &work, &mut room.input, &mut d_out);
        }
        self.works[work_at] = work;
        (self.d_out, self.room) = (d_out, room);
    }

    /// The gradient of the final states that the head has read is that of the ends of their runs.
    fn carry_of_features(&self, layer: &LayerShape, at: usize, d_h: &mut [f32]) {
        let size = layer.output_size;
        for (row, d_features) in self.d_features.chunks_exact(layer.width()).enumerate() {
            let run = self.runs.run_at(self.last_read(row, at));
            d_h[run * size..][..size].copy_from_slice(&d_features[at * size..][..size]);
        }
    }

    /// One direction's part of the gradient of a layer's output, in its own order of steps: `[N][R]`.
    fn part_of_direction(&self, layer: &LayerShape, at: usize, d_out: &[f32], into: &mut Vec<f32>) {
        let size = layer.output_size;
        resize_exactly(into, self.runs.steps() * size);
        for (place, row) in into.chunks_exact_mut(size).enumerate() {
            let place = if at == 1 { self.runs.mirrored(place) } else { place };
            row.copy_from_slice(&d_out[place * layer.width() + at * size..][..size]);
        }
    }

    /// The gradient of a layer's input, the directions' sum: `[N][I]`.
    fn input_backward(
        &self,
        network: &Network<'_>,
        index: usize,
        work: &LayerWork,
        room: &mut Vec<f32>,
        d_input: &mut [f32],
    ) {
        let layer = network.shape.layer(index);
        let (steps, width) = (self.runs.steps(), layer.input_size);
        let stride = gate_width(&layer, network.shape.cell);
        for (at, work) in work.directions.iter().enumerate() {
            let InputWeights::Dense { backward, .. } = &network.weights.layers[index][at].input else {
                unreachable!("a one-hot input has no gradient")
            };
            if at == 0 {
                gemm(network.simd, steps, &work.gates, stride, backward, d_input, width, Start::Zero);
                continue;
            }
            resize_exactly(room, steps * width);
            gemm(network.simd, steps, &work.gates, stride, backward, room, width, Start::Zero);
            for (place, row) in d_input.chunks_exact_mut(width).enumerate() {
                tree_add(network.simd, row, &room[self.runs.mirrored(place) * width..][..width]);
            }
        }
    }
}
