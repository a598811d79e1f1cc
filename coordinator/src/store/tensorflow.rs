//! TensorFlow's variables under our names: those of `tf.compat.v1`'s cells and of Keras 2's layers, as NumPy's arrays.
//!
//! A name's last parts say what an array is, those in front of them of which layer and direction. TensorFlow 1's cells have
//! one `kernel` `[I + R, G·H]`, the input's rows above the state's; Keras' have `kernel` `[I, G·H]` and
//! `recurrent_kernel` `[R, G·H]`. Ours are the transposes, gate by gate in another order.

use std::collections::BTreeMap;

use protocol::cell::{Cell, RecurrentActivation, Reset};
use protocol::problem::Problem;

use super::gate_order::GateOrder;
use super::npz::{Array, Values};
use super::weights::{ArrayOptions, Meaning, WeightTensor, Weights};

/// How the arrays must be called.
const NAMES: &str = "arrays have the names of TensorFlow's variables: rnn/multi_rnn_cell/cell_0/lstm_cell/kernel and \
                     bias for each layer, fw and bw for directions, dense/kernel and dense/bias, see docs/cells.md";

/// Last parts of the names of what an optimizer keeps beside the variables.
const OPTIMIZER: [&str; 9] = [
    "Adam",
    "Adam_1",
    "Momentum",
    "RMSProp",
    "RMSProp_1",
    "Adagrad",
    "beta1_power",
    "beta2_power",
    "global_step",
];

/// What an array is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Role {
    /// Of a cell.
    Cell(Place, CellRole),
    Embedding,
    HeadWeight,
    HeadBias,
    Vocabulary,
    /// Nothing of the network.
    Optimizer,
}

/// A layer, by the number in its name, and a direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    layer: usize,
    is_reverse: bool,
}

/// The arrays of a cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum CellRole {
    /// `[I + R, G·H]`, or `[I, G·H]` beside a recurrent kernel.
    Kernel,
    /// `[R, G·H]`
    RecurrentKernel,
    /// `[G·H]`; twice that, or two rows of it, where the input's and the state's are apart.
    Bias,
    /// `[I + H, 2·H]`: the GRU's r and u.
    GatesKernel,
    /// `[2·H]`
    GatesBias,
    /// `[I + H, H]`: the GRU's c.
    CandidateKernel,
    /// `[H]`
    CandidateBias,
    /// `[H, R]`
    Projection,
    /// `[H]` each.
    PeepholeInput,
    PeepholeForget,
    PeepholeOutput,
}

impl Role {
    fn of(name: &str) -> Option<Self> {
        use CellRole::*;
        let name = name.rsplit_once(':').map_or(name, |(name, _output)| name);
        let parts: Vec<&str> = name.split('/').collect();
        let last = *parts.last()?;
        let parent = parts.len().checked_sub(2).map_or("", |at| parts[at]);
        let is_dense = number_of(parent, "dense").or(number_of(parent, "fully_connected")).is_some();
        let cell = |role| Some(Self::Cell(Place::of(&parts), role));
        match (parent, last) {
            (_, "vocabulary") => Some(Self::Vocabulary),
            (_, "embedding" | "embeddings") => Some(Self::Embedding),
            (_, "softmax_w") | ("softmax", "Variable") => Some(Self::HeadWeight),
            (_, "softmax_b") | ("softmax", "Variable_1") => Some(Self::HeadBias),
            (_, "kernel" | "weights") if is_dense => Some(Self::HeadWeight),
            (_, "bias" | "biases") if is_dense => Some(Self::HeadBias),
            ("gates", "kernel") => cell(GatesKernel),
            ("gates", "bias") => cell(GatesBias),
            ("candidate", "kernel") => cell(CandidateKernel),
            ("candidate", "bias") => cell(CandidateBias),
            ("projection", "kernel") => cell(Projection),
            (_, "w_i_diag") => cell(PeepholeInput),
            (_, "w_f_diag") => cell(PeepholeForget),
            (_, "w_o_diag") => cell(PeepholeOutput),
            (_, "kernel") => cell(Kernel),
            (_, "recurrent_kernel") => cell(RecurrentKernel),
            (_, "bias") => cell(Bias),
            (_, last) if OPTIMIZER.contains(&last) => Some(Self::Optimizer),
            _ => None,
        }
    }
}

