//! Recurrent layers on top of each other, over one row.
//!
//! Only the valid steps of a row are computed; behind them outputs are zero and states stay what they were. A layer's
//! outputs are its directions' side by side, forward first, times its dropout mask; the states carried are undropped.
//!
//! A row's state is flat, `[state]`: per layer, per direction: h, then (LSTM) c.

use super::algebra::{add, hadamard};
use super::cell::{Cell, State};
use super::direction::{DirectionTrace, direction_backward, direction_forward};
use super::parameters::{Layout, Parameters};
use std::ops::Range;

/// The recurrent part of a network.
#[derive(Clone, Debug)]
pub struct Stack {
    /// Width of the input.
    pub input_size: usize,
    /// From the input upwards.
    pub layers: Vec<Layer>,
    /// Where a row starts whose state is not fed, and where it starts again after a reset.
    pub initial_state: InitialState,
}

/// One layer; its neighbours may have other cells and widths.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Layer {
    /// The cell of each direction.
    pub cell: Cell,
    /// Units of each direction, `H`.
    pub hidden_size: usize,
    /// Whether a second direction reads each row from its last valid step to its first.
    pub bidirectional: bool,
}

/// The initial state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InitialState {
    /// Zeros.
    Zero,
    /// A parameter for each layer, direction and part of the state.
    Learnt,
}

/// One row.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    /// `[T][in]`; steps from `length` on are padding.
    pub inputs: &'a [f64],
    /// Valid steps.
    pub length: usize,
    /// `[state]`: where the row starts, if not at the initial state.
    pub fed_state: Option<&'a [f64]>,
    /// The steps, ascending, before which the state becomes the initial state. A break between steps `t - 1` and `t` is
    /// one for both directions; before step 0 only the forward direction is reset.
    pub resets: &'a [usize],
    /// Per layer `[T][D·R]`: what the outputs are multiplied with. Empty: nothing is dropped.
    pub masks: &'a [&'a [f64]],
}

/// What the forward pass leaves.
#[derive(Clone, Debug)]
pub struct StackTrace {
    /// Per layer.
    pub layers: Vec<LayerTrace>,
    /// `[T][D·R]` of the last layer.
    pub outputs: Vec<f64>,
    /// `[state]`.
    pub final_state: Vec<f64>,
}

/// What the forward pass of one layer leaves.
#[derive(Clone, Debug)]
pub struct LayerTrace {
    /// `[length][in]`.
    pub inputs: Vec<f64>,
    /// Forward, then (bidirectional) backward.
    pub directions: Vec<DirectionTrace>,
}

/// The gradient of a stack with respect to what it read.
#[derive(Clone, Debug)]
pub struct StackGradient {
    /// `[T][in]`.
    pub d_inputs: Vec<f64>,
    /// `[state]`: of the fed state; zero where none was.
    pub d_fed_state: Vec<f64>,
}

/// Where the parameters of each layer and direction lie.
pub type Places = Vec<Vec<Parameters<Range<usize>>>>;

impl Layer {
    /// Width of a direction's output, `R`.
    pub fn output_size(&self) -> usize {
        match self.cell {
            Cell::Lstm(options) => options.projection.unwrap_or(self.hidden_size),
            _ => self.hidden_size,
        }
    }

    /// Number of directions, `D`.
    pub fn directions(&self) -> usize {
        1 + usize::from(self.bidirectional)
    }

    /// A direction's state of zeros.
    pub fn zero_state(&self) -> State {
        let cell_size = if matches!(self.cell, Cell::Lstm(_)) { self.hidden_size } else { 0 };
        State { h: vec![0.0; self.output_size()], c: vec![0.0; cell_size] }
    }

    fn width(&self) -> usize {
        self.directions() * self.output_size()
    }
}

impl Stack {
    /// Width of the last layer's outputs, `D·R`.
    pub fn output_size(&self) -> usize {
        self.layers[self.layers.len() - 1].width()
    }

    /// Elements of one row's state.
    pub fn state_size(&self) -> usize {
        let size = |layer: &Layer| {
            let State { h, c } = layer.zero_state();
            layer.directions() * (h.len() + c.len())
        };
        self.layers.iter().map(size).sum()
    }

    /// Puts the parameters behind those in `layout`, in PyTorch's order.
    pub fn place(&self, layout: &mut Layout) -> Places {
        let mut input_size = self.input_size;
        let mut places = Vec::new();
        for (at, layer) in self.layers.iter().enumerate() {
            let suffixes = [format!("_l{at}"), format!("_l{at}_reverse")];
            let directions = suffixes[..layer.directions()]
                .iter()
                .map(|suffix| Parameters::place(layout, suffix, layer, input_size, self.initial_state));
            places.push(directions.collect());
            input_size = layer.width();
        }
        places
    }

