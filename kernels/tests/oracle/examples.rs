//! Worked examples of TensorFlow 1 tutorials: one cell's printed numbers, and small batches whose loops are unrolled here,
//! with TensorFlow's equations on one kernel for input and state.

use kernels::oracle::activation::Activation;
use kernels::oracle::cell::Cell;
use kernels::oracle::head::Head;
use kernels::oracle::layer::Layer;
use kernels::oracle::lstm::Lstm;
use kernels::oracle::network::{Batch, Input, Network};
use kernels::oracle::parameters::Layout;
use kernels::oracle::rnn::Rnn;
use kernels::oracle::stack::{InitialState, Row, Stack, StackTrace};

use crate::largest::{Largest, distance};
use crate::numbers::numbers;

/// The largest difference allowed, as a share of a tensor's largest number.
const LIMIT: f64 = 1e-13;

const TANH_RNN: Cell = Cell::Rnn(Rnn { activation: Activation::Tanh });
const BASIC_LSTM: Cell = Cell::Lstm(Lstm { forget_bias: 1.0, ..Lstm::PLAIN });

/// One gate of a TensorFlow cell.
struct Gate {
    /// `[in + H][H]`.
    kernel: Vec<Vec<f64>>,
    bias: Vec<f64>,
}

/// A TensorFlow cell.
enum HandCell {
    BasicRnn { h: Gate },
    BasicLstm { i: Gate, j: Gate, f: Gate, o: Gate },
}

/// What a loop over one row gives: the outputs of all steps and the last h and c.
#[derive(Debug, PartialEq)]
struct HandRun {
    outputs: Vec<Vec<f64>>,
    h: Vec<f64>,
    c: Vec<f64>,
}

impl Gate {
    fn new(input_size: usize, hidden_size: usize, scale: f64, salt: u64) -> Self {
        let values = numbers((input_size + hidden_size) * hidden_size, scale, salt);
        let kernel = values.chunks_exact(hidden_size).map(<[f64]>::to_vec).collect();
        Self { kernel, bias: numbers(hidden_size, scale, 100 + salt) }
    }

    /// `[x, h]·W + b`.
    fn sum(&self, x: &[f64], h: &[f64]) -> Vec<f64> {
        let both = [x, h].concat();
        let column = |unit: usize| (0..both.len()).map(|at| both[at] * self.kernel[at][unit]).sum::<f64>();
        (0..h.len()).map(|unit| column(unit) + self.bias[unit]).collect()
    }

    /// The rows of the kernel from `first` on, transposed: a part of `weight_ih` or `weight_hh`.
    fn transposed(&self, rows: std::ops::Range<usize>) -> Vec<f64> {
        (0..self.bias.len())
            .flat_map(|unit| self.kernel[rows.clone()].iter().map(move |row| row[unit]))
            .collect()
    }
}

impl HandCell {
    fn new(cell: Cell, input_size: usize, hidden_size: usize, scale: f64, salt: u64) -> Self {
        let gate = |at| Gate::new(input_size, hidden_size, scale, 10 * salt + at);
        match cell {
            Cell::Lstm(_) => Self::BasicLstm { i: gate(0), j: gate(1), f: gate(2), o: gate(3) },
            _ => Self::BasicRnn { h: gate(0) },
        }
    }

    /// The gates in the oracle's order.
    fn gates(&self) -> Vec<&Gate> {
        match self {
            Self::BasicRnn { h } => vec![h],
            Self::BasicLstm { i, j, f, o } => vec![i, f, j, o],
        }
    }

    /// `weight_ih`, `weight_hh`, `bias_ih` and `bias_hh` one behind the other.
    fn parameters(&self) -> Vec<f64> {
        let gates = self.gates();
        let (hidden, rows) = (gates[0].bias.len(), gates[0].kernel.len());
        let of =
            |part: &dyn Fn(&Gate) -> Vec<f64>| gates.iter().flat_map(|gate| part(gate)).collect::<Vec<f64>>();
        let inputs = of(&|gate| gate.transposed(0..rows - hidden));
        let states = of(&|gate| gate.transposed(rows - hidden..rows));
        [inputs, states, of(&|gate| gate.bias.clone()), vec![0.0; gates.len() * hidden]].concat()
    }