impl Place {
    /// `cell_1` and `bw` of TensorFlow 1; `lstm_1`, or `bidirectional_1` and `backward_lstm_1`, of Keras.
    fn of(parts: &[&str]) -> Self {
        let by = |word: &str| parts.iter().find_map(|part| number_of(part, word));
        let of_keras = ["bidirectional", "lstm", "gru", "simple_rnn"];
        let layer = parts.iter().find_map(|part| number_of(part, "cell").filter(|_| *part != "cell"));
        let layer = layer.or_else(|| of_keras.into_iter().find_map(by)).unwrap_or(0);
        let is_reverse = parts.iter().any(|part| *part == "bw" || part.starts_with("backward_"));
        Self { layer, is_reverse }
    }
}

/// The number of a part of a name: 2 of `dense_2` and 0 of `dense`, for the word `dense`.
fn number_of(part: &str, word: &str) -> Option<usize> {
    match part.strip_prefix(word)? {
        "" => Some(0),
        rest => rest.strip_prefix('_')?.parse().ok(),
    }
}

/// Numbers in rows; a vector is one row.
#[derive(Debug, Clone, PartialEq)]
struct Matrix {
    name: String,
    rows: usize,
    columns: usize,
    values: Vec<f64>,
}

/// The parameters in these arrays. Arrays that fit several cells are of `cell`.
pub(super) fn from_arrays(
    origin: &str,
    arrays: Vec<Array>,
    cell: Cell,
    options: &ArrayOptions,
) -> Result<Weights, Problem> {
    let mut cells: BTreeMap<Place, BTreeMap<CellRole, Matrix>> = BTreeMap::new();
    let (mut tensors, mut vocabulary) = (BTreeMap::new(), None);
    let mut names: BTreeMap<Role, String> = BTreeMap::new();
    for array in arrays {
        let name = array.name.clone();
        let role = Role::of(&name).ok_or_else(|| {
            Problem::usage(format!("{origin} has the array {name}, which is none of a network's")).hint(NAMES)
        })?;
        if role == Role::Optimizer {
            continue;
        }
        if let Some(other) = names.insert(role, name.clone()) {
            return Err(Problem::usage(format!(
                "{origin} has both {other} and {name}, which are the same part"
            ))
            .hint("save the variables of one network; layers are told apart by cell_0, cell_1 and so on"));
        }
        let matrix = |array| Matrix::of(origin, array);
        match role {
            Role::Cell(place, role) => drop(cells.entry(place).or_default().insert(role, matrix(array)?)),
            Role::Embedding => drop(tensors.insert("embedding.weight".to_owned(), matrix(array)?.tensor())),
            Role::HeadWeight => {
                drop(tensors.insert("head.weight".to_owned(), matrix(array)?.transposed().tensor()));
            }
            Role::HeadBias => drop(tensors.insert("head.bias".to_owned(), matrix(array)?.vector())),
            Role::Vocabulary => vocabulary = Some(characters(origin, array)?),
            Role::Optimizer => {}
        }
    }
    if cells.is_empty() {
        return Err(Problem::usage(format!("{origin} has no array of a recurrent cell")).hint(NAMES));
    }
    let mut numbers: Vec<usize> = cells.keys().map(|place| place.layer).collect();
    numbers.dedup();
    let (mut meaning, mut forget_bias) = (Meaning::default(), 0.0);
    for (place, arrays) in cells {
        let layer = numbers.iter().position(|&number| number == place.layer).expect("every number is listed");
        let suffix = format!("_l{layer}{}", if place.is_reverse { "_reverse" } else { "" });
        let direction = Direction::of(origin, &suffix, arrays, cell, options)?;
        meaning = direction.meaning;
        forget_bias = direction.forget_bias;
        tensors.extend(direction.tensors);
    }
    Ok(Weights { origin: origin.to_owned(), vocabulary, labels: None, forget_bias, tensors, meaning })
}

