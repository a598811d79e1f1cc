//! Each kernel of a training step alone, on one thread, beside the multiply-adds of the same moment. Both are timed by
//! the processor time of the thread: what else the machine does is not counted.

use std::hint::black_box;
use std::time::{Duration, Instant};

use kernels::cpu::gru::{GruBackward, GruForward, GruWeights, gru_backward, gru_forward};
use kernels::cpu::lstm::{LstmBackward, LstmForward, LstmOptions, lstm_backward, lstm_forward};
use kernels::cpu::optimizer::{AdamOptions, AdamStep, adam_update, squared_norm};
use kernels::cpu::reduce::{digest, tree_add};
use kernels::cpu::rnn::{RnnBackward, RnnForward, rnn_backward, rnn_forward};
use kernels::cpu::sequence::InputPart;
use kernels::cpu::softmax::softmax_cross_entropy;
use kernels::{PackedLeft, PackedMatrix, SequenceShape, Simd, Start, gemm, gemm_transposed};
use protocol::cell::{Activation, Cell, RecurrentActivation};
use protocol::job::{EpsilonPlacement, Precision};
use protocol::layout::Head;
use protocol::problem::Problem;
use rustix::time::{ClockId, clock_gettime};

use crate::roofline::FmaProbe;
use crate::summary::median;
use crate::workload::Workload;

/// A kernel is called again and again for so long between two measurements of the multiply-adds.
const BURST: Duration = Duration::from_millis(10);
/// How often both are measured.
const BURSTS: usize = 7;

/// What the kernels work on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelSizes {
    /// The cell.
    pub cell: Cell,
    /// `H`
    pub hidden_size: usize,
    /// Rows of a batch, `B`.
    pub batch_size: usize,
    /// `T`
    pub seq_len: usize,
    /// `V`
    pub classes: usize,
    /// Whether losses are taken after every time step, or after the last one.
    pub head: Head,
    /// `S`: weight gradients are summed for each shard by itself.
    pub shards: usize,
    /// `P`
    pub parameters: usize,
    /// What the operands of products are rounded to.
    pub precision: Precision,
}

impl KernelSizes {
    /// The sizes of a job's last layer, and of all its parameters.
    pub fn of(workload: &Workload) -> Self {
        let Workload { job, data, layout, .. } = workload;
        Self {
            cell: job.cell,
            hidden_size: job.hidden_size as usize,
            batch_size: job.batch_size as usize,
            seq_len: data.seq_len,
            classes: data.model.classes,
            head: data.model.head,
            shards: job.shards as usize,
            parameters: layout.parameters(),
            precision: job.precision,
        }
    }
}

/// What one kernel takes.
#[derive(Debug, Clone, PartialEq)]
pub struct KernelRate {
    /// Which one.
    pub kernel: &'static str,
    /// What it is counted by.
    pub unit: &'static str,
    /// Units of one call.
    pub units: usize,
    /// Nanoseconds for each unit, median.
    pub ns_per_unit: f64,
    /// Floating-point operations of its matrix products, in 10⁹ per second; `None` where it has none.
    pub gflop_s: Option<f64>,
    /// Their share of the multiply-adds in registers, median of neighbours.
    pub of_fma_rate: Option<f64>,
}

/// Measures all kernels of these sizes. Takes some seconds.
///
/// # Errors
/// The system gives no thread.
pub fn measure(simd: Simd, sizes: &KernelSizes) -> Result<Vec<KernelRate>, Problem> {
    // In a pool of one thread, or the kernels that can use several would take those of the machine.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build();
    let pool = pool.map_err(|error| Problem::failed(format!("cannot start a thread: {error}")))?;
    Ok(pool.install(|| {
        let fma = FmaProbe::new(simd, Precision::F32, 1);
        let mut meter = Meter { simd, precision: sizes.precision, fma, rates: Vec::new() };
        meter.cell(sizes);
        meter.products(sizes);
        meter.packing(sizes);
        meter.loss(sizes);
        meter.buffers(sizes);
        meter.rates
    }))
}

struct Meter {
    simd: Simd,
    precision: Precision,
    fma: FmaProbe,
    rates: Vec<KernelRate>,
}

