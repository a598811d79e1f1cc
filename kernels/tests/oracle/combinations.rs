//! What the gradients are checked on: tables of networks and batches.

use kernels::oracle::activation::{Activation, RecurrentActivation};
use kernels::oracle::cell::Cell;
use kernels::oracle::gru::{Gru, Reset};
use kernels::oracle::head::Head;
use kernels::oracle::layer::Layer;
use kernels::oracle::lstm::Lstm;
use kernels::oracle::network::{Batch, Input, Network};
use kernels::oracle::rnn::Rnn;
use kernels::oracle::stack::{InitialState, Stack};

use crate::numbers::numbers;

const CLASSES: usize = 3;
const INPUT_SIZE: usize = 2;
const TOKENS: usize = 4;

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Lengths {
    /// Rows of one step.
    One,
    Full,
    Mixed,
    /// Mixed; of three rows one has no step at all.
    Empty,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Reading {
    Dense,
    OneHot,
    Embedding,
}

/// One network and batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Combination {
    /// A projection counts here as its share of the layer's width: 2 is half of it.
    pub(crate) cell: Cell,
    pub(crate) hidden_size: usize,
    /// 2: with a narrower layer of the same cell below.
    pub(crate) num_layers: usize,
    pub(crate) bidirectional: bool,
    pub(crate) rows: usize,
    pub(crate) lengths: Lengths,
    pub(crate) initial_state: InitialState,
    pub(crate) fed: bool,
    pub(crate) resets: bool,
    pub(crate) masks: bool,
    pub(crate) reading: Reading,
    pub(crate) head: Head,
}

/// The numbers of a batch.
pub(crate) struct Example {
    rows: usize,
    seq_len: usize,
    reading: Reading,
    dense: Vec<f64>,
    tokens: Vec<u32>,
    targets: Vec<u32>,
    lengths: Option<Vec<usize>>,
    resets: Option<Vec<Vec<usize>>>,
    masks: Option<Vec<Vec<f64>>>,
}

/// Whether all combinations are asked for.
pub(crate) fn long() -> bool {
    std::env::var_os("LOCKSTEP_LONG").is_some_and(|value| value == "1")
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

pub(crate) fn all_cells() -> Vec<Cell> {
    [rnn_cells(), lstm_cells(), gru_cells()].concat()
}

/// One of each kind, and an LSTM with everything.
pub(crate) fn few_cells() -> Vec<Cell> {
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
pub(crate) fn combinations_of_cells() -> Vec<Combination> {
    let mut all = Vec::new();
    for cell in all_cells() {
        for bidirectional in [false, true] {
            for lengths in [Lengths::One, Lengths::Full, Lengths::Mixed, Lengths::Empty] {
                for rows in [1, 3] {
                    let at = all.len();
                    let widest = if long() || at.is_multiple_of(4) { 7 } else { 2 };
                    all.push(Combination {
                        cell,
                        hidden_size: [1, 3, widest][at % 3],
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
pub(crate) fn combinations_of_surroundings() -> Vec<Combination> {
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
pub(crate) fn combinations_of_size(cells: Vec<Cell>, hidden_size: usize) -> Vec<Combination> {
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
    pub(crate) fn network(&self) -> Network {
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

    /// The parameters, and behind them the fed state where there is one.
    pub(crate) fn point(&self, network: &Network) -> Vec<f64> {
        let scale = if self.hidden_size > 7 { 6.0 / (self.hidden_size as f64).sqrt() } else { 1.2 };
        let mut point = numbers(network.layout().parameter_count(), scale, 1);
        if self.fed {
            point.extend(numbers(self.rows * network.stack.state_size(), 0.5, 2));
        }
        point
    }

    pub(crate) fn example(&self, network: &Network) -> Example {
        let (rows, seq_len) = (self.rows, self.seq_len());
        let below = |limit: usize, len: usize, salt: u64| -> Vec<u32> {
            numbers(len, 1.0, salt).iter().map(|x| ((x + 1.0) / 2.0 * limit as f64) as u32).collect()
        };
        let resets =
            [[2, 3], [0, 1], [1, 3]].map(|steps| steps.into_iter().filter(|&t| t < seq_len).collect());
        let mask = |layer: &Layer| {
            let kept = below(2, rows * seq_len * layer.width(), 6);
            kept.into_iter().map(|kept| f64::from(kept) / 0.5).collect()
        };
        Example {
            rows,
            seq_len,
            reading: self.reading,
            dense: numbers(rows * seq_len * INPUT_SIZE, 1.5, 3),
            tokens: below(TOKENS, rows * seq_len, 4),
            targets: below(CLASSES, if self.head == Head::EveryStep { rows * seq_len } else { rows }, 5),
            lengths: self.lengths(),
            resets: self.resets.then(|| resets[..rows].to_vec()),
            masks: self.masks.then(|| network.stack.layers.iter().map(mask).collect()),
        }
    }
}

impl Example {
    pub(crate) fn batch(&self) -> Batch<'_> {
        let input = match self.reading {
            Reading::Dense => Input::Dense(&self.dense),
            Reading::OneHot | Reading::Embedding => Input::Tokens(&self.tokens),
        };
        Batch {
            lengths: self.lengths.as_deref(),
            resets: self.resets.as_deref(),
            masks: self.masks.as_deref(),
            ..Batch::new(self.rows, self.seq_len, input, &self.targets)
        }
    }
}