/// One direction of one layer, as ours.
struct Direction {
    tensors: Vec<(String, WeightTensor)>,
    meaning: Meaning,
    forget_bias: f64,
}

impl Direction {
    fn of(
        origin: &str,
        suffix: &str,
        mut arrays: BTreeMap<CellRole, Matrix>,
        cell: Cell,
        options: &ArrayOptions,
    ) -> Result<Self, Problem> {
        let missing = |what: &str| {
            Problem::usage(format!("{origin} has no {what} for the layer that is {suffix} here")).hint(NAMES)
        };
        let cell = cell_of(&arrays).unwrap_or(cell);
        let recurrent_kernel = arrays.remove(&CellRole::RecurrentKernel);
        let projection = arrays.remove(&CellRole::Projection);
        let order = options.gates.unwrap_or(match recurrent_kernel {
            Some(_) => GateOrder::Keras,
            None => GateOrder::Tf1,
        });
        let mut take = |role, parts: [CellRole; 2], what| match arrays.remove(&role) {
            Some(whole) => Ok(whole),
            None => match parts.map(|part| arrays.remove(&part)) {
                [Some(gates), Some(candidate)] => gates.beside(origin, &candidate),
                _ => Err(missing(what)),
            },
        };
        let kernel = take(CellRole::Kernel, [CellRole::GatesKernel, CellRole::CandidateKernel], "kernel")?;
        let bias = take(CellRole::Bias, [CellRole::GatesBias, CellRole::CandidateBias], "bias")?;

        let gates = Gates::of(origin, &kernel, cell, order)?;
        let output_size = projection.as_ref().map_or(gates.hidden_size, |projection| projection.columns);
        let (input, state) = match recurrent_kernel {
            Some(recurrent) => (kernel, recurrent),
            None => kernel.split(origin, output_size)?,
        };
        let (bias_ih, bias_hh) = bias.biases(origin, gates.width())?;
        let meaning = Meaning {
            reset: Some(if bias_hh.is_some() { Reset::After } else { Reset::Before }),
            // Keras has the choice, TensorFlow 1 has not.
            recurrent_activation: (order == GateOrder::Tf1).then_some(RecurrentActivation::Sigmoid),
            activation: None,
            // Neither says: TensorFlow's cells may have one, Keras' have none.
            cell_clip: (order != GateOrder::Tf1).then_some(0.0),
        };
        let bias_hh =
            bias_hh.unwrap_or(Matrix { values: vec![0.0; bias_ih.values.len()], ..bias_ih.clone() });
        let mut tensors = vec![
            ("weight_ih", gates.ours(origin, &input)?.transposed().tensor()),
            ("weight_hh", gates.ours(origin, &state)?.transposed().tensor()),
            ("bias_ih", gates.ours(origin, &bias_ih)?.vector()),
            ("bias_hh", gates.ours(origin, &bias_hh)?.vector()),
        ];
        tensors.extend(projection.map(|projection| ("weight_hr", projection.transposed().tensor())));
        for (name, role) in [
            ("peephole_i", CellRole::PeepholeInput),
            ("peephole_f", CellRole::PeepholeForget),
            ("peephole_o", CellRole::PeepholeOutput),
        ] {
            tensors.extend(arrays.remove(&role).map(|diagonal| (name, diagonal.vector())));
        }
        if let Some(left) = arrays.values().next() {
            return Err(Problem::usage(format!(
                "{origin} has both {} and the arrays of another kind of cell in its place",
                left.name
            ))
            .hint(NAMES));
        }
        let tensors =
            tensors.into_iter().map(|(name, tensor)| (format!("rnn.{name}{suffix}"), tensor)).collect();
        Ok(Self { tensors, meaning, forget_bias: forget_bias(origin, cell, order, options)? })
    }
}

