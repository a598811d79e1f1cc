//! The kernels of a training step, one by one, for [`crate::device_rates`].

use cubecl::Runtime;
use cubecl::client::ComputeClient;
use kernels::cpu::optimizer::{AdamOptions, AdamStep};
use kernels::cube::buffer::Buffer;
use kernels::cube::gemm::{Matrix, Right, Shape, Start, product};
use kernels::cube::gru::{GruSequence, gru_backward, gru_forward};
use kernels::cube::lstm::{LstmSequence, lstm_backward, lstm_forward};
use kernels::cube::rnn::{RnnSequence, rnn_backward, rnn_forward};
use kernels::cube::rows::{Extent, TokenTable, token_rows};
use kernels::cube::sequence::{Limits, Needs, Plan};
use kernels::cube::shards::{Partials, ShardTable, products};
use kernels::cube::{elements, softmax};
use protocol::cell::{Cell, CellOptions};
use protocol::job::EpsilonPlacement;
use protocol::layout::Head;
use protocol::problem::Problem;
use protocol::slots::slots_of;

use crate::device_rates::{DeviceMeter, DeviceRate, Work};
use crate::kernel_rates::KernelSizes;

const FLOAT: usize = size_of::<f32>();

impl<R: Runtime> DeviceMeter<R> {
    /// Measures all kernels of these sizes. Takes some seconds.
    ///
    /// # Errors
    /// The device fails.
    pub fn measure(&mut self, sizes: &KernelSizes) -> Result<Vec<DeviceRate>, Problem> {
        self.cell(sizes)?;
        self.products(sizes)?;
        self.loss(sizes)?;
        self.buffers(sizes.parameters)?;
        Ok(std::mem::take(&mut self.rates))
    }

    /// A layer's cell over all time steps, forward and backward.
    fn cell(&mut self, sizes: &KernelSizes) -> Result<(), Problem> {
        let KernelSizes { cell, precision, hidden_size: hidden, batch_size: runs, seq_len: steps, .. } =
            *sizes;
        let client = self.client.clone();
        let extent = Extent { steps, runs };
        let (places, columns, options) = (extent.places(), cell.gates() * hidden, CellOptions::PLAIN);
        let needs = Needs::of(cell, options.reset, hidden, hidden);
        let plan = Plan::choose(needs, runs, Limits::of(&client));
        let lengths = Buffer::from_words(&client, &vec![steps as u32; runs]);
        let weights = zeros(&client, columns * hidden);
        let [pre, gates] = [columns, 4 * hidden].map(|width| zeros(&client, places * width));
        let [h, c] = [(); 2].map(|()| zeros(&client, (places + runs) * hidden));
        let d_out = zeros(&client, places * hidden);
        let [d_start_h, d_start_c] = [(); 2].map(|()| zeros(&client, runs * hidden));
        let kept = if cell == Cell::Rnn { 0 } else { 4 };
        let states = if cell == Cell::Lstm { 2 } else { 1 };
        let work = |per_unit: usize| Work {
            flop: 2 * (places * columns * hidden) as u64,
            bytes: (FLOAT * (columns * hidden + places * hidden * per_unit)) as u64,
            layer_steps: steps,
        };
        let forward = work(cell.gates() + kept + states);
        // What was kept is read and its gradient is written in its place.
        let backward = work(2 * kept.max(1) + states);
        match cell {
            Cell::Rnn => {
                let activation = options.activation;
                let lengths = &lengths;
                let of = RnnSequence { extent, hidden, activation, precision, plan, lengths, h: &h };
                self.kernel("rnn forward", forward, || rnn_forward(&client, of, &pre, &weights))?;
                self.kernel("rnn backward", backward, || {
                    rnn_backward(&client, of, &d_out, &weights, &pre, &d_start_h);
                })
            }
            Cell::Lstm => {
                let of = LstmSequence {
                    extent,
                    hidden,
                    output: hidden,
                    options: &options,
                    precision,
                    plan,
                    lengths: &lengths,
                    peepholes: None,
                    gates: &gates,
                    c: &c,
                };
                self.kernel("lstm forward", forward, || lstm_forward(&client, of, &pre, &weights, None, &h))?;
                self.kernel("lstm backward", backward, || {
                    lstm_backward(&client, of, &d_out, &weights, None, &d_start_h, &d_start_c);
                })
            }
            Cell::Gru => {
                let of = GruSequence {
                    extent,
                    hidden,
                    reset: options.reset,
                    recurrent_activation: options.recurrent_activation,
                    precision,
                    plan,
                    lengths: &lengths,
                    gates: &gates,
                    h: &h,
                };
                let bias = zeros(&client, hidden);
                self.kernel("gru forward", forward, || {
                    gru_forward(&client, of, &pre, &weights, Some(&bias))
                })?;
                self.kernel("gru backward", backward, || {
                    gru_backward(&client, of, &d_out, &weights, &d_start_h);
                })
            }
        }
    }

