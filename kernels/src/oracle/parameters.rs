//! The parameters of one direction of one layer, generic in what stands for a tensor: its place, its numbers or its
//! gradient. And the table of all tensors of a network.

use super::algebra::add;
use super::cell::Cell;
use super::layer::Layer;
use super::stack::InitialState;
use std::ops::Range;

/// A tensor in the flat slice of parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// PyTorch's name where PyTorch has one; else `rnn.peephole_i_l0`, `rnn.initial_h_l0` and so on.
    pub name: String,
    /// Row-major.
    pub shape: Vec<usize>,
    /// Where its numbers lie.
    pub range: Range<usize>,
}

/// All tensors of a network, one behind the other.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    /// In order.
    pub tensors: Vec<Tensor>,
}

/// What a cell needs at every step.
#[derive(Clone, Debug)]
pub struct Recurrent<T> {
    /// `[G·H, R]`.
    pub weight_hh: T,
    /// `[G·H]`.
    pub bias_hh: T,
    /// `[R, H]`: an LSTM's projection.
    pub weight_hr: Option<T>,
    /// An LSTM's peepholes.
    pub peepholes: Option<Peepholes<T>>,
}

/// Diagonal weights from the cell state to the gates, `[H]` each: i and f see `c_{t-1}`, o sees `c_t`.
#[derive(Clone, Debug)]
pub struct Peepholes<T> {
    /// To the input gate.
    pub i: T,
    /// To the forget gate.
    pub f: T,
    /// To the output gate.
    pub o: T,
}

/// A learnt initial state, the same for all rows.
#[derive(Clone, Debug)]
pub struct Initial<T> {
    /// `[R]`.
    pub h: T,
    /// `[H]`, where the cell has one.
    pub c: Option<T>,
}

/// All parameters of one direction of one layer.
#[derive(Clone, Debug)]
pub struct Parameters<T> {
    /// `[G·H, in]`.
    pub weight_ih: T,
    /// `[G·H]`.
    pub bias_ih: T,
    /// The cell's.
    pub recurrent: Recurrent<T>,
    /// Where the initial state is learnt.
    pub initial: Option<Initial<T>>,
}

impl Layout {
    /// Number of parameters, `P`.
    pub fn parameter_count(&self) -> usize {
        self.tensors.last().map_or(0, |tensor| tensor.range.end)
    }

    /// Puts a tensor behind the others.
    pub fn place(&mut self, name: String, shape: &[usize]) -> Range<usize> {
        let start = self.parameter_count();
        let range = start..start + shape.iter().product::<usize>();
        self.tensors.push(Tensor { name, shape: shape.to_vec(), range: range.clone() });
        range
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }
}

impl Parameters<Range<usize>> {
    /// Puts a direction's tensors behind the others; their names end in `suffix`, such as `_l0_reverse`.
    pub fn place(
        layout: &mut Layout,
        suffix: &str,
        layer: &Layer,
        input_size: usize,
        initial_state: InitialState,
    ) -> Self {
        let (gates, hidden, width) =
            (layer.cell.gates() * layer.hidden_size, layer.hidden_size, layer.output_size());
        let mut place = |name: &str, shape: &[usize]| layout.place(format!("rnn.{name}{suffix}"), shape);
        let weight_ih = place("weight_ih", &[gates, input_size]);
        let weight_hh = place("weight_hh", &[gates, width]);
        let bias_ih = place("bias_ih", &[gates]);
        let bias_hh = place("bias_hh", &[gates]);
        let (mut weight_hr, mut peepholes) = (None, None);
        if let Cell::Lstm(options) = layer.cell {
            weight_hr = options.projection.map(|width| place("weight_hr", &[width, hidden]));
            peepholes = options.peepholes.then(|| Peepholes {
                i: place("peephole_i", &[hidden]),
                f: place("peephole_f", &[hidden]),
                o: place("peephole_o", &[hidden]),
            });
        }
        let initial = (initial_state == InitialState::Learnt).then(|| Initial {
            h: place("initial_h", &[width]),
            c: matches!(layer.cell, Cell::Lstm(_)).then(|| place("initial_c", &[hidden])),
        });
        let recurrent = Recurrent { weight_hh, bias_hh, weight_hr, peepholes };
        Self { weight_ih, bias_ih, recurrent, initial }
    }

    /// The numbers at these places.
    pub fn of<'a>(&self, flat: &'a [f64]) -> Parameters<&'a [f64]> {
        self.map(|range| &flat[range.clone()])
    }
}

impl<T> Parameters<T> {
    /// The same of another kind.
    pub fn map<U>(&self, mut f: impl FnMut(&T) -> U) -> Parameters<U> {
        Parameters {
            weight_ih: f(&self.weight_ih),
            bias_ih: f(&self.bias_ih),
            recurrent: self.recurrent.map(&mut f),
            initial: self
                .initial
                .as_ref()
                .map(|initial| Initial { h: f(&initial.h), c: initial.c.as_ref().map(&mut f) }),
        }
    }
}

impl<T> Recurrent<T> {
    /// Without projection and peepholes.
    pub fn plain(weight_hh: T, bias_hh: T) -> Self {
        Self { weight_hh, bias_hh, weight_hr: None, peepholes: None }
    }

    /// The same of another kind.
    pub fn map<U>(&self, mut f: impl FnMut(&T) -> U) -> Recurrent<U> {
        Recurrent {
            weight_hh: f(&self.weight_hh),
            bias_hh: f(&self.bias_hh),
            weight_hr: self.weight_hr.as_ref().map(&mut f),
            peepholes: self.peepholes.as_ref().map(|p| Peepholes { i: f(&p.i), f: f(&p.f), o: f(&p.o) }),
        }
    }

    /// All tensors, in a fixed order.
    fn tensors(&self) -> Vec<&T> {
        let peepholes = self.peepholes.iter().flat_map(|p| [&p.i, &p.f, &p.o]);
        [&self.weight_hh, &self.bias_hh].into_iter().chain(&self.weight_hr).chain(peepholes).collect()
    }
}

impl Recurrent<Range<usize>> {
    /// Adds a gradient to the numbers at these places.
    pub fn add(&self, gradient: &Recurrent<Vec<f64>>, total: &mut [f64]) {
        for (place, gradient) in self.tensors().into_iter().zip(gradient.tensors()) {
            add(&mut total[place.clone()], gradient);
        }
    }
}

impl Recurrent<&[f64]> {
    /// Zeros of the same shapes, for the gradient.
    pub fn zeros(&self) -> Recurrent<Vec<f64>> {
        self.map(|tensor| vec![0.0; tensor.len()])
    }

    /// The peepholes of unit `j`; zero without peepholes.
    pub fn peepholes_of(&self, j: usize) -> Peepholes<f64> {
        match &self.peepholes {
            Some(p) => Peepholes { i: p.i[j], f: p.f[j], o: p.o[j] },
            None => Peepholes { i: 0.0, f: 0.0, o: 0.0 },
        }
    }
}