/// The cell that alone has arrays like these.
fn cell_of(arrays: &BTreeMap<CellRole, Matrix>) -> Option<Cell> {
    let has = |role| arrays.contains_key(&role);
    if has(CellRole::GatesKernel) || has(CellRole::CandidateKernel) {
        return Some(Cell::Gru);
    }
    if has(CellRole::Projection) || has(CellRole::PeepholeInput) {
        return Some(Cell::Lstm);
    }
    let recurrent = arrays.get(&CellRole::RecurrentKernel)?;
    let fits = |cell: &Cell| cell.gates() * recurrent.rows == recurrent.columns;
    [Cell::Rnn, Cell::Lstm, Cell::Gru].into_iter().find(fits)
}

/// What the forget gate got at every step besides its bias.
fn forget_bias(origin: &str, cell: Cell, order: GateOrder, options: &ArrayOptions) -> Result<f64, Problem> {
    match options.forget_bias {
        Some(_) if cell != Cell::Lstm => {
            Err(Problem::usage(format!("--forget-bias is about an LSTM, and {origin} is of cell {cell}"))
                .hint("leave it out"))
        }
        Some(value) if !(value as f32).is_finite() => {
            Err(Problem::usage(format!("--forget-bias is {value}, it must be a number")))
        }
        Some(value) => Ok(value),
        None if cell == Cell::Lstm && order == GateOrder::Tf1 => Ok(1.0),
        None => Ok(0.0),
    }
}

/// How the columns of a cell's arrays are made up of gates.
struct Gates {
    cell: Cell,
    hidden_size: usize,
    /// For each of our gates, its place among theirs.
    places: Vec<usize>,
}

impl Gates {
    fn of(origin: &str, kernel: &Matrix, cell: Cell, order: GateOrder) -> Result<Self, Problem> {
        let places = order.places(cell).ok_or_else(|| {
            Problem::usage(format!(
                "the GRU of {origin} cannot be torch-rnn's: its u is the share that is new"
            ))
            .hint("turn its arrays into those of another program, with u negated")
        })?;
        match kernel.columns % cell.gates() {
            0 if kernel.columns > 0 => Ok(Self { cell, hidden_size: kernel.columns / cell.gates(), places }),
            _ => Err(Problem::usage(format!(
                "array {} of {origin} has {} columns, which are not the {} gates of cell {cell}",
                kernel.name,
                kernel.columns,
                cell.gates()
            ))
            .hint("choose the cell that the arrays are of with --set cell=CELL")),
        }
    }

    fn width(&self) -> usize {
        self.cell.gates() * self.hidden_size
    }

    /// The blocks of columns in our order.
    fn ours(&self, origin: &str, theirs: &Matrix) -> Result<Matrix, Problem> {
        if theirs.columns != self.width() {
            return Err(Problem::usage(format!(
                "array {} of {origin} has {} columns, expected {}: {} gates of {}",
                theirs.name,
                theirs.columns,
                self.width(),
                self.cell.gates(),
                self.hidden_size
            )));
        }
        let rows = theirs.values.chunks_exact(theirs.columns);
        let block = |row: &[f64], at: usize| row[at * self.hidden_size..(at + 1) * self.hidden_size].to_vec();
        let values = rows.flat_map(|row| self.places.iter().flat_map(move |&at| block(row, at))).collect();
        Ok(Matrix { values, ..theirs.clone() })
    }
}

impl Matrix {
    fn of(origin: &str, array: Array) -> Result<Self, Problem> {
        let Array { name, shape, values } = array;
        let values = match values {
            Values::Floats(values) => values,
            Values::Characters(_) => return Err(not_of_floats(origin, &name, "<U1")),
            Values::Other(found) => return Err(not_of_floats(origin, &name, &found)),
        };
        let (rows, columns) = match shape[..] {
            [columns] if columns > 0 => (1, columns),
            [rows, columns] if rows * columns > 0 => (rows, columns),
            _ => {
                let sentence =
                    format!("array {name} of {origin} is {shape:?}, expected a vector or a matrix");
                return Err(Problem::usage(sentence));
            }
        };
        Ok(Self { name, rows, columns, values })
    }