    fn step(&self, x: &[f64], h: &mut Vec<f64>, c: &mut [f64]) {
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        match self {
            Self::BasicRnn { h: gate } => *h = gate.sum(x, h).iter().map(|sum| sum.tanh()).collect(),
            Self::BasicLstm { i, j, f, o } => {
                let [i, j, f, o] = [i, j, f, o].map(|gate| gate.sum(x, h));
                for unit in 0..c.len() {
                    c[unit] = c[unit] * sigmoid(f[unit] + 1.0) + sigmoid(i[unit]) * j[unit].tanh();
                    h[unit] = c[unit].tanh() * sigmoid(o[unit]);
                }
            }
        }
    }

    /// The loop over one row: behind `length` outputs are zero and the state is copied.
    fn run(&self, row: &[Vec<f64>], length: usize) -> HandRun {
        let hidden = self.gates()[0].bias.len();
        let (mut h, mut outputs) = (vec![0.0; hidden], Vec::new());
        let mut c = if matches!(self, Self::BasicLstm { .. }) { vec![0.0; hidden] } else { Vec::new() };
        for (t, x) in row.iter().enumerate() {
            if t < length {
                self.step(x, &mut h, &mut c);
                outputs.push(h.clone());
            } else {
                outputs.push(vec![0.0; hidden]);
            }
        }
        HandRun { outputs, h, c }
    }

    /// The same from the last valid step to the first.
    fn run_backward(&self, row: &[Vec<f64>], length: usize) -> HandRun {
        let reversed = |steps: &[Vec<f64>]| {
            [steps[..length].iter().rev().cloned().collect(), steps[length..].to_vec()].concat()
        };
        let run = self.run(&reversed(row), length);
        HandRun { outputs: reversed(&run.outputs), ..run }
    }
}

/// Layers by hand over one row, with both directions where `cells` has two for a layer: the last layer's outputs, and all
/// final states as the oracle lays them out.
fn run_by_hand(cells: &[Vec<HandCell>], row: &[Vec<f64>], length: usize) -> (Vec<f64>, Vec<f64>) {
    let (mut outputs, mut state) = (row.to_vec(), Vec::new());
    for directions in cells {
        let mut runs = vec![directions[0].run(&outputs, length)];
        runs.extend(directions[1..].iter().map(|cell| cell.run_backward(&outputs, length)));
        outputs =
            (0..row.len()).map(|t| runs.iter().flat_map(|run| run.outputs[t].clone()).collect()).collect();
        state.extend(runs.into_iter().flat_map(|run| [run.h, run.c].concat()));
    }
    (outputs.concat(), state)
}

fn run_the_oracle(stack: &Stack, params: &[f64], row: &[Vec<f64>], length: usize) -> StackTrace {
    let mut layout = Layout::default();
    let places = stack.place(&mut layout);
    assert_eq!(layout.parameter_count(), params.len());
    stack.forward(
        &places,
        params,
        Row { inputs: &row.concat(), length, fed_state: None, resets: &[], masks: &[] },
    )
}

