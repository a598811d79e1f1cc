//! What this machine can do at most: multiply-adds in registers, a large matrix product beside them, memory.

use std::hint::black_box;
use std::time::{Duration, Instant};

use kernels::cpu::roofline::multiply_add;
use kernels::{PackedMatrix, Simd, SimdLevel, Start, gemm};
use protocol::job::Precision;
use protocol::problem::Problem;

use crate::summary::median;
use crate::together::together;

/// The product must reach this share of the multiply-adds in registers.
pub const LEAST_SHARE: f64 = 0.85;

/// Rows, columns and depth of the product.
const GEMM_SIZE: usize = 1024;
/// One measurement of the multiply-adds takes about as long as the product does on a fast core.
const PROBE: Duration = Duration::from_millis(10);
/// Pairs of one measurement each of multiply-adds and product.
const PAIRS: usize = 21;
/// Slow levels do with fewer: after this time no more than [`FEWEST_PAIRS`] are begun.
const PAIRS_LIMIT: Duration = Duration::from_secs(6);
const FEWEST_PAIRS: usize = 3;
/// Length of the buffers that are read and copied.
const MEMORY_BYTES: usize = 256 << 20;
const MEMORY_REPETITIONS: usize = 5;

/// Multiply-adds in registers on some threads at once.
#[derive(Debug, Clone, Copy)]
pub struct FmaProbe {
    simd: Simd,
    precision: Precision,
    threads: usize,
    rounds: u64,
}

impl FmaProbe {
    /// A probe of which one measurement takes between 5 and 10 ms.
    pub fn new(simd: Simd, precision: Precision, threads: usize) -> Self {
        let mut rounds = 1 << 8;
        loop {
            let started = Instant::now();
            multiply_add(simd, precision, rounds);
            if 2 * started.elapsed() >= PROBE {
                return Self { simd, precision, threads, rounds };
            }
            rounds *= 2;
        }
    }

    /// What one thread does in one measurement; gives its floating-point operations.
    pub fn work(&self) -> u64 {
        multiply_add(self.simd, self.precision, self.rounds)
    }

    /// Measures once: GFLOP/s of all threads, until the slowest is done.
    pub fn measure(&self) -> f64 {
        let (flop, time) = together(vec![|| self.work(); self.threads]);
        giga(flop.iter().sum::<u64>() as f64, time)
    }

    /// Measures some times.
    pub fn measure_times(&self, times: usize) -> Vec<f64> {
        (0..times).map(|_| self.measure()).collect()
    }
}

/// The product of two matrices of 1024 rows and columns, the right one packed before.
struct GemmProbe {
    left: Vec<f32>,
    right: PackedMatrix,
    product: Vec<f32>,
}

impl GemmProbe {
    fn new(precision: Precision) -> Self {
        let numbers = |salt: usize| -> Vec<f32> {
            (0..GEMM_SIZE * GEMM_SIZE).map(|at| ((at + salt) % 251) as f32 / 251.0 - 0.5).collect()
        };
        let mut right = PackedMatrix::with_precision(precision, GEMM_SIZE, GEMM_SIZE);
        right.pack_rows(Simd::detect(), &numbers(7), GEMM_SIZE);
        Self { left: numbers(0), right, product: vec![0.0; GEMM_SIZE * GEMM_SIZE] }
    }

    /// Measures once, each thread with a part of the rows: GFLOP/s until the slowest is done.
    fn measure(&mut self, simd: Simd, threads: usize) -> f64 {
        let part = GEMM_SIZE.div_ceil(threads) * GEMM_SIZE;
        let right = &self.right;
        let jobs = self.left.chunks(part).zip(self.product.chunks_mut(part)).map(|(left, product)| {
            move || {
                let rows = left.len() / GEMM_SIZE;
                gemm(simd, rows, left, GEMM_SIZE, right, product, GEMM_SIZE, Start::Zero);
            }
        });
        let (_, time) = together(jobs.collect());
        black_box(&self.product);
        giga(2.0 * (GEMM_SIZE as f64).powi(3), time)
    }
}

/// Multiply-adds in registers and the product beside them, at one level on some threads.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    /// The level.
    pub simd: Simd,
    /// Of the operands.
    pub precision: Precision,
    /// Threads at once.
    pub threads: usize,
    /// Median GFLOP/s of multiply-adds in registers.
    pub fma: f64,
    /// Median GFLOP/s of the product.
    pub gemm: f64,
    /// Median of the product's share of the multiply-adds measured just before it.
    pub share: f64,
}

impl Rate {
    /// Measures both in turn; the first pair does not count. Takes about half a second.
    pub fn measure(simd: Simd, precision: Precision, threads: usize) -> Self {
        let (fma, mut gemm) = (FmaProbe::new(simd, precision, threads), GemmProbe::new(precision));
        let started = Instant::now();
        let mut pairs = Vec::with_capacity(PAIRS + 1);
        while pairs.len() <= PAIRS && (pairs.len() <= FEWEST_PAIRS || started.elapsed() < PAIRS_LIMIT) {
            pairs.push((fma.measure(), gemm.measure(simd, threads)));
        }
        let of = |number: fn(&(f64, f64)) -> f64| median(pairs[1..].iter().map(number).collect());
        Self {
            simd,
            precision,
            threads,
            fma: of(|pair| pair.0),
            gemm: of(|pair| pair.1),
            share: of(|pair| pair.1 / pair.0),
        }
    }

