//! How fast this machine will train, before it does: a short probe, and how much of its rate a step reaches.

use std::time::{Duration, Instant};

use kernels::{PackedMatrix, Simd, SimdLevel, Start, gemm};
use protocol::job::Precision;
use protocol::layout::{ModelShape, StateLayout};

use super::CpuDevice;
use crate::cost::Flop;

/// How long the probe takes.
const PROBE: Duration = Duration::from_millis(40);

/// Share of the probed rate that whole steps reach, with their pointwise operations, packing and optimizer. Two threads
/// with AVX-512, 2026-11-22, medians: char-lstm 0.71, char-gru 0.63, char-lstm-512 0.70, mnist-rnn 0.43, mnist-lstm 0.64,
/// mnist-gru 0.57, where the probe reaches 0.88 of the multiply-adds in registers. Other machines differ.
const TYPICAL_EFFICIENCY: f64 = 0.6;

/// The same where AMX multiplies bf16, so fast that all else takes most of the time. Two threads, 2026-11-23: char-lstm 0.32,
/// char-lstm-512 0.47, mnist-lstm 0.2.
const TYPICAL_AMX_EFFICIENCY: f64 = 0.3;

/// Seconds of a step and of a batch of an evaluation, as far as can be known before.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Speed {
    /// Of a training step of the global batch.
    pub step_seconds: f64,
    /// Of an evaluation of as many rows.
    pub evaluation_seconds: f64,
}

impl Speed {
    /// The speed of a fleet on this machine whose workers have so many threads together. Takes 40 ms.
    pub fn probe(simd: Simd, layout: &StateLayout, seq_len: usize, threads: usize) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let efficiency = match (layout.shape.precision, simd.level()) {
            (Precision::Bf16, SimdLevel::Amx) => TYPICAL_AMX_EFFICIENCY,
            _ => TYPICAL_EFFICIENCY,
        };
        let rate = efficiency * gemm_rate(simd, &layout.shape, threads.clamp(1, cores));
        let flop = Flop::of_batch(layout, seq_len);
        Self { step_seconds: flop.step() / rate, evaluation_seconds: flop.forward / rate }
    }
}

/// Floating-point operations per second of the recurrent product, on so many threads at once.
fn gemm_rate(simd: Simd, shape: &ModelShape, threads: usize) -> f64 {
    let layer = shape.layer(shape.num_layers() - 1);
    let (hidden, gates) = (layer.output_size, layer.gate_size());
    let rows = CpuDevice::block_rows(shape);
    let probe = || {
        let state = vec![0.5; rows * hidden];
        let mut weights = PackedMatrix::with_precision(shape.precision, hidden, gates);
        weights.pack_rows(simd, &vec![0.25; hidden * gates], gates);
        let mut pre = vec![0.0; rows * gates];
        let mut products = 0_u64;
        let started = Instant::now();
        while products == 0 || started.elapsed() < PROBE {
            gemm(simd, rows, &state, hidden, &weights, &mut pre, gates, Start::Zero);
            products += 1;
        }
        (2 * rows * hidden * gates) as f64 * products as f64 / started.elapsed().as_secs_f64()
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(probe)).collect();
        let own = probe();
        others.into_iter().map(|other| other.join().expect("a product does not panic")).sum::<f64>() + own
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::job::JobFile;

    #[test]
    fn a_batch_of_an_evaluation_takes_a_third_of_a_step_or_more() {
        let job = JobFile::resolve("mnist-rnn", None, &[]).unwrap().job;
        let speed = Speed::probe(Simd::detect(), &StateLayout::of(&job, 28, 10), 28, 1000);
        let share = speed.evaluation_seconds / speed.step_seconds;
        assert!(speed.step_seconds.is_finite() && speed.step_seconds > 0.0, "{speed:?}");
        assert!((0.33..0.5).contains(&share), "{share}");
    }
}