    /// Runs one row; `params` is the flat slice that `places` are in.
    pub fn forward(&self, places: &Places, params: &[f64], row: Row<'_>) -> StackTrace {
        let mut outputs = row.inputs[..row.length * self.input_size].to_vec();
        let mut fed = row.fed_state.map(|state| self.by_direction(state));
        let (mut layers, mut final_state) = (Vec::new(), Vec::new());
        for (at, (layer, places)) in self.layers.iter().zip(places).enumerate() {
            let inputs = outputs;
            let width = layer.output_size();
            let mut directions = Vec::new();
            outputs = vec![0.0; row.length * layer.width()];
            for (direction, places) in places.iter().enumerate() {
                let reading = Reading { reversed: direction == 1 };
                let read = reading.order(&inputs, row.length);
                let fed = fed.as_mut().map(|states| states.remove(0));
                let resets = reading.resets(row.resets, row.length);
                let trace = direction_forward(layer, &places.of(params), &read, fed.as_ref(), &resets);
                let written = reading.order(&trace.outputs(), row.length);
                for (step, written) in
                    outputs.chunks_exact_mut(layer.width()).zip(written.chunks_exact(width))
                {
                    step[direction * width..(direction + 1) * width].copy_from_slice(written);
                }
                final_state.extend([&trace.end().h[..], &trace.end().c].concat());
                directions.push(trace);
            }
            if let Some(mask) = row.masks.get(at) {
                outputs = hadamard(&outputs, &mask[..outputs.len()]);
            }
            layers.push(LayerTrace { inputs, directions });
        }
        let seq_len = row.inputs.len() / self.input_size;
        outputs.resize(seq_len * self.output_size(), 0.0);
        StackTrace { layers, outputs, final_state }
    }

    /// The gradient of one row, given that of every output (`d_outputs` `[T][D·R]`) and that of the final state beside it
    /// (`d_final_state` `[state]`). Adds the parameters' to `total`.
    pub fn backward(
        &self,
        places: &Places,
        params: &[f64],
        row: Row<'_>,
        trace: &StackTrace,
        (d_outputs, d_final_state): (&[f64], &[f64]),
        total: &mut [f64],
    ) -> StackGradient {
        let mut d_outputs = d_outputs[..row.length * self.output_size()].to_vec();
        let mut d_ends = self.by_direction(d_final_state);
        let mut d_fed = Vec::new();
        for (at, (layer, places)) in self.layers.iter().zip(places).enumerate().rev() {
            let LayerTrace { inputs, directions } = &trace.layers[at];
            if let Some(mask) = row.masks.get(at) {
                d_outputs = hadamard(&d_outputs, &mask[..d_outputs.len()]);
            }
            let width = layer.output_size();
            let mut d_inputs = vec![0.0; inputs.len()];
            for (direction, places) in places.iter().enumerate().rev() {
                let reading = Reading { reversed: direction == 1 };
                let own = direction * width..(direction + 1) * width;
                let d_out: Vec<f64> = d_outputs
                    .chunks_exact(layer.width())
                    .flat_map(|step| &step[own.clone()])
                    .copied()
                    .collect();
                let gradient = direction_backward(
                    layer,
                    places,
                    &places.of(params),
                    &reading.order(inputs, row.length),
                    &directions[direction],
                    (&reading.order(&d_out, row.length), &d_ends.remove(d_ends.len() - 1)),
                    total,
                );
                add(&mut d_inputs, &reading.order(&gradient.d_inputs, row.length));
                d_fed.insert(0, gradient.d_fed);
            }
            d_outputs = d_inputs;
        }
        d_outputs.resize(row.inputs.len(), 0.0);
        let d_fed_state = d_fed.into_iter().flat_map(|State { h, c }| [h, c].concat()).collect();
        StackGradient { d_inputs: d_outputs, d_fed_state }
    }

    /// A flat state taken apart: per layer, per direction.
    pub fn by_direction(&self, mut flat: &[f64]) -> Vec<State> {
        assert_eq!(flat.len(), self.state_size());
        let mut take = |len: usize| {
            let (part, rest) = flat.split_at(len);
            flat = rest;
            part.to_vec()
        };
        let zeros = self.layers.iter().flat_map(|layer| vec![layer.zero_state(); layer.directions()]);
        zeros.map(|State { h, c }| State { h: take(h.len()), c: take(c.len()) }).collect()
    }
}

/// The order in which a direction reads a row.
struct Reading {
    reversed: bool,
}

impl Reading {
    /// `[length][width]` into the order of reading, or back: it is its own inverse.
    fn order(&self, steps: &[f64], length: usize) -> Vec<f64> {
        if !self.reversed || length == 0 {
            return steps.to_vec();
        }
        steps.chunks_exact(steps.len() / length).rev().flatten().copied().collect()
    }

    /// The resets in the order of reading. What lies between steps `t - 1` and `t` lies, read from the end, between the
    /// steps `length - t - 1` and `length - t`.
    fn resets(&self, resets: &[usize], length: usize) -> Vec<usize> {
        let valid = resets.iter().copied().filter(|&step| step < length);
        if self.reversed {
            valid.filter(|&step| step > 0).map(|step| length - step).rev().collect()
        } else {
            valid.collect()
        }
    }
}
