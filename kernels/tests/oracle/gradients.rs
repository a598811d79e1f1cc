//! The oracle's gradients against central differences of its loss: every cell with every option, every direction and
//! pattern of lengths, everything that is learnt or fed.
//!
//! Small networks are checked in every parameter, large ones along random directions. `LOCKSTEP_LONG=1` runs all
//! combinations of the tables, and the largest size for every cell; without it a part of them runs.

use kernels::oracle::activation::{Activation, RecurrentActivation};
use kernels::oracle::cell::Cell;
use kernels::oracle::gru::{Gru, Reset};
use kernels::oracle::head::Head;
use kernels::oracle::lstm::Lstm;
use kernels::oracle::network::{Batch, Input, Network, Outcome};
use kernels::oracle::rnn::Rnn;
use kernels::oracle::stack::{InitialState, Layer, Stack};

use crate::compare::{Largest, numbers};

/// The largest difference allowed, as a share of the tensor's largest gradient, or of a thousandth of the largest
/// gradient of all where that is more.
const LIMIT: f64 = 1e-7;

/// Steps of a difference, the preferred first. A shorter one is taken where a longer one crosses a corner.
const DIFFERENCES: [f64; 4] = [1e-3, 1e-4, 1e-5, 1e-6];

const CLASSES: usize = 3;
const INPUT_SIZE: usize = 2;
const TOKENS: usize = 4;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Lengths {
    /// Rows of one step.
    One,
    Full,
    Mixed,
    /// Mixed; of three rows one has no step at all.
    Empty,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Reading {
    Dense,
    OneHot,
    Embedding,
}

/// One network and batch.
#[derive(Clone, Copy, Debug)]
struct Combination {
    /// A projection counts here as its share of the layer's width: 2 is half of it.
    cell: Cell,
    hidden_size: usize,
    /// 2: with a narrower layer of the same cell below.
    num_layers: usize,
    bidirectional: bool,
    rows: usize,
    lengths: Lengths,
    initial_state: InitialState,
    fed: bool,
    resets: bool,
    masks: bool,
    reading: Reading,
    head: Head,
}

/// What all combinations add up to.
#[derive(Default)]
struct Tally {
    combinations: usize,
    largest: Largest,
    shortened: usize,
    /// Combinations in which numbers lay on both sides of a corner: of relu, of the hard sigmoid, of the clip.
    corners: [usize; 3],
}

fn rnn_cells() -> Vec<Cell> {
    [Activation::Tanh, Activation::Relu].map(|activation| Cell::Rnn(Rnn { activation })).to_vec()
}

fn lstm_cells() -> Vec<Cell> {
    let mut cells = Vec::new();
    for recurrent_activation in [RecurrentActivation::Sigmoid, RecurrentActivation::HardSigmoid] {
        for forget_bias in [0.0, 1.0] {
            for peepholes in [false, true] {
                for cell_clip in [None, Some(0.25)] {
                    for projection in [None, Some(2)] {
                        let options =
                            Lstm { recurrent_activation, forget_bias, peepholes, cell_clip, projection };
                        cells.push(Cell::Lstm(options));
                    }
                }
            }
        }
    }
    cells
}

fn gru_cells() -> Vec<Cell> {
    let mut cells = Vec::new();
    for recurrent_activation in [RecurrentActivation::Sigmoid, RecurrentActivation::HardSigmoid] {
        for reset in [Reset::Before, Reset::After] {
            cells.push(Cell::Gru(Gru { recurrent_activation, reset }));
        }
    }
    cells
}

fn all_cells() -> Vec<Cell> {
    [rnn_cells(), lstm_cells(), gru_cells()].concat()
}

/// One of each kind, and an LSTM with everything.
fn few_cells() -> Vec<Cell> {
    let lstm = Lstm {
        recurrent_activation: RecurrentActivation::HardSigmoid,
        forget_bias: 1.0,
        peepholes: true,
        cell_clip: Some(0.25),
        projection: Some(2),
    };
    [rnn_cells(), vec![Cell::Lstm(Lstm::PLAIN), Cell::Lstm(lstm)], gru_cells()[..2].to_vec()].concat()
}

/// Every cell over directions, lengths and rows; the other choices turn with the count.
fn combinations_of_cells() -> Vec<Combination> {
    let mut all = Vec::new();
    for cell in all_cells() {
        for bidirectional in [false, true] {
            for lengths in [Lengths::One, Lengths::Full, Lengths::Mixed, Lengths::Empty] {
                for rows in [1, 3] {
                    let at = all.len();
                    all.push(Combination {
                        cell,
                        hidden_size: [1, 3, 7][at % 3],
                        num_layers: 1 + usize::from(at % 5 == 0),
                        bidirectional,
                        rows,
                        lengths,
                        initial_state: [InitialState::Zero, InitialState::Learnt][at / 2 % 2],
                        fed: at / 4 % 3 == 0,
                        resets: at % 7 == 0,
                        masks: at % 11 < 2,
                        reading: [Reading::Dense, Reading::OneHot, Reading::Embedding][at / 3 % 3],
                        head: [Head::EveryStep, Head::Final][at / 5 % 2],
                    });
                }
            }
        }
    }
    all
}

/// A few cells over all choices around them.
fn combinations_of_surroundings() -> Vec<Combination> {
    let mut all = Vec::new();
    for cell in few_cells() {
        for (num_layers, bidirectional) in [(1, false), (1, true), (2, false), (2, true)] {
            for initial_state in [InitialState::Zero, InitialState::Learnt] {
                for (fed, resets, masks) in (0..8).map(|bits| (bits & 1 > 0, bits & 2 > 0, bits & 4 > 0)) {
                    for reading in [Reading::Dense, Reading::OneHot, Reading::Embedding] {
                        for head in [Head::EveryStep, Head::Final] {
                            all.push(Combination {
                                cell,
                                hidden_size: 3,
                                num_layers,
                                bidirectional,
                                rows: 3,
                                lengths: Lengths::Mixed,
                                initial_state,
                                fed,
                                resets,
                                masks,
                                reading,
                                head,
                            });
                        }
                    }
                }
            }
        }
    }
    all
}

/// Every cell, two directions of one layer, with all that is learnt or fed.
fn combinations_of_size(cells: Vec<Cell>, hidden_size: usize) -> Vec<Combination> {
    let of_cell = |cell| Combination {
        cell,
        hidden_size,
        num_layers: 1,
        bidirectional: true,
        rows: 3,
        lengths: Lengths::Mixed,
        initial_state: InitialState::Learnt,
        fed: true,
        resets: true,
        masks: true,
        reading: Reading::Embedding,
        head: Head::EveryStep,
    };
    cells.into_iter().map(of_cell).collect()
}

impl Combination {
    fn network(&self) -> Network {
        let embedding = (self.reading == Reading::Embedding).then_some(TOKENS);
        let input_size = if self.reading == Reading::OneHot { TOKENS } else { INPUT_SIZE };
        let layer = |hidden_size: usize| {
            let cell = match self.cell {
                Cell::Lstm(options) => {
                    let projection = options.projection.map(|share| hidden_size.div_ceil(share));
                    Cell::Lstm(Lstm { projection, ..options })
                }
                other => other,
            };
            Layer { cell, hidden_size, bidirectional: self.bidirectional }
        };
        let below = layer(self.hidden_size.div_ceil(2));
        let layers = [below, layer(self.hidden_size)][2 - self.num_layers..].to_vec();
        let stack = Stack { input_size, layers, initial_state: self.initial_state };
        Network { embedding, stack, head: self.head, classes: CLASSES }
    }

    fn seq_len(&self) -> usize {
        if self.lengths == Lengths::One { 1 } else { 4 }
    }

    fn lengths(&self) -> Option<Vec<usize>> {
        let of_three = match self.lengths {
            Lengths::One | Lengths::Full => return None,
            Lengths::Mixed => [3, 1, 4],
            Lengths::Empty => [2, 0, 4],
        };
        Some(of_three[..self.rows].to_vec())
    }

    /// Compares every gradient with differences: each number of a tensor, or eight random directions in it.
    fn check(&self, every_number: bool, tally: &mut Tally) {
        let (network, rows, seq_len) = (self.network(), self.rows, self.seq_len());
        let layout = network.layout();
        let scale = if self.hidden_size > 7 { 6.0 / (self.hidden_size as f64).sqrt() } else { 1.2 };
        let parameters = numbers(layout.parameter_count(), scale, 1);
        let fed_state = self.fed.then(|| numbers(rows * network.stack.state_size(), 0.5, 2));
        let dense = numbers(rows * seq_len * INPUT_SIZE, 1.5, 3);
        let below = |limit: usize, salt| -> Vec<u32> {
            numbers(rows * seq_len, 1.0, salt)
                .iter()
                .map(|x| ((x + 1.0) / 2.0 * limit as f64) as u32)
                .collect()
        };
        let (tokens, targets) = (below(TOKENS, 4), below(CLASSES, 5));
        let predictions = if self.head == Head::EveryStep { rows * seq_len } else { rows };
        let input =
            if self.reading == Reading::Dense { Input::Dense(&dense) } else { Input::Tokens(&tokens) };
        let lengths = self.lengths();
        let resets = [vec![2], vec![0, 1], vec![1, 3]]
            .map(|steps| steps.into_iter().filter(|&t| t < seq_len).collect());
        let masks: Vec<Vec<f64>> = (network.stack.layers.iter())
            .map(|layer| rows * seq_len * layer.directions() * layer.output_size())
            .map(|len| numbers(len, 1.0, 6).iter().map(|x| if *x > 0.0 { 2.0 } else { 0.0 }).collect())
            .collect();
        let batch = Batch {
            lengths: lengths.as_deref(),
            resets: self.resets.then_some(&resets[..rows]),
            masks: self.masks.then_some(&masks),
            ..Batch::new(rows, seq_len, input, &targets[..predictions])
        };
        // The fed state is behind the parameters, so that one loop moves all.
        let mut base = parameters;
        let count = base.len();
        base.extend(fed_state.iter().flatten());
        let at_point = |point: &[f64]| {
            let fed_state = self.fed.then_some(&point[count..]);
            network.evaluate(&point[..count], &Batch { fed_state, ..batch })
        };
        let outcome = {
            let fed_state = self.fed.then_some(&base[count..]);
            network.forward_backward(&base[..count], &Batch { fed_state, ..batch })
        };
        let gradient = [&outcome.gradient[..], if self.fed { &outcome.d_fed_state } else { &[] }].concat();
        let pieces = pieces(self.cell, &outcome);
        tally.note_corners(&pieces);
        let largest = gradient.iter().fold(0.0f64, |largest, g| largest.max(g.abs()));
        assert!(largest > 1e-3, "{self:?} has a gradient");

        let mut tensors: Vec<_> = layout.tensors.iter().map(|t| (t.name.as_str(), t.range.clone())).collect();
        if self.fed {
            tensors.push(("fed state", count..base.len()));
        }
        for (name, range) in tensors {
            let directions: Vec<Vec<f64>> = if every_number {
                (0..range.len())
                    .map(|at| (0..range.len()).map(|other| f64::from(other == at)).collect())
                    .collect()
            } else {
                (0..8).map(|salt| unit(numbers(range.len(), 1.0, 10 + salt))).collect()
            };
            let scale = gradient[range.clone()].iter().fold(1e-3 * largest, |scale, g| scale.max(g.abs()));
            for direction in directions {
                let got: f64 = gradient[range.clone()].iter().zip(&direction).map(|(g, d)| g * d).sum();
                let moved = |by: f64| {
                    let mut point = base.clone();
                    point[range.clone()].iter_mut().zip(&direction).for_each(|(x, d)| *x += by * d);
                    let outcome = at_point(&point);
                    (self::pieces(self.cell, &outcome) == pieces).then_some(outcome.loss_sum)
                };
                let (tried, want) = (DIFFERENCES.iter().enumerate())
                    .find_map(|(tried, &step)| Some((tried, slope(&moved, step)?)))
                    .unwrap_or_else(|| panic!("{name} of {self:?}: every difference crosses a corner"));
                tally.shortened += usize::from(tried > 0);
                tally.largest.note((got - want).abs() / scale, LIMIT, || format!("{name} of {self:?}"));
            }
        }
        tally.combinations += 1;
    }
}

/// The central difference of fourth order: the error of the plain one would hide a small fault.
fn slope(moved: &impl Fn(f64) -> Option<f64>, step: f64) -> Option<f64> {
    let near = moved(step)? - moved(-step)?;
    let far = moved(2.0 * step)? - moved(-2.0 * step)?;
    Some((8.0 * near - far) / (12.0 * step))
}

fn unit(direction: Vec<f64>) -> Vec<f64> {
    let norm = direction.iter().map(|x| x * x).sum::<f64>().sqrt();
    direction.iter().map(|x| x / norm).collect()
}

/// On which side of its corners each number lies: of relu, of the hard sigmoid, of the clip. Differences hold only
/// between points where all are on the same sides.
fn pieces(cell: Cell, outcome: &Outcome) -> [Vec<bool>; 3] {
    let runs = || {
        let layers = outcome.traces.iter().flat_map(|row| &row.layers);
        layers.flat_map(|layer| &layer.directions).flat_map(|direction| &direction.runs).map(|run| &run.trace)
    };
    let mut sides = [(); 3].map(|()| Vec::new());
    let [relu, hard, clip] = &mut sides;
    match cell {
        Cell::Rnn(Rnn { activation: Activation::Relu }) => {
            relu.extend(runs().flat_map(|trace| trace.outputs()).map(|h| *h > 0.0));
        }
        Cell::Lstm(Lstm { recurrent_activation: RecurrentActivation::HardSigmoid, .. })
        | Cell::Gru(Gru { recurrent_activation: RecurrentActivation::HardSigmoid, .. }) => {
            hard.extend(runs().flat_map(|trace| &trace.gates).flat_map(|gate| [*gate == 0.0, *gate == 1.0]));
        }
        _ => {}
    }
    if let Cell::Lstm(Lstm { cell_clip: Some(limit), .. }) = cell {
        clip.extend(runs().flat_map(|trace| &trace.c).map(|c| c.abs() == limit));
    }
    sides
}

impl Tally {
    fn note_corners(&mut self, pieces: &[Vec<bool>; 3]) {
        for (corners, sides) in self.corners.iter_mut().zip(pieces) {
            *corners += usize::from(sides.contains(&true) && sides.contains(&false));
        }
    }

    fn print(&self, what: &str) {
        let Tally { combinations, shortened, corners: [relu, hard, clip], .. } = self;
        println!(
            "{what}: {combinations} combinations; on both sides of relu {relu}, hard sigmoid {hard}, clip {clip}; \
             {shortened} differences shortened"
        );
        self.largest.print(what);
        assert!(self.corners.iter().all(|&corners| corners > 0), "{what}: a corner was never met");
    }
}

fn long() -> bool {
    std::env::var_os("LOCKSTEP_LONG").is_some_and(|value| value == "1")
}

#[test]
fn every_parameter_of_every_cell() {
    let mut tally = Tally::default();
    for combination in combinations_of_cells() {
        combination.check(true, &mut tally);
    }
    tally.print("every parameter, every cell");
}

#[test]
fn every_parameter_in_all_surroundings() {
    let mut tally = Tally::default();
    // 7 shares no factor with the number of any choice, so a seventh has all of them.
    for combination in combinations_of_surroundings().into_iter().step_by(if long() { 1 } else { 7 }) {
        combination.check(true, &mut tally);
    }
    tally.print("every parameter, all surroundings");
}

#[test]
fn random_directions_of_large_cells() {
    let mut tally = Tally::default();
    for combination in combinations_of_size(all_cells(), 33) {
        combination.check(false, &mut tally);
    }
    for combination in combinations_of_size(if long() { all_cells() } else { few_cells() }, 150) {
        combination.check(false, &mut tally);
    }
    tally.print("random directions, H 33 and 150");
}