    /// Whether the two rates can be believed and the product is as good as it must be.
    ///
    /// # Errors
    /// The product's share of the multiply-adds is above 1 or, in f32, below [`LEAST_SHARE`].
    pub fn verdict(&self) -> Result<(), Problem> {
        let Self { simd, precision, threads, fma, gemm, share } = self;
        let threads = if *threads == 1 { "1 thread".to_owned() } else { format!("{threads} threads") };
        let sentence = format!(
            "with {simd} on {threads} the product of two 1024 x 1024 matrices runs at {gemm:.0} GFLOP/s, {:.0} % of the \
             {fma:.0} GFLOP/s of multiply-adds in registers",
            100.0 * share
        );
        if *share > 1.0 {
            let hint = "nothing can be faster than the multiply-adds: measure again while the machine does nothing else";
            return Err(Problem::failed(sentence).hint(hint));
        }
        // Tiles of bf16 are multiplied faster than the first-level cache gives and takes them.
        if *share < LEAST_SHARE && *precision == Precision::F32 {
            let hint = format!(
                "at least {:.0} % are expected: measure again while the machine does nothing else",
                100.0 * LEAST_SHARE
            );
            return Err(Problem::failed(sentence).hint(hint));
        }
        Ok(())
    }
}

/// What is worth a measurement: bf16 where AMX multiplies it, and the levels that multiply f32 with vector instructions of
/// their own, or the portable one where there are none.
pub fn levels() -> Vec<(Simd, Precision)> {
    let available = Simd::available().into_iter().filter(|simd| simd.level() != SimdLevel::Portable);
    let levels: Vec<_> = available.map(|simd| (simd, own_precision(simd))).collect();
    if levels.is_empty() { vec![(Simd::PORTABLE, Precision::F32)] } else { levels }
}

/// What a level has instructions of its own for.
pub fn own_precision(simd: Simd) -> Precision {
    if simd.level() == SimdLevel::Amx { Precision::Bf16 } else { Precision::F32 }
}

/// How fast memory is, in GB/s, beyond the caches of one core.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bandwidth {
    /// Threads at once.
    pub threads: usize,
    /// Bytes read.
    pub read: f64,
    /// Bytes read and as many written.
    pub copy: f64,
}

impl Bandwidth {
    /// Reads and copies 256 MiB some times; the medians.
    pub fn measure(threads: usize) -> Self {
        let part = (MEMORY_BYTES / size_of::<u64>()).div_ceil(threads);
        let source = vec![1_u64; MEMORY_BYTES / size_of::<u64>()];
        let mut target = vec![0_u64; source.len()];
        let (mut read, mut copy) = (Vec::new(), Vec::new());
        // The first round is the one in which the system hands out the target's pages.
        for _ in 0..=MEMORY_REPETITIONS {
            let jobs = source.chunks(part).zip(target.chunks_mut(part));
            let (_, time) = together(jobs.map(|(from, to)| move || to.copy_from_slice(from)).collect());
            black_box(&target);
            copy.push(giga(2.0 * MEMORY_BYTES as f64, time));
            let jobs = source.chunks(part).map(|part| move || black_box(part).iter().sum::<u64>());
            let (_, time) = together(jobs.collect());
            read.push(giga(MEMORY_BYTES as f64, time));
        }
        Self { threads, read: median(read.split_off(1)), copy: median(copy.split_off(1)) }
    }
}

/// So many per second, in units of 10⁹.
fn giga(count: f64, time: Duration) -> f64 {
    count / time.as_secs_f64() / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_that_is_too_slow_or_too_good_is_refused() {
        let rate = |share: f64| {
            let (simd, precision) = (Simd::PORTABLE, Precision::F32);
            Rate { simd, precision, threads: 2, fma: 200.0, gemm: 200.0 * share, share }
        };
        assert_eq!(rate(1.0).verdict(), Ok(()));
        assert_eq!(rate(0.85).verdict(), Ok(()));
        let slow = rate(0.84).verdict().unwrap_err();
        assert_eq!(
            slow.sentence,
            "with portable on 2 threads the product of two 1024 x 1024 matrices runs at 168 GFLOP/s, 84 % of the 200 \
             GFLOP/s of multiply-adds in registers"
        );
        assert!(slow.hint.unwrap().starts_with("at least 85 % are expected"));
        let fast = rate(1.01).verdict().unwrap_err();
        assert!(fast.hint.unwrap().starts_with("nothing can be faster"));
    }

    #[test]
    fn two_threads_multiply_and_add_no_slower_than_one() {
        let rate = |threads| median(FmaProbe::new(Simd::detect(), Precision::F32, threads).measure_times(5));
        let (one, two) = (rate(1), rate(2));
        assert!(one > 0.1 && two > 0.2 * one, "{one} {two}");
    }
}
