//! One direction of one layer over the valid steps of one row.
//!
//! A reset breaks the row into runs of steps; each starts from the initial state, and no gradient crosses a break.

use super::algebra::{add, add_outer_product, add_transposed_product, affine};
use super::cell::{State, Trace};
use super::layer::Layer;
use super::parameters::Parameters;
use std::ops::Range;

/// One direction: what it is made of and how it reads.
#[derive(Clone, Debug)]
pub struct Direction<'a> {
    /// Its layer.
    pub layer: Layer,
    /// Where its parameters lie in the flat slice.
    pub places: &'a Parameters<Range<usize>>,
    /// Its parameters.
    pub parameters: Parameters<&'a [f64]>,
    /// The order of its steps.
    pub reading: Reading,
}

/// The order in which a direction reads a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// From the first step on.
    Forward,
    /// From the last valid step to the first.
    Backward,
}

/// What the forward pass leaves.
#[derive(Clone, Debug)]
pub struct DirectionTrace {
    /// The runs between resets, at least one, in the order of reading.
    pub runs: Vec<Run>,
    /// `[length][R]`, in the row's order.
    pub outputs: Vec<f64>,
    /// The state after the step that is read last.
    pub end: State,
}

/// Steps with no reset between them.
#[derive(Clone, Debug)]
pub struct Run {
    /// Which steps, counted in the order of reading.
    pub steps: Range<usize>,
    /// Whether the run starts from a state that was fed, not from the layer's initial state.
    pub fed: bool,
    /// The cell's.
    pub trace: Trace,
}

/// The gradient of a direction with respect to what it read.
#[derive(Clone, Debug)]
pub struct DirectionGradient {
    /// `[length][in]`, in the row's order.
    pub d_inputs: Vec<f64>,
    /// Of the fed state; zero where no run started from it.
    pub d_fed: State,
}

impl Direction<'_> {
    /// Reads `inputs` `[length][in]` from `fed` or, where that is none, from the initial state. `resets` are the steps of
    /// the row, ascending, before which the state becomes the initial state.
    pub fn forward(&self, inputs: &[f64], fed: Option<&State>, resets: &[usize]) -> DirectionTrace {
        let (gates, input_size) = (self.parameters.bias_ih.len(), self.input_size());
        let read = self.reading.order(inputs, input_size);
        let x: Vec<f64> = read
            .chunks_exact(input_size)
            .flat_map(|input| affine(self.parameters.weight_ih, self.parameters.bias_ih, input))
            .collect();
        let length = inputs.len() / input_size;
        let resets = self.reading.resets(resets, length);
        let initial = self.initial_state();

        let mut breaks = vec![0];
        breaks.extend(resets.iter().filter(|&&step| step > 0));
        breaks.push(length);
        let run = |steps: Range<usize>| {
            let fed = fed.filter(|_| steps.start == 0 && !resets.contains(&0));
            let x = &x[steps.start * gates..steps.end * gates];
            let trace = self.layer.cell.forward(x, &self.parameters.recurrent, fed.unwrap_or(&initial));
            Run { steps, fed: fed.is_some(), trace }
        };
        let runs: Vec<Run> = breaks.windows(2).map(|ends| run(ends[0]..ends[1])).collect();
        let outputs: Vec<f64> = runs.iter().flat_map(|run| run.trace.outputs()).copied().collect();
        let outputs = self.reading.order(&outputs, self.layer.output_size());
        let end = runs[runs.len() - 1].trace.end.clone();
        DirectionTrace { runs, outputs, end }
    }

    /// The gradient, given that of every output (`d_out` `[length][R]`) and that of the end beside it. Adds the
    /// parameters' to `total`.
    pub fn backward(
        &self,
        inputs: &[f64],
        trace: &DirectionTrace,
        (d_out, d_end): (&[f64], &State),
        total: &mut [f64],
    ) -> DirectionGradient {
        let (gates, input_size) = (self.parameters.bias_ih.len(), self.input_size());
        let width = self.layer.output_size();
        let (read, d_out) = (self.reading.order(inputs, input_size), self.reading.order(d_out, width));
        let mut d_read = vec![0.0; inputs.len()];
        let mut d_fed = self.layer.zero_state();
        let mut d_end = d_end.clone();
        for run in trace.runs.iter().rev() {
            let d_out = &d_out[run.steps.start * width..run.steps.end * width];
            let gradient = self.layer.cell.backward(&run.trace, &self.parameters.recurrent, d_out, &d_end);
            d_end = self.layer.zero_state();
            for (t, d_x) in run.steps.clone().zip(gradient.d_x.chunks_exact(gates)) {
                let now = t * input_size..(t + 1) * input_size;
                add_outer_product(d_x, &read[now.clone()], &mut total[self.places.weight_ih.clone()]);
                add(&mut total[self.places.bias_ih.clone()], d_x);
                add_transposed_product(self.parameters.weight_ih, d_x, &mut d_read[now]);
            }
            self.places.recurrent.add(&gradient.recurrent, total);
            if run.fed {
                d_fed = gradient.d_start;
            } else if let Some(initial) = &self.places.initial {
                add(&mut total[initial.h.clone()], &gradient.d_start.h);
                if let Some(c) = &initial.c {
                    add(&mut total[c.clone()], &gradient.d_start.c);
                }
            }
        }
        DirectionGradient { d_inputs: self.reading.order(&d_read, input_size), d_fed }
    }

    fn input_size(&self) -> usize {
        self.parameters.weight_ih.len() / self.parameters.bias_ih.len()
    }

    /// The learnt state, or zeros.
    fn initial_state(&self) -> State {
        match &self.parameters.initial {
            Some(initial) => {
                State { h: initial.h.to_vec(), c: initial.c.map_or(Vec::new(), <[f64]>::to_vec) }
            }
            None => self.layer.zero_state(),
        }
    }
}

impl Reading {
    /// `[length][width]` into the order of reading, or back: it is its own inverse.
    fn order(self, steps: &[f64], width: usize) -> Vec<f64> {
        match self {
            Reading::Forward => steps.to_vec(),
            Reading::Backward => steps.chunks_exact(width).rev().flatten().copied().collect(),
        }
    }

    /// The resets in the order of reading. What lies between steps `t - 1` and `t` lies, read from the end, between the
    /// steps `length - t - 1` and `length - t`; what lies before step 0 lies behind everything.
    fn resets(self, resets: &[usize], length: usize) -> Vec<usize> {
        let valid = resets.iter().copied().filter(|&step| step < length);
        match self {
            Reading::Forward => valid.collect(),
            Reading::Backward => valid.filter(|&step| step > 0).map(|step| length - step).rev().collect(),
        }
    }
}
