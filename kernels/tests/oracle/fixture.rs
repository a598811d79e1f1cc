//! The files that `tests/fixtures/make_*.py` write, and what a framework's tensors are called and how they lie.

use kernels::oracle::activation::{Activation, RecurrentActivation};
use kernels::oracle::cell::Cell;
use kernels::oracle::gru::{Gru, Reset};
use kernels::oracle::layer::Layer;
use kernels::oracle::lstm::Lstm;
use kernels::oracle::rnn::Rnn;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// A file of cases.
pub(crate) struct Fixture {
    bytes: Vec<u8>,
}

/// One case of a file.
pub(crate) struct Case<'a> {
    pub(crate) description: Value,
    tensors: SafeTensors<'a>,
}

/// A matrix of whatever a framework calls so; a vector has one row.
#[derive(Clone)]
struct Matrix {
    columns: usize,
    values: Vec<f64>,
}

impl Fixture {
    pub(crate) fn read(name: &str) -> Self {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");
        Self { bytes: std::fs::read(format!("{folder}/{name}.safetensors")).unwrap() }
    }

    /// The cases of one kind; there must be some.
    pub(crate) fn cases(&self, kind: &str) -> Vec<Case<'_>> {
        let (_, header) = SafeTensors::read_metadata(&self.bytes).unwrap();
        let cases: Value = serde_json::from_str(&header.metadata().as_ref().unwrap()["cases"]).unwrap();
        let descriptions = cases[kind].as_array().unwrap().clone();
        assert!(!descriptions.is_empty());
        let case =
            |description| Case { description, tensors: SafeTensors::deserialize(&self.bytes).unwrap() };
        descriptions.into_iter().map(case).collect()
    }
}

impl Case<'_> {
    pub(crate) fn name(&self) -> &str {
        self.description["name"].as_str().unwrap()
    }

    /// A tensor's shape and numbers; `None` where the case has no such tensor.
    pub(crate) fn find(&self, tensor: &str) -> Option<(Vec<usize>, Vec<f64>)> {
        let view = self.tensors.tensor(&format!("{}/{tensor}", self.name())).ok()?;
        let words = view.data().chunks_exact(8).map(|word| word.try_into().unwrap());
        let values = match view.dtype() {
            Dtype::F64 => words.map(f64::from_le_bytes).collect(),
            Dtype::I64 => words.map(|word| i64::from_le_bytes(word) as f64).collect(),
            other => panic!("{tensor} is {other:?}"),
        };
        Some((view.shape().to_vec(), values))
    }

    /// The numbers of a tensor that every such case has.
    pub(crate) fn numbers(&self, tensor: &str) -> Vec<f64> {
        self.find(tensor).unwrap_or_else(|| panic!("{} has no {tensor}", self.name())).1
    }

    /// Token ids or classes.
    pub(crate) fn ids(&self, tensor: &str) -> Vec<u32> {
        self.numbers(tensor).into_iter().map(|id| id as u32).collect()
    }

    pub(crate) fn sizes(&self, key: &str) -> Option<Vec<usize>> {
        let list = self.description[key].as_array()?;
        Some(list.iter().map(|size| size.as_u64().unwrap() as usize).collect())
    }

    pub(crate) fn layers(&self) -> Vec<Layer> {
        self.description["layers"].as_array().unwrap().iter().map(layer).collect()
    }

    /// The parameters (`what` = `parameter`) or their gradients (`gradient`) under our names and in our shapes. A framework
    /// with one bias has it as our `bias_ih`.
    pub(crate) fn ours(&self, what: &str) -> Vec<(String, Vec<f64>)> {
        let mut named = Vec::new();
        for (at, layer) in self.layers().iter().enumerate() {
            for place in [format!("l{at}"), format!("l{at}_reverse")][..layer.directions()].iter() {
                let tensors = match self.description["source"].as_str().unwrap() {
                    "pytorch" => self.of_pytorch(what, place),
                    "tensorflow" => self.of_tensorflow(what, place, layer),
                    "keras" => self.of_keras(what, place, layer),
                    other => panic!("source {other}"),
                };
                named.extend(
                    tensors.into_iter().map(|(name, values)| (format!("rnn.{name}_{place}"), values)),
                );
            }
        }
        named
    }

    fn matrix(&self, name: &str) -> Option<Matrix> {
        let (shape, values) = self.find(name)?;
        Some(Matrix { columns: *shape.last().unwrap(), values })
    }

    fn of_pytorch(&self, what: &str, place: &str) -> Vec<(&'static str, Vec<f64>)> {
        ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"]
            .into_iter()
            .filter_map(|name| Some((name, self.find(&format!("{what}/{name}_{place}"))?.1)))
            .collect()
    }

    /// One kernel for the input above the state, `[in + R, G·H]`; the GRU's candidate has its own.
    fn of_tensorflow(&self, what: &str, place: &str, layer: &Layer) -> Vec<(&'static str, Vec<f64>)> {
        let find = |role: &str| self.matrix(&format!("{what}/{place}/{role}"));
        let whole = |role: &str| match layer.cell {
            Cell::Gru(_) => {
                find(&format!("gates/{role}")).unwrap().beside(find(&format!("candidate/{role}")).unwrap())
            }
            _ => find(role).unwrap(),
        };
        let order = match layer.cell {
            Cell::Rnn(_) => &["h"][..],
            // TensorFlow's j is our g.
            Cell::Lstm(_) => &["i", "g", "f", "o"],
            // TensorFlow's u is our z.
            Cell::Gru(_) => &["r", "z", "n"],
        };
        let (kernel, bias) =
            (whole("kernel").in_our_order(layer, order), whole("bias").in_our_order(layer, order));
        let (input, state) = kernel.split_rows(kernel.rows() - layer.output_size());
        let mut tensors = vec![
            ("weight_ih", input.transposed()),
            ("weight_hh", state.transposed()),
            ("bias_ih", bias.values),
        ];
        for (ours, theirs) in
            [("peephole_i", "w_i_diag"), ("peephole_f", "w_f_diag"), ("peephole_o", "w_o_diag")]
        {
            tensors.extend(find(theirs).map(|diagonal| (ours, diagonal.values)));
        }
        tensors.extend(find("projection/kernel").map(|kernel| ("weight_hr", kernel.transposed())));
        tensors
    }

    /// Kernels `[in, G·H]` and `[H, G·H]`; a GRU with the reset after the product has two biases, the input's first.
    fn of_keras(&self, what: &str, place: &str, layer: &Layer) -> Vec<(&'static str, Vec<f64>)> {
        let order = match layer.cell {
            Cell::Rnn(_) => &["h"][..],
            // Keras's c is our g.
            Cell::Lstm(_) => &["i", "f", "g", "o"],
            // Keras's h is our n.
            Cell::Gru(_) => &["z", "r", "n"],
        };
        let find =
            |role: &str| self.matrix(&format!("{what}/{place}/{role}")).unwrap().in_our_order(layer, order);
        let mut tensors = vec![
            ("weight_ih", find("kernel").transposed()),
            ("weight_hh", find("recurrent_kernel").transposed()),
        ];
        let (input, recurrent) = find("bias").split_rows(1);
        tensors.push(("bias_ih", input.values));
        if recurrent.rows() == 1 {
            tensors.push(("bias_hh", recurrent.values));
        }
        tensors
    }
}

