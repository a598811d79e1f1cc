//! One direction of one layer over the valid steps of one row, in the order in which it reads them.
//!
//! A reset breaks the row into runs of steps; each starts from the initial state, and no gradient crosses a break.

use super::algebra::{add, add_outer_product, add_transposed_product, affine};
use super::cell::{State, Trace};
use super::parameters::Parameters;
use super::stack::Layer;
use std::ops::Range;

/// What the forward pass leaves: the runs between resets, at least one.
#[derive(Clone, Debug)]
pub struct DirectionTrace {
    /// In the order of reading.
    pub runs: Vec<Run>,
}

/// Steps with no reset between them.
#[derive(Clone, Debug)]
pub struct Run {
    /// Which steps.
    pub steps: Range<usize>,
    /// Whether the run starts from a state that was fed, not from the layer's initial state.
    pub fed: bool,
    /// The cell's.
    pub trace: Trace,
}

/// The gradient of a direction with respect to what it read.
#[derive(Clone, Debug)]
pub struct DirectionGradient {
    /// `[steps][in]`.
    pub d_inputs: Vec<f64>,
    /// Of the fed state; zero where no run started from it.
    pub d_fed: State,
}

impl DirectionTrace {
    /// `[steps][R]`.
    pub fn outputs(&self) -> Vec<f64> {
        self.runs.iter().flat_map(|run| run.trace.outputs()).copied().collect()
    }

    /// The state after the last step.
    pub fn end(&self) -> &State {
        &self.runs[self.runs.len() - 1].trace.end
    }
}

/// Reads `inputs` `[steps][in]` from `fed` or, where that is none, from the layer's initial state. `resets` are the
/// steps before which the state becomes the initial state, in ascending order.
pub fn direction_forward(
    layer: &Layer,
    parameters: &Parameters<&[f64]>,
    inputs: &[f64],
    fed: Option<&State>,
    resets: &[usize],
) -> DirectionTrace {
    let gates = parameters.bias_ih.len();
    let input_size = parameters.weight_ih.len() / gates;
    let x: Vec<f64> = inputs
        .chunks_exact(input_size)
        .flat_map(|input| affine(parameters.weight_ih, parameters.bias_ih, input))
        .collect();
    let initial = initial_state(layer, parameters);

    let mut breaks = vec![0];
    breaks.extend(resets.iter().filter(|&&step| step > 0));
    breaks.push(inputs.len() / input_size);
    let runs = breaks.windows(2).map(|ends| {
        let steps = ends[0]..ends[1];
        let fed = fed.filter(|_| steps.start == 0 && !resets.contains(&0));
        let x = &x[steps.start * gates..steps.end * gates];
        let trace = layer.cell.forward(x, &parameters.recurrent, fed.unwrap_or(&initial));
        Run { steps, fed: fed.is_some(), trace }
    });
    DirectionTrace { runs: runs.collect() }
}

/// The gradient, given that of every output (`d_out` `[steps][R]`) and that of the end beside it. Adds the parameters'
/// to `total`, the flat gradient in which `places` are the direction's tensors.
pub fn direction_backward(
    layer: &Layer,
    places: &Parameters<Range<usize>>,
    parameters: &Parameters<&[f64]>,
    inputs: &[f64],
    trace: &DirectionTrace,
    (d_out, d_end): (&[f64], &State),
    total: &mut [f64],
) -> DirectionGradient {
    let (gates, width) = (parameters.bias_ih.len(), layer.output_size());
    let input_size = parameters.weight_ih.len() / gates;
    let mut d_inputs = vec![0.0; inputs.len()];
    let mut d_fed = layer.zero_state();
    let mut d_end = d_end.clone();
    for run in trace.runs.iter().rev() {
        let d_out = &d_out[run.steps.start * width..run.steps.end * width];
        let gradient = layer.cell.backward(&run.trace, &parameters.recurrent, d_out, &d_end);
        d_end = layer.zero_state();
        for (t, d_x) in run.steps.clone().zip(gradient.d_x.chunks_exact(gates)) {
            let now = t * input_size..(t + 1) * input_size;
            add_outer_product(d_x, &inputs[now.clone()], &mut total[places.weight_ih.clone()]);
            add(&mut total[places.bias_ih.clone()], d_x);
            add_transposed_product(parameters.weight_ih, d_x, &mut d_inputs[now]);
        }
        places.recurrent.add(&gradient.recurrent, total);
        if run.fed {
            d_fed = gradient.d_start;
        } else if let Some(initial) = &places.initial {
            add(&mut total[initial.h.clone()], &gradient.d_start.h);
            if let Some(c) = &initial.c {
                add(&mut total[c.clone()], &gradient.d_start.c);
            }
        }
    }
    DirectionGradient { d_inputs, d_fed }
}

/// The learnt state, or zeros.
fn initial_state(layer: &Layer, parameters: &Parameters<&[f64]>) -> State {
    match &parameters.initial {
        Some(initial) => State { h: initial.h.to_vec(), c: initial.c.map_or(Vec::new(), <[f64]>::to_vec) },
        None => layer.zero_state(),
    }
}