/// Compares every row of a batch: outputs, zeros behind the end, final states, and that the state behind the end is that of
/// the row cut at its end.
fn compare(
    cell: Cell,
    sizes: &[usize],
    bidirectional: bool,
    rows: &[Vec<Vec<f64>>],
    lengths: &[usize],
    largest: &mut Largest,
) {
    let input_size = rows[0][0].len();
    let directions = 1 + usize::from(bidirectional);
    // Inputs as large as the example's must not saturate every unit.
    let peak = rows.iter().flatten().flatten().fold(1.0f64, |peak, x| peak.max(*x));
    let (mut width, mut cells) = (input_size, Vec::new());
    for (layer, &size) in sizes.iter().enumerate() {
        let scale = if layer == 0 { 2.0 / peak } else { 1.0 };
        let of = |direction| HandCell::new(cell, width, size, scale, (2 * layer + direction) as u64);
        cells.push((0..directions).map(of).collect::<Vec<_>>());
        width = directions * size;
    }
    let layers = sizes.iter().map(|&hidden_size| Layer { cell, hidden_size, bidirectional }).collect();
    let stack = Stack { input_size, layers, initial_state: InitialState::Zero };
    let params: Vec<f64> = cells.iter().flatten().flat_map(HandCell::parameters).collect();
    for (row, &length) in rows.iter().zip(lengths) {
        let got = run_the_oracle(&stack, &params, row, length);
        let (outputs, state) = run_by_hand(&cells, row, length);
        let place = || format!("{} of {} steps, layers {sizes:?} of {cell:?}", length, row.len());
        assert_eq!(got.outputs.len(), row.len() * width);
        assert!(got.outputs[length * width..].iter().all(|&output| output == 0.0), "{}", place());
        largest.note(distance(&got.outputs, &outputs), LIMIT, place);
        largest.note(distance(&got.final_state, &state), LIMIT, place);
        assert_eq!(got.final_state, run_the_oracle(&stack, &params, &row[..length], length).final_state);
    }
}

/// `[rows][T][in]` of consecutive numbers.
fn batch(values: &[f64], seq_len: usize, input_size: usize) -> Vec<Vec<Vec<f64>>> {
    let row = |row: &[f64]| row.chunks_exact(input_size).map(<[f64]>::to_vec).collect();
    values.chunks_exact(seq_len * input_size).map(row).collect()
}

/// Words as one-hot vectors over h, e, l, o.
fn one_hot(words: &[&str]) -> Vec<Vec<Vec<f64>>> {
    let vector = |letter: char| "helo".chars().map(|other| f64::from(other == letter)).collect();
    words.iter().map(|word| word.chars().map(vector).collect()).collect()
}

#[test]
fn a_single_unit_gives_the_printed_numbers() {
    let layer = Layer { cell: TANH_RNN, hidden_size: 1, bidirectional: false };
    let stack = Stack { input_size: 4, layers: vec![layer], initial_state: InitialState::Zero };
    // weight_ih, weight_hh, bias_ih, bias_hh; at the first step weight_hh meets a state of zero.
    let params = [0.45043385, 0.74536854, -0.68741149, 0.21806668, 0.5, 0.0, 0.0];
    let x = [[0.0, 1.0, 2.0, 0.0], [3.0, 4.0, 5.0, 0.0], [6.0, 7.0, 8.0, 0.0], [9.0, 0.0, 1.0, 0.0]];
    let printed = [-0.55767643, 0.7142067, 0.98433769, 0.99762088];
    let got = x.map(|x| run_the_oracle(&stack, &params, &[x.to_vec()], 1).outputs[0]);
    let difference = distance(&got, &printed);
    println!("one unit against the printed numbers: {got:?}, largest relative difference {difference:.2e}");
    // The numbers were printed from f32.
    assert!(difference < 2e-7);
}

#[test]
fn two_steps_by_hand_equal_the_oracle_with_and_without_lengths() {
    let values = [[0, 1, 2, 9, 8, 7], [3, 4, 5, 0, 0, 0], [6, 7, 8, 6, 5, 4], [9, 0, 1, 3, 2, 1]];
    let rows = batch(&values.concat().into_iter().map(f64::from).collect::<Vec<_>>(), 2, 3);
    let mut largest = Largest::default();
    for cell in [TANH_RNN, BASIC_LSTM] {
        for lengths in [[2, 2, 2, 2], [2, 1, 2, 2]] {
            compare(cell, &[5], false, &rows, &lengths, &mut largest);
        }
    }
    largest.print("batch 4, 2 steps, 3 inputs, 5 units");
}

