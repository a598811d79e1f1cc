//! One layer over the valid steps of one row: its directions side by side, and its dropout mask.

use super::algebra::{add, hadamard};
use super::cell::{Cell, State};
use super::direction::{Direction, DirectionTrace};

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

/// What the forward pass of one layer leaves.
#[derive(Clone, Debug)]
pub struct LayerTrace {
    /// `[length][in]`.
    pub inputs: Vec<f64>,
    /// Forward, then (bidirectional) backward.
    pub directions: Vec<DirectionTrace>,
    /// `[length][D·R]`: the directions' outputs side by side, behind the mask.
    pub outputs: Vec<f64>,
}

/// The gradient of one layer with respect to what it read.
#[derive(Clone, Debug)]
pub struct LayerGradient {
    /// `[length][in]`.
    pub d_inputs: Vec<f64>,
    /// Of each direction's fed state; zero where none was.
    pub d_fed: Vec<State>,
}

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

    /// Width of the layer's outputs, `D·R`.
    pub fn width(&self) -> usize {
        self.directions() * self.output_size()
    }

    /// A direction's state of zeros.
    pub fn zero_state(&self) -> State {
        let cell_size = if matches!(self.cell, Cell::Lstm(_)) { self.hidden_size } else { 0 };
        State { h: vec![0.0; self.output_size()], c: vec![0.0; cell_size] }
    }
}

/// Reads `inputs` `[length][in]` in every direction; `fed` is a state for each of them, `mask` `[T][D·R]`.
pub fn layer_forward(
    directions: &[Direction<'_>],
    inputs: Vec<f64>,
    fed: Option<&[State]>,
    resets: &[usize],
    mask: Option<&[f64]>,
) -> LayerTrace {
    let state = |direction: usize| fed.map(|states| &states[direction]);
    let traces: Vec<DirectionTrace> = (directions.iter().enumerate())
        .map(|(at, direction)| direction.forward(&inputs, state(at), resets))
        .collect();
    let mut outputs =
        beside(&traces.iter().map(|trace| (&trace.outputs[..], trace.end.h.len())).collect::<Vec<_>>());
    if let Some(mask) = mask {
        outputs = hadamard(&outputs, &mask[..outputs.len()]);
    }
    LayerTrace { inputs, directions: traces, outputs }
}

/// The gradient, given that of every output (`d_outputs` `[length][D·R]`) and that of each direction's end beside it. Adds
/// the parameters' to `total`.
pub fn layer_backward(
    directions: &[Direction<'_>],
    trace: &LayerTrace,
    mask: Option<&[f64]>,
    (d_outputs, d_ends): (&[f64], &[State]),
    total: &mut [f64],
) -> LayerGradient {
    let d_outputs = match mask {
        Some(mask) => hadamard(d_outputs, &mask[..d_outputs.len()]),
        None => d_outputs.to_vec(),
    };
    let mut all = LayerGradient { d_inputs: vec![0.0; trace.inputs.len()], d_fed: Vec::new() };
    for (at, direction) in directions.iter().enumerate() {
        let width = d_ends[at].h.len();
        let steps = d_outputs.chunks_exact(directions.len() * width);
        let d_out: Vec<f64> = steps.flat_map(|step| &step[at * width..(at + 1) * width]).copied().collect();
        let d_ends = (&d_out[..], &d_ends[at]);
        let gradient = direction.backward(&trace.inputs, &trace.directions[at], d_ends, total);
        add(&mut all.d_inputs, &gradient.d_inputs);
        all.d_fed.push(gradient.d_fed);
    }
    all
}

/// Matrices of equally many rows, each with its width, side by side.
fn beside(matrices: &[(&[f64], usize)]) -> Vec<f64> {
    let (first, width) = matrices[0];
    let row = |t: usize| matrices.iter().flat_map(move |(values, width)| &values[t * width..(t + 1) * width]);
    (0..first.len() / width).flat_map(row).copied().collect()
}