impl Matrix {
    fn rows(&self) -> usize {
        self.values.len() / self.columns
    }

    fn row(&self, at: usize) -> &[f64] {
        &self.values[at * self.columns..(at + 1) * self.columns]
    }

    fn beside(&self, other: Matrix) -> Matrix {
        let values = (0..self.rows()).flat_map(|at| [self.row(at), other.row(at)].concat()).collect();
        Matrix { columns: self.columns + other.columns, values }
    }

    /// The blocks of columns of the gates, from their order to ours.
    fn in_our_order(&self, layer: &Layer, theirs: &[&str]) -> Matrix {
        let ours = match layer.cell {
            Cell::Rnn(_) => &["h"][..],
            Cell::Lstm(_) => &["i", "f", "g", "o"],
            Cell::Gru(_) => &["r", "z", "n"],
        };
        let hidden = layer.hidden_size;
        let block = |row: usize, gate: &str| {
            let at = theirs.iter().position(|name| *name == gate).unwrap();
            self.row(row)[at * hidden..(at + 1) * hidden].to_vec()
        };
        let values =
            (0..self.rows()).flat_map(|row| ours.iter().flat_map(move |gate| block(row, gate))).collect();
        Matrix { columns: self.columns, values }
    }

    fn split_rows(&self, at: usize) -> (Matrix, Matrix) {
        let (above, below) = self.values.split_at(at * self.columns);
        let matrix = |values: &[f64]| Matrix { columns: self.columns, values: values.to_vec() };
        (matrix(above), matrix(below))
    }

    /// The numbers of the transpose.
    fn transposed(&self) -> Vec<f64> {
        (0..self.columns).flat_map(|column| (0..self.rows()).map(move |row| self.row(row)[column])).collect()
    }
}

/// A layer from its description in a file; what is not said is as PyTorch has it.
fn layer(description: &Value) -> Layer {
    let word = |key: &str| description[key].as_str();
    let size = |key: &str| description[key].as_u64().map(|size| size as usize);
    let recurrent_activation = match word("recurrent_activation") {
        None | Some("sigmoid") => RecurrentActivation::Sigmoid,
        Some("hard_sigmoid") => RecurrentActivation::HardSigmoid,
        Some(other) => panic!("recurrent_activation {other}"),
    };
    let cell = match word("cell").unwrap() {
        "rnn" => Cell::Rnn(Rnn {
            activation: if word("activation") == Some("relu") { Activation::Relu } else { Activation::Tanh },
        }),
        "lstm" => Cell::Lstm(Lstm {
            recurrent_activation,
            forget_bias: description["forget_bias"].as_f64().unwrap_or(0.0),
            peepholes: description["peepholes"].as_bool().unwrap_or(false),
            cell_clip: description["cell_clip"].as_f64(),
            projection: size("projection"),
        }),
        "gru" => {
            let reset = if word("reset") == Some("before") { Reset::Before } else { Reset::After };
            Cell::Gru(Gru { recurrent_activation, reset })
        }
        other => panic!("cell {other}"),
    };
    let bidirectional = description["bidirectional"].as_bool().unwrap();
    Layer { cell, hidden_size: size("hidden_size").unwrap(), bidirectional }
}