    fn transposed(&self) -> Self {
        let column = |at: usize| self.values.iter().skip(at).step_by(self.columns).copied();
        let values = (0..self.columns).flat_map(column).collect();
        Self { name: self.name.clone(), rows: self.columns, columns: self.rows, values }
    }

    /// The columns of `other` behind these.
    fn beside(self, origin: &str, other: &Self) -> Result<Self, Problem> {
        if self.rows != other.rows {
            return Err(Problem::usage(format!(
                "array {} of {origin} has {} rows, but {} has {}",
                self.name, self.rows, other.name, other.rows
            )));
        }
        let rows = self.values.chunks_exact(self.columns).zip(other.values.chunks_exact(other.columns));
        let values = rows.flat_map(|(left, right)| [left, right].concat()).collect();
        Ok(Self { columns: self.columns + other.columns, values, ..self })
    }

    /// The input's rows, and the last ones, which are the state's.
    fn split(self, origin: &str, state_rows: usize) -> Result<(Self, Self), Problem> {
        let Some(input_rows) = self.rows.checked_sub(state_rows).filter(|&rows| rows > 0) else {
            return Err(Problem::usage(format!(
                "array {} of {origin} has {} rows, but the state alone has {state_rows}",
                self.name, self.rows
            ))
            .hint("choose the cell that the arrays are of with --set cell=CELL"));
        };
        let (input, state) = self.values.split_at(input_rows * self.columns);
        let part = |rows, values: &[f64]| Self { rows, values: values.to_vec(), ..self.clone() };
        Ok((part(input_rows, input), part(state_rows, state)))
    }

    /// The one bias, or the input's and the state's: two rows, or one behind the other.
    fn biases(self, origin: &str, width: usize) -> Result<(Self, Option<Self>), Problem> {
        if self.values.len() == width {
            return Ok((self, None));
        }
        if self.values.len() != 2 * width {
            return Err(Problem::usage(format!(
                "array {} of {origin} has {} numbers, expected {width} or twice that",
                self.name,
                self.values.len()
            )));
        }
        let (input, state) = self.values.split_at(width);
        let part = |values: &[f64]| Self { rows: 1, columns: width, values: values.to_vec(), ..self.clone() };
        Ok((part(input), Some(part(state))))
    }

    fn tensor(&self) -> WeightTensor {
        let values = self.values.iter().map(|&value| value as f32).collect();
        WeightTensor { shape: vec![self.rows, self.columns], values }
    }

    fn vector(&self) -> WeightTensor {
        WeightTensor { shape: vec![self.values.len()], ..self.tensor() }
    }
}

fn not_of_floats(origin: &str, name: &str, found: &str) -> Problem {
    Problem::usage(format!("array {name} of {origin} is of type {found}, expected <f4 or <f8"))
        .hint("save it as 32-bit floats: array.astype('<f4')")
}