impl Meter {
    /// Measures one kernel whose call has so many units and multiply-adds in matrix products.
    fn kernel(
        &mut self,
        kernel: &'static str,
        (unit, units): (&'static str, usize),
        multiply_adds: usize,
        mut call: impl FnMut(),
    ) {
        call();
        let flop = 2.0 * multiply_adds as f64;
        let (mut seconds, mut shares) = (Vec::with_capacity(BURSTS), Vec::with_capacity(BURSTS));
        for _ in 0..BURSTS {
            let (mut calls, begun, started) = (0_u32, Instant::now(), thread_time());
            while calls == 0 || begun.elapsed() < BURST {
                call();
                calls += 1;
            }
            let of_one = (thread_time() - started).as_secs_f64() / f64::from(calls);
            seconds.push(of_one);
            if multiply_adds > 0 {
                let started = thread_time();
                let fma_rate = self.fma.work() as f64 / (thread_time() - started).as_secs_f64();
                shares.push(flop / of_one / fma_rate);
            }
        }
        let seconds = median(seconds);
        self.rates.push(KernelRate {
            kernel,
            unit,
            units,
            ns_per_unit: 1e9 * seconds / units as f64,
            gflop_s: (multiply_adds > 0).then(|| flop / seconds / 1e9),
            of_fma_rate: (multiply_adds > 0).then(|| median(shares)),
        });
    }

    fn matrix(&self, k: usize, n: usize) -> PackedMatrix {
        PackedMatrix::with_precision(self.precision, k, n)
    }

    /// The cell over all time steps of all rows, forward and backward, with its recurrent products.
    fn cell(&mut self, sizes: &KernelSizes) {
        let active = vec![sizes.batch_size; sizes.seq_len];
        let hidden = sizes.hidden_size;
        let shape = SequenceShape { active: &active, hidden_size: hidden, output_size: hidden };
        match sizes.cell {
            Cell::Rnn => self.rnn(shape),
            Cell::Lstm => self.lstm(shape),
            Cell::Gru => self.gru(shape),
        }
    }

    fn rnn(&mut self, shape: SequenceShape<'_>) {
        let (simd, hidden, activation) = (self.simd, shape.hidden_size, Activation::Tanh);
        let (units, multiply_adds) = per_unit(shape, Cell::Rnn);
        let [mut pre, mut d_pre, d_out] = [(); 3].map(|()| every_step(shape, 1));
        let (mut h, mut d_h) = (states(shape), one_step(shape, 1));
        let packed = self.matrix(hidden, hidden);
        self.kernel("rnn forward", units, multiply_adds, || {
            let (weight_hh, input, pre, h) = (&packed, InputPart::InPlace, &mut pre, &mut h);
            rnn_forward(simd, RnnForward { shape, activation, weight_hh, input, pre, h });
        });
        self.kernel("rnn backward", units, multiply_adds, || {
            let (h, d_out, d_pre, d_h) = (&h, &d_out, &mut d_pre, &mut d_h);
            rnn_backward(simd, RnnBackward { shape, activation, weight_hh: &packed, h, d_out, d_pre, d_h });
        });
    }

    fn lstm(&mut self, shape: SequenceShape<'_>) {
        let (simd, hidden) = (self.simd, shape.hidden_size);
        let (units, multiply_adds) = per_unit(shape, Cell::Lstm);
        let recurrent_activation = RecurrentActivation::Sigmoid;
        let options = LstmOptions { recurrent_activation, cell_clip: None, peepholes: None };
        let (mut gates, d_out) = (every_step(shape, 4), every_step(shape, 1));
        let [mut h, mut c] = [(); 2].map(|()| states(shape));
        let [mut d_h, mut d_c] = [(); 2].map(|()| one_step(shape, 1));
        let mut packed = self.matrix(hidden, 4 * hidden);
        self.kernel("lstm forward", units, multiply_adds, || {
            let (weight_hh, projection, input) = (&packed, None, InputPart::InPlace);
            let (gates, h, c) = (&mut gates, &mut h, &mut c);
            lstm_forward(simd, LstmForward { shape, options, weight_hh, projection, input, gates, h, c });
        });
        packed.reshape(4 * hidden, hidden);
        self.kernel("lstm backward", units, multiply_adds, || {
            let args = LstmBackward {
                shape,
                options,
                weight_hh: &packed,
                projection: None,
                gates: &mut gates,
                c: &c,
                d_out: &d_out,
                d_h: &mut d_h,
                d_c: &mut d_c,
            };
            lstm_backward(simd, args);
        });
    }

    fn gru(&mut self, shape: SequenceShape<'_>) {
        let (simd, hidden, recurrent_activation) =
            (self.simd, shape.hidden_size, RecurrentActivation::Sigmoid);
        let (units, multiply_adds) = per_unit(shape, Cell::Gru);
        let (d_out, bias_hh) = (every_step(shape, 1), vec![0.0; 3 * hidden]);
        let (mut gates, mut h) = (every_step(shape, 4), states(shape));
        let (mut h_part, mut d_h_part, mut d_h) =
            (one_step(shape, 3), one_step(shape, 3), one_step(shape, 1));
        let mut packed = self.matrix(hidden, 3 * hidden);
        self.kernel("gru forward", units, multiply_adds, || {
            let weight_hh = GruWeights::After(&packed);
            let (bias_hh, h_part, gates, h) = (&bias_hh, &mut h_part, &mut gates, &mut h);
            let args = GruForward { shape, recurrent_activation, weight_hh, bias_hh, h_part, gates, h };
            gru_forward(simd, args);
        });
        packed.reshape(3 * hidden, hidden);
        self.kernel("gru backward", units, multiply_adds, || {
            let args = GruBackward {
                shape,
                recurrent_activation,
                weight_hh: GruWeights::After(&packed),
                gates: &mut gates,
                h: &h,
                d_out: &d_out,
                d_h: &mut d_h,
                d_h_part: &mut d_h_part,
            };
            gru_backward(simd, args);
        });
    }

    /// The products around the cell: of all gates from the layer below, back to it, and the weights' gradient.
    fn products(&mut self, sizes: &KernelSizes) {
        let (simd, hidden, gates) = (self.simd, sizes.hidden_size, sizes.cell.gates() * sizes.hidden_size);
        let rows = sizes.batch_size * sizes.seq_len;
        let (mut inputs, mut outputs) = (vec![0.5; rows * hidden], vec![0.25; rows * gates]);
        let units = ("output", rows * gates);
        let packed = self.matrix(hidden, gates);
        self.kernel("input product", units, rows * gates * hidden, || {
            gemm(
                simd,
                rows,
                black_box(&inputs),
                hidden,
                &packed,
                black_box(&mut outputs),
                gates,
                Start::Zero,
            );
        });
        let units = ("output", rows * hidden);
        let packed = self.matrix(gates, hidden);
        self.kernel("input gradient product", units, rows * gates * hidden, || {
            gemm(
                simd,
                rows,
                black_box(&outputs),
                gates,
                &packed,
                black_box(&mut inputs),
                hidden,
                Start::Zero,
            );
        });

        // The (step, row) pairs of one shard.
        let pairs = rows.div_ceil(sizes.shards);
        let mut gradient = vec![0.0; gates * hidden];
        let (mut left, mut right) =
            (PackedLeft::with_precision(self.precision, pairs, gates), self.matrix(pairs, hidden));
        self.kernel("weight gradient product", ("weight", gates * hidden), pairs * gates * hidden, || {
            gemm_transposed(simd, &left, &right, black_box(&mut gradient), hidden, false);
        });
        self.kernel("weight gradient packing", ("element", pairs * (gates + hidden)), 0, || {
            left.pack_row_iter(simd, black_box(&outputs).chunks(gates).take(pairs));
            right.pack_row_iter(simd, black_box(&inputs).chunks(hidden).take(pairs));
        });
    }

    /// The recurrent weights as the forward and as the backward pass read them.
    fn packing(&mut self, sizes: &KernelSizes) {
        let (simd, hidden, gates) = (self.simd, sizes.hidden_size, sizes.cell.gates() * sizes.hidden_size);
        let weights = vec![0.5; gates * hidden];
        let mut packed = self.matrix(hidden, gates);
        let units = ("weight", gates * hidden);
        self.kernel("weight packing, forward", units, 0, || {
            packed.pack_columns(simd, black_box(&weights), hidden)
        });
        packed.reshape(gates, hidden);
        self.kernel("weight packing, backward", units, 0, || {
            packed.pack_rows(simd, black_box(&weights), hidden)
        });
    }

    fn loss(&mut self, sizes: &KernelSizes) {
        let targets_per_row = if sizes.head == Head::EveryStep { sizes.seq_len } else { 1 };
        let (simd, classes, rows) = (self.simd, sizes.classes, sizes.batch_size * targets_per_row);
        let (mut loss, mut correct) = (vec![0.0; rows], vec![false; rows]);
        let (targets, mut logits) = (vec![0; rows], vec![0.5; rows * classes]);
        self.kernel("softmax cross-entropy", ("logit", rows * classes), 0, || {
            softmax_cross_entropy(simd, classes, &targets, &mut logits, &mut loss, &mut correct);
        });
    }

    /// What happens to a whole gradient.
    fn buffers(&mut self, sizes: &KernelSizes) {
        let (simd, len) = (self.simd, sizes.parameters);
        let units = ("parameter", len);
        let [mut gradient, mut parameters, mut first, mut second] = [(); 4].map(|()| vec![0.1; len]);
        let placement = EpsilonPlacement::AfterCorrection;
        let options = AdamOptions { lr: 1e-3, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, placement };
        let step = AdamStep::new(options, 10, 1.0);
        self.kernel("squared norm", units, 0, || {
            black_box(squared_norm(simd, black_box(&gradient)));
        });
        self.kernel("adam", units, 0, || {
            adam_update(simd, &step, &mut parameters, &gradient, &mut first, &mut second);
        });
        self.kernel("digest", units, 0, || {
            black_box(digest(simd, black_box(&parameters), 0));
        });
        first.fill(0.0);
        self.kernel("tree addition", units, 0, || tree_add(simd, black_box(&mut gradient), &first));
    }
}

/// Processor time of this thread.
fn thread_time() -> Duration {
    clock_gettime(ClockId::ThreadCPUTime).try_into().expect("no thread has run for less than no time")
}

/// Units of a cell's call, and the multiply-adds of its recurrent products.
fn per_unit(shape: SequenceShape<'_>, cell: Cell) -> ((&'static str, usize), usize) {
    let units = shape.steps() * shape.hidden_size;
    (("unit", units), units * cell.gates() * shape.hidden_size)
}