    /// What goes before and after the cell: the input's part of the gates, and the gradients of the weights.
    fn products(&mut self, sizes: &KernelSizes) -> Result<(), Problem> {
        let KernelSizes { cell, precision, hidden_size: hidden, classes, .. } = *sizes;
        let KernelSizes { batch_size: runs, seq_len: steps, .. } = *sizes;
        let client = self.client.clone();
        let extent = Extent { steps, runs };
        let (places, columns) = (extent.places(), cell.gates() * hidden);
        let [x, gates, weight] =
            [places * hidden, places * columns, columns * hidden].map(|len| zeros(&client, len));
        let bias = zeros(&client, columns);
        let of = |m: usize, n: usize, k: usize| Work {
            flop: 2 * (m * n * k) as u64,
            bytes: (FLOAT * (m * k + k * n + m * n)) as u64,
            layer_steps: 0,
        };
        self.kernel("input of a layer below", of(places, columns, hidden), || {
            let shape = Shape { m: places, n: columns, k: hidden };
            let right = Right::Transposed(Matrix::dense(&weight, hidden));
            let (x, start) = (Matrix::dense(&x, hidden), Start::Row(&bias, 0));
            product(&client, precision, shape, x, right, start, &gates, columns);
        })?;
        let tokens = Buffer::from_words(&client, &vec![0; places]);
        let table = zeros(&client, columns * classes);
        let gathered = Work { bytes: (2 * FLOAT * places * columns) as u64, ..Work::default() };
        self.kernel("input of tokens", gathered, || {
            let table = TokenTable { buffer: &table, at: 0, token_stride: 1, column_stride: classes };
            token_rows(&client, extent, &tokens, table, columns, Some(&bias), &gates);
        })?;
        let shards = sizes.shards;
        let words: Vec<u32> = (0..shards as u32)
            .flat_map(|shard| {
                let rows = slots_of(runs as u32, shards as u32, shard..shard + 1);
                [rows.start, rows.end - rows.start, steps as u32]
            })
            .collect();
        let table = ShardTable::new(Buffer::from_words(&client, &words), runs);
        let sums = zeros(&client, shards * columns * hidden);
        let work = Work {
            flop: 2 * (places * columns * hidden) as u64,
            bytes: (FLOAT * (places * (columns + hidden) + shards * columns * hidden)) as u64,
            layer_steps: 0,
        };
        self.kernel("weight gradient", work, || {
            let (d, x) = (Matrix::dense(&gates, columns), Matrix::dense(&x, hidden));
            let into = Partials { buffer: &sums, stride: columns * hidden, at: 0 };
            products(&client, precision, &table, (columns, hidden), d, x, into);
        })
    }

    /// Logits and their loss.
    fn loss(&mut self, sizes: &KernelSizes) -> Result<(), Problem> {
        let KernelSizes { precision, hidden_size: hidden, classes, .. } = *sizes;
        let client = self.client.clone();
        let rows = sizes.batch_size * if sizes.head == Head::EveryStep { sizes.seq_len } else { 1 };
        let [features, weight, logits] =
            [rows * hidden, classes * hidden, rows * classes].map(|len| zeros(&client, len));
        let work = Work {
            flop: 2 * (rows * classes * hidden) as u64,
            bytes: (FLOAT * (rows * hidden + classes * hidden + rows * classes)) as u64,
            layer_steps: 0,
        };
        self.kernel("logits", work, || {
            let (shape, right) =
                (Shape { m: rows, n: classes, k: hidden }, Right::Transposed(Matrix::dense(&weight, hidden)));
            let features = Matrix::dense(&features, hidden);
            product(&client, precision, shape, features, right, Start::Zero, &logits, classes);
        })?;
        let targets = Buffer::from_words(&client, &vec![0; rows]);
        let results = zeros(&client, softmax::RESULT * rows);
        let work = Work { bytes: (2 * FLOAT * rows * classes) as u64, ..Work::default() };
        self.kernel("softmax cross-entropy", work, || {
            softmax::cross_entropy(&client, classes, &targets, &logits, &results, true);
        })
    }

    /// What happens to a whole gradient. The norm and the digest are read back.
    fn buffers(&mut self, parameters: usize) -> Result<(), Problem> {
        let client = self.client.clone();
        let [gradient, values, first, second] = [(); 4].map(|()| zeros(&client, parameters));
        let of = |times: usize| Work { bytes: (FLOAT * times * parameters) as u64, ..Work::default() };
        let mut failure = None;
        self.kernel("squared norm", of(1), || {
            failure = elements::squared_norm(&client, &gradient).err().or(failure.take());
        })?;
        let placement = EpsilonPlacement::AfterCorrection;
        let options = AdamOptions { lr: 1e-3, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, placement };
        let step = AdamStep::new(options, 10, 1.0);
        self.kernel("adam", of(7), || {
            elements::adam(&client, &step, &gradient, &values, &first, &second);
        })?;
        self.kernel("digest", of(1), || {
            failure = elements::digest(&client, &values, 0).err().or(failure.take());
        })?;
        self.kernel("tree addition", of(3), || elements::add(&client, &gradient, &first, 0..parameters))?;
        failure.map_or(Ok(()), |error| Err(Problem::failed(format!("the device fails: {}", error.0))))
    }
}

/// Zeros, because kernels that change their operands would drive other numbers out of the range in which arithmetic has
/// the same speed.
fn zeros<R: Runtime>(client: &ComputeClient<R>, len: usize) -> Buffer {
    Buffer::from_floats(client, &vec![0.0; len])
}
