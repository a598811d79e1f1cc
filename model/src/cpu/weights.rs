//! Weights in the forms that the kernels read, derived from the flat parameters once per step (once in all for a
//! reader).

use kernels::PackedMatrix;
use kernels::cpu::input::token_table;
use protocol::cell::Cell;
use protocol::layout::{Input, ModelShape, StateLayout};
use rayon::prelude::*;

/// All weights, packed.
pub(super) struct Weights {
    pub(super) layers: Vec<LayerWeights>,
    /// `[H, V]` (k, n)
    pub(super) head: PackedMatrix,
    /// `[V, H]` (k, n)
    pub(super) head_backward: PackedMatrix,
    /// `[V]`
    pub(super) head_bias: Vec<f32>,
}

/// The weights of one layer.
pub(super) struct LayerWeights {
    pub(super) input: InputWeights,
    /// `[H, G·H]` (k, n)
    pub(super) hidden: PackedMatrix,
    /// `[G·H, H]` (k, n)
    pub(super) hidden_backward: PackedMatrix,
    /// `[G·H]`: what is added to the input's part: both biases, but only `bias_ih` for the GRU, whose `bias_hh`
    /// stays inside the reset.
    pub(super) bias: Vec<f32>,
    /// `[G·H]`
    pub(super) bias_hh: Vec<f32>,
}

/// How a layer reads its input.
pub(super) enum InputWeights {
    /// One-hot input: row v is `weight_ih[:, v] + bias`, `[V][G·H]`.
    Table(Vec<f32>),
    /// Dense input.
    Dense {
        /// `[I, G·H]` (k, n)
        forward: PackedMatrix,
        /// `[G·H, I]` (k, n); not used by the first layer, whose input needs no gradient.
        backward: PackedMatrix,
    },
}

impl Weights {
    /// Room for the weights of a network; for the forms that only the backward pass reads, if there will be one.
    pub(super) fn new(shape: &ModelShape, backward: bool) -> Self {
        let backward = |k, n| if backward { PackedMatrix::new(k, n) } else { PackedMatrix::default() };
        let (hidden, gates) = (shape.hidden_sizes[0], shape.cell.gates() * shape.hidden_sizes[0]);
        let layer = |layer: usize| {
            let width = shape.layer(layer).input_size;
            let input = match shape.input {
                Input::OneHot(_) if layer == 0 => InputWeights::Table(vec![0.0; width * gates]),
                _ => InputWeights::Dense {
                    forward: PackedMatrix::new(width, gates),
                    backward: backward(gates, width),
                },
            };
            LayerWeights {
                input,
                hidden: PackedMatrix::new(hidden, gates),
                hidden_backward: backward(gates, hidden),
                bias: vec![0.0; gates],
                bias_hh: vec![0.0; gates],
            }
        };
        Self {
            layers: (0..shape.num_layers()).map(layer).collect(),
            head: PackedMatrix::new(hidden, shape.classes),
            head_backward: backward(shape.classes, hidden),
            head_bias: vec![0.0; shape.classes],
        }
    }

    /// Bytes of the weights of a network, with those that only the backward pass reads.
    pub(super) fn bytes_of(shape: &ModelShape) -> usize {
        let (hidden, gates) = (shape.hidden_sizes[0], shape.cell.gates() * shape.hidden_sizes[0]);
        let both_ways = |k, n| PackedMatrix::bytes_of(k, n) + PackedMatrix::bytes_of(n, k);
        let layer = |layer: usize| {
            let width = shape.layer(layer).input_size;
            let input = match shape.input {
                Input::OneHot(_) if layer == 0 => size_of::<f32>() * width * gates,
                _ => both_ways(width, gates),
            };
            input + both_ways(hidden, gates) + size_of::<f32>() * 2 * gates
        };
        let head = both_ways(hidden, shape.classes) + size_of::<f32>() * shape.classes;
        (0..shape.num_layers()).map(layer).sum::<usize>() + head
    }

    /// Bytes that these weights hold.
    #[cfg(test)]
    pub(super) fn held_bytes(&self) -> usize {
        let packed = |matrix: &PackedMatrix| PackedMatrix::bytes_of(matrix.k(), matrix.n());
        let layer = |layer: &LayerWeights| {
            let input = match &layer.input {
                InputWeights::Table(table) => 4 * table.len(),
                InputWeights::Dense { forward, backward } => packed(forward) + packed(backward),
            };
            let biases = 4 * (layer.bias.len() + layer.bias_hh.len());
            input + packed(&layer.hidden) + packed(&layer.hidden_backward) + biases
        };
        let head = packed(&self.head) + packed(&self.head_backward) + 4 * self.head_bias.len();
        self.layers.iter().map(layer).sum::<usize>() + head
    }

    /// Packs the parameters; the forms that only the backward pass reads, if it will run (and there is room).
    pub(super) fn pack(&mut self, layout: &StateLayout, parameters: &[f32], backward: bool) {
        let (shape, hidden) = (&layout.shape, layout.shape.hidden_sizes[0]);
        self.head_bias.copy_from_slice(&parameters[layout.head().1]);
        let (head, head_backward) = (&mut self.head, &mut self.head_backward);
        let layers = &mut self.layers;
        rayon::join(
            || {
                let weight = &parameters[layout.head().0];
                head.pack_columns(weight, hidden);
                if backward {
                    head_backward.pack_rows(weight, hidden);
                }
            },
            || {
                layers.par_iter_mut().enumerate().for_each(|(index, layer)| {
                    let ranges = layout.layer(index)[0].clone();
                    let (bias_ih, bias_hh) = (&parameters[ranges.bias_ih], &parameters[ranges.bias_hh]);
                    layer.bias_hh.copy_from_slice(bias_hh);
                    layer.bias.copy_from_slice(bias_ih);
                    if shape.cell != Cell::Gru {
                        layer.bias.iter_mut().zip(bias_hh).for_each(|(sum, b)| *sum += b);
                    }
                    let weight_ih = &parameters[ranges.weight_ih];
                    let weight_hh = &parameters[ranges.weight_hh];
                    let width = shape.layer(index).input_size;
                    match &mut layer.input {
                        InputWeights::Table(table) => token_table(weight_ih, &layer.bias, table),
                        InputWeights::Dense { forward, backward: into } => {
                            forward.pack_columns(weight_ih, width);
                            if backward && index > 0 {
                                into.pack_rows(weight_ih, width);
                            }
                        }
                    }
                    layer.hidden.pack_columns(weight_hh, hidden);
                    if backward {
                        layer.hidden_backward.pack_rows(weight_hh, hidden);
                    }
                });
            },
        );
    }
}
