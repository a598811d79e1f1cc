//! Recurrent layers on top of each other, over one row.
//!
//! Only the valid steps of a row are computed; behind them outputs are zero and states stay what they were. A layer reads
//! what the layer below puts out behind its dropout mask; the states carried are undropped.
//!
//! A row's state is flat, `[state]`: per layer, per direction: h, then (LSTM) c.

use super::cell::State;
use super::direction::{Direction, Reading};
use super::layer::{Layer, LayerTrace, layer_backward, layer_forward};
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

impl Stack {
    /// Width of the last layer's outputs, `D·R`.
    pub fn output_size(&self) -> usize {
        self.layers[self.layers.len() - 1].width()
    }

    /// Elements of one row's state.
    pub fn state_size(&self) -> usize {
        self.layers.iter().map(|layer| layer.directions() * layer.zero_state().flat().len()).sum()
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
        let fed = row.fed_state.map(|state| self.by_layer(state));
        let mut outputs = row.inputs[..row.length * self.input_size].to_vec();
        let (mut layers, mut final_state) = (Vec::new(), Vec::new());
        for at in 0..self.layers.len() {
            let directions = self.directions(places, params, at);
            let fed = fed.as_ref().map(|states| &states[at][..]);
            let mask = row.masks.get(at).copied();
            let trace = layer_forward(&directions, outputs, fed, row.resets, mask);
            outputs = trace.outputs.clone();
            final_state.extend(trace.directions.iter().flat_map(|direction| direction.end.flat()));
            layers.push(trace);
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
        let d_ends = self.by_layer(d_final_state);
        let mut d_outputs = d_outputs[..row.length * self.output_size()].to_vec();
        let mut d_fed = Vec::new();
        for (at, trace) in trace.layers.iter().enumerate().rev() {
            let directions = self.directions(places, params, at);
            let mask = row.masks.get(at).copied();
            let gradient = layer_backward(&directions, trace, mask, (&d_outputs, &d_ends[at]), total);
            d_outputs = gradient.d_inputs;
            d_fed.push(gradient.d_fed);
        }
        d_outputs.resize(row.inputs.len(), 0.0);
        let d_fed_state = d_fed.iter().rev().flatten().flat_map(State::flat).collect();
        StackGradient { d_inputs: d_outputs, d_fed_state }
    }

    /// A flat state taken apart: per layer, per direction.
    pub fn by_layer(&self, mut flat: &[f64]) -> Vec<Vec<State>> {
        assert_eq!(flat.len(), self.state_size());
        let mut take = |len: usize| {
            let (part, rest) = flat.split_at(len);
            flat = rest;
            part.to_vec()
        };
        let mut states = Vec::new();
        for layer in &self.layers {
            let State { h, c } = layer.zero_state();
            states.push(
                (0..layer.directions()).map(|_| State { h: take(h.len()), c: take(c.len()) }).collect(),
            );
        }
        states
    }

    fn directions<'a>(&self, places: &'a Places, params: &'a [f64], layer: usize) -> Vec<Direction<'a>> {
        let readings = [Reading::Forward, Reading::Backward];
        let direction = |(places, reading): (&'a Parameters<Range<usize>>, Reading)| Direction {
            layer: self.layers[layer],
            places,
            parameters: places.of(params),
            reading,
        };
        places[layer].iter().zip(readings).map(direction).collect()
    }
}