#[test]
fn hello_by_hand_equals_the_oracle() {
    let mut largest = Largest::default();
    for cell in [TANH_RNN, BASIC_LSTM] {
        compare(cell, &[2], false, &one_hot(&["h"]), &[1], &mut largest);
        compare(cell, &[2], false, &one_hot(&["hello"]), &[5], &mut largest);
        for lengths in [[5, 5, 5], [5, 3, 4]] {
            compare(cell, &[2], false, &one_hot(&["hello", "eolll", "lleel"]), &lengths, &mut largest);
        }
    }
    largest.print("hello, one-hot, 1 x 1, 1 x 5 and 3 x 5 letters");
}

#[test]
fn three_layers_and_two_directions_by_hand_equal_the_oracle() {
    let rows = batch(&(0..45).map(f64::from).collect::<Vec<_>>(), 5, 3);
    let mut largest = Largest::default();
    for cell in [TANH_RNN, BASIC_LSTM] {
        for (sizes, bidirectional) in
            [(&[5][..], false), (&[5], true), (&[5, 5, 5], false), (&[4, 2, 3], false), (&[4, 2, 3], true)]
        {
            for lengths in [[5, 5, 5], [2, 3, 1]] {
                compare(cell, sizes, bidirectional, &rows, &lengths, &mut largest);
            }
        }
    }
    largest.print("0..45 as 3 x 5 x 3, 1 and 3 layers, 1 and 2 directions");
}

#[test]
fn an_embedding_is_a_row_of_its_table_and_a_one_hot_product() {
    let tokens = [0, 3, 5, 2, 2, 1, 4, 0];
    let targets = [1, 0, 1, 1, 0, 0, 1, 0];
    let table = numbers(6 * 3, 1.0, 50);
    let by_hand = [vec![HandCell::new(BASIC_LSTM, 3, 2, 1.0, 51)]];
    let head = numbers(2 * 2 + 2, 1.0, 52);
    let layer = Layer { cell: BASIC_LSTM, hidden_size: 2, bidirectional: false };
    let network = |embedding, input_size| Network {
        embedding,
        stack: Stack { input_size, layers: vec![layer], initial_state: InitialState::Zero },
        head: Head::EveryStep,
        classes: 2,
    };
    let batch = Batch::new(2, 4, Input::Tokens(&tokens), &targets);
    let parameters = [&table[..], &by_hand[0][0].parameters(), &head].concat();
    let got = network(Some(6), 3).evaluate(&parameters, &batch);

    let mut largest = Largest::default();
    for (row, trace) in tokens.chunks_exact(4).zip(&got.traces) {
        let vectors: Vec<Vec<f64>> =
            row.iter().map(|&token| table[3 * token as usize..][..3].to_vec()).collect();
        let (outputs, state) = run_by_hand(&by_hand, &vectors, 4);
        largest.note(distance(&trace.outputs, &outputs), LIMIT, || "outputs".into());
        largest.note(distance(&trace.final_state, &state), LIMIT, || "final state".into());
    }

    // W_ih · table^T reads one-hot vectors as W_ih reads the table's rows.
    let (weight_ih, rest) = parameters[table.len()..].split_at(4 * 2 * 3);
    let product = weight_ih.chunks_exact(3).flat_map(|weights| {
        table.chunks_exact(3).map(move |vector| weights.iter().zip(vector).map(|(w, x)| w * x).sum::<f64>())
    });
    let one_hot = network(None, 6).evaluate(&[&product.collect::<Vec<_>>()[..], rest].concat(), &batch);
    largest
        .note(distance(&[one_hot.loss_sum], &[got.loss_sum]), LIMIT, || "loss from one-hot vectors".into());
    largest.print("embedding 6 x 3 and LSTM 2");
}