// Zeros, because kernels that change their operands would drive other numbers out of the range in which arithmetic has
// the same speed. No kernel looks at a value to decide what it does.

/// `[N, width · H]`
fn every_step(shape: SequenceShape<'_>, width: usize) -> Vec<f32> {
    vec![0.0; shape.steps() * width * shape.hidden_size]
}

/// `[B + N, H]`
fn states(shape: SequenceShape<'_>) -> Vec<f32> {
    vec![0.0; (shape.rows() + shape.steps()) * shape.hidden_size]
}

/// `[B, width · H]`
fn one_step(shape: SequenceShape<'_>, width: usize) -> Vec<f32> {
    vec![0.0; shape.rows() * width * shape.hidden_size]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_of_every_cell_is_measured_and_none_beats_the_multiply_adds() {
        for (preset, cell) in [("mnist-rnn", "rnn"), ("mnist-lstm", "lstm"), ("mnist-gru", "gru")] {
            let settings = [("hidden_size", "20"), ("batch_size", "16")];
            let settings = settings.map(|(key, value)| (key.to_owned(), value.to_owned()));
            let sizes = KernelSizes::of(&Workload::new(preset, &settings).unwrap());
            assert_eq!((sizes.hidden_size, sizes.batch_size, sizes.seq_len), (20, 16, 28));
            let rates = measure(Simd::detect(), &sizes).unwrap();
            assert_eq!(rates.len(), 13);
            assert_eq!(
                [rates[0].kernel, rates[1].kernel],
                [format!("{cell} forward"), format!("{cell} backward")]
            );
            for rate in rates {
                assert!(rate.units > 0 && rate.ns_per_unit > 0.0, "{rate:?}");
                assert!(rate.of_fma_rate.is_none_or(|share| 0.0 < share && share < 1.2), "{rate:?}");
            }
        }
    }
}