/// The characters of the tokens, in the order of their ids.
fn characters(origin: &str, array: Array) -> Result<Vec<char>, Problem> {
    match array.values {
        Values::Characters(characters) => Ok(characters),
        Values::Floats(_) | Values::Other(_) => {
            Err(Problem::usage(format!("array {} of {origin} is not of single characters", array.name))
                .hint("save it as numpy.array(list(characters)), in the order of the token ids"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::weights::ArrayOptions;

    fn array(name: &str, shape: &[usize], first: f64) -> Array {
        let values = (0..shape.iter().product::<usize>()).map(|at| first + at as f64).collect();
        Array { name: name.to_owned(), shape: shape.to_vec(), values: Values::Floats(values) }
    }

    fn read(arrays: &[Array], cell: Cell, options: ArrayOptions) -> Result<Weights, Problem> {
        from_arrays("w", arrays.to_vec(), cell, &options)
    }

    /// A cell of one unit over two inputs, `[I + H, 4]` and `[4]`.
    fn lstm() -> [Array; 2] {
        [
            array("RNN/rnn/basic_lstm_cell/kernel:0", &[3, 4], 0.0),
            array("RNN/rnn/basic_lstm_cell/bias:0", &[4], 20.0),
        ]
    }

    #[test]
    fn a_joint_kernel_is_taken_apart_and_its_gates_are_put_in_our_order() {
        let weights = read(&lstm(), Cell::Lstm, ArrayOptions::default()).unwrap();
        let tensor = |name: &str, shape: &[usize]| weights.tensor(name, shape).unwrap().to_vec();
        // Columns i, j, f, o become rows i, f, g, o.
        assert_eq!(tensor("rnn.weight_ih_l0", &[4, 2]), [0.0, 4.0, 2.0, 6.0, 1.0, 5.0, 3.0, 7.0]);
        assert_eq!(tensor("rnn.weight_hh_l0", &[4, 1]), [8.0, 10.0, 9.0, 11.0]);
        assert_eq!(tensor("rnn.bias_ih_l0", &[4]), [20.0, 22.0, 21.0, 23.0]);
        assert_eq!(tensor("rnn.bias_hh_l0", &[4]), [0.0; 4]);
        assert_eq!(weights.forget_bias, 1.0);

        let torch_rnn = ArrayOptions { gates: Some(GateOrder::TorchRnn), forget_bias: None };
        let weights = read(&lstm(), Cell::Lstm, torch_rnn).unwrap();
        assert_eq!(weights.tensor("rnn.bias_ih_l0", &[4]).unwrap(), [20.0, 21.0, 23.0, 22.0]);
        assert_eq!(weights.forget_bias, 0.0);
        let set = ArrayOptions { gates: None, forget_bias: Some(0.5) };
        assert_eq!(read(&lstm(), Cell::Lstm, set).unwrap().forget_bias, 0.5);
    }

    #[test]
    fn layers_and_directions_are_told_by_their_names() {
        let roles = [
            ("rnn/basic_rnn_cell/kernel", 0, false),
            ("a/fw/multi_rnn_cell/cell_3/lstm_cell/kernel:0", 3, false),
            ("stack_bidirectional_rnn/cell_1/bidirectional_rnn/bw/lstm_cell/kernel", 1, true),
            ("bidirectional_2/backward_lstm_7/lstm_cell_9/kernel", 2, true),
            ("model/gru_4/gru_cell_1/kernel", 4, false),
        ];
        for (name, layer, is_reverse) in roles {
            let place = Place { layer, is_reverse };
            assert_eq!(Role::of(name), Some(Role::Cell(place, CellRole::Kernel)), "{name}");
        }
        let others = [
            ("dense_1/kernel", Some(Role::HeadWeight)),
            ("fully_connected/biases:0", Some(Role::HeadBias)),
            ("softmax/Variable_1", Some(Role::HeadBias)),
            ("softmax/softmax_w", Some(Role::HeadWeight)),
            ("embedding/embeddings", Some(Role::Embedding)),
            ("rnn/lstm_cell/kernel/Adam_1", Some(Role::Optimizer)),
            ("conv2d/filters", None),
            ("", None),
        ];
        for (name, role) in others {
            assert_eq!(Role::of(name), role, "{name}");
        }
        // Keras goes on counting from model to model.
        let layers = [4, 5].map(|number| {
            let name = |role: &str| format!("lstm_{number}/lstm_cell/{role}");
            [
                array(&name("kernel"), &[2, 4], 0.0),
                array(&name("recurrent_kernel"), &[1, 4], f64::from(number)),
                array(&name("bias"), &[4], 0.0),
            ]
        });
        let weights = read(&layers.concat(), Cell::Rnn, ArrayOptions::default()).unwrap();
        assert_eq!(weights.tensor("rnn.weight_hh_l0", &[4, 1]).unwrap(), [4.0, 5.0, 6.0, 7.0]);
        assert_eq!(weights.tensor("rnn.weight_hh_l1", &[4, 1]).unwrap(), [5.0, 6.0, 7.0, 8.0]);
    }

    #[test]
    fn the_characters_of_the_tokens_may_be_there_and_the_optimizers_numbers_are_passed_over() {
        let names = Array { values: Values::Characters(vec!['b', 'a']), ..array("vocabulary", &[2], 0.0) };
        let step = Array { values: Values::Other("<i8".into()), ..array("global_step", &[], 0.0) };
        let slot = array("RNN/rnn/basic_lstm_cell/kernel/Adam:0", &[3, 4], 0.0);
        let weights =
            read(&[&lstm()[..], &[names, step, slot]].concat(), Cell::Lstm, ArrayOptions::default());
        assert_eq!(weights.unwrap().vocabulary, Some(vec!['b', 'a']));
        let numbers = array("vocabulary", &[2], 0.0);
        let problem =
            read(&[&lstm()[..], &[numbers]].concat(), Cell::Lstm, ArrayOptions::default()).unwrap_err();
        assert_eq!(problem.sentence, "array vocabulary of w is not of single characters");
    }

    #[test]
    fn what_does_not_fit_together_is_said() {
        let [kernel, bias] = lstm();
        let with = |more: Array| vec![kernel.clone(), bias.clone(), more];
        let strings = Array { values: Values::Other("|S3".into()), ..array("dense/bias", &[1], 0.0) };
        let cases = [
            (vec![], Cell::Lstm, "w has no array of a recurrent cell"),
            (with(array("a/b", &[1], 0.0)), Cell::Lstm, "w has the array a/b, which is none of a network's"),
            (
                with(array("other/kernel", &[3, 4], 0.0)),
                Cell::Lstm,
                "w has both RNN/rnn/basic_lstm_cell/kernel:0 and other/kernel, which are the same part",
            ),
            (with(strings), Cell::Lstm, "array dense/bias of w is of type |S3, expected <f4 or <f8"),
            (
                with(array("dense/kernel", &[1, 1, 1], 0.0)),
                Cell::Lstm,
                "array dense/kernel of w is [1, 1, 1], expected a vector or a matrix",
            ),
            (vec![kernel.clone()], Cell::Lstm, "w has no bias for the layer that is _l0 here"),
            (vec![bias.clone()], Cell::Lstm, "w has no kernel for the layer that is _l0 here"),
            (
                with(array("rnn/gates/kernel", &[3, 2], 0.0)),
                Cell::Lstm,
                "array RNN/rnn/basic_lstm_cell/kernel:0 of w has 4 columns, which are not the 3 gates of cell gru",
            ),
            (
                vec![kernel.clone(), bias.clone()],
                Cell::Rnn,
                "array RNN/rnn/basic_lstm_cell/kernel:0 of w has 3 rows, but the state alone has 4",
            ),
            (
                vec![kernel.clone(), array("bias", &[5], 0.0)],
                Cell::Lstm,
                "array bias of w has 5 numbers, expected 4 or twice that",
            ),
        ];
        for (arrays, cell, sentence) in cases {
            assert_eq!(read(&arrays, cell, ArrayOptions::default()).unwrap_err().sentence, sentence);
        }
        let gru = [array("kernel", &[2, 3], 0.0), array("bias", &[3], 0.0)];
        let torch_rnn = ArrayOptions { gates: Some(GateOrder::TorchRnn), forget_bias: None };
        assert!(read(&gru, Cell::Gru, torch_rnn).unwrap_err().sentence.contains("cannot be torch-rnn's"));
        for (cell, value) in [(Cell::Gru, 1.0), (Cell::Lstm, f64::NAN)] {
            let arrays = if cell == Cell::Gru { &gru } else { &[kernel.clone(), bias.clone()] };
            let options = ArrayOptions { gates: None, forget_bias: Some(value) };
            assert!(read(arrays, cell, options).unwrap_err().sentence.starts_with("--forget-bias is "));
        }
    }
}
