//! The kernels at the presets' shapes, on one thread: `cargo bench -p lockstep-benches --bench cells`.
//!
//! A block has the rows that one of two threads works on at a time: a quarter of the batch, 16 or 38. The "elements" of
//! the products are floating-point operations.
#![allow(missing_docs, reason = "criterion's macros make functions of which nobody reads the documentation")]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kernels::cpu::gru::{GruBackward, GruForward, GruWeights, gru_backward, gru_forward};
use kernels::cpu::lstm::{LstmBackward, LstmForward, LstmOptions, lstm_backward, lstm_forward};
use kernels::cpu::rnn::{RnnBackward, RnnForward, rnn_backward, rnn_forward};
use kernels::{PackedLeft, PackedMatrix, SequenceShape, Simd, gemm, gemm_transposed};
use protocol::cell::{Activation, RecurrentActivation};

/// (m, n, k): recurrent product of a block, its backward twin, the projection of a whole block.
const GEMMS: [(usize, usize, usize); 9] = [
    (16, 512, 128),
    (16, 128, 512),
    (800, 512, 128),
    (16, 2048, 512),
    (16, 512, 2048),
    (38, 150, 150),
    (38, 600, 150),
    (38, 150, 600),
    (38, 450, 150),
];
/// (m, n, k) of the weight gradients of one shard: gates, inputs, (row, step) pairs.
const GRADIENTS: [(usize, usize, usize); 4] =
    [(512, 128, 400), (2048, 512, 800), (600, 150, 525), (150, 150, 525)];

const CHAR: SequenceShape<'_> = SequenceShape { active: &[16; 50], hidden_size: 128, output_size: 128 };
const CHAR_512: SequenceShape<'_> = SequenceShape { active: &[16; 100], hidden_size: 512, output_size: 512 };
const IMAGE: SequenceShape<'_> = SequenceShape { active: &[38; 28], hidden_size: 150, output_size: 150 };

fn products(criterion: &mut Criterion) {
    let simd = Simd::detect();
    let mut group = criterion.benchmark_group("gemm");
    for (m, n, k) in GEMMS {
        let (a, mut c) = (vec![0.5; m * k], vec![0.0; m * n]);
        let mut b = PackedMatrix::new(k, n);
        b.pack_rows(&vec![0.25; k * n], n);
        group.throughput(Throughput::Elements((2 * m * n * k) as u64));
        group.bench_function(format!("m {m} n {n} k {k}"), |bencher| {
            bencher.iter(|| gemm(simd, m, black_box(&a), k, &b, black_box(&mut c), n, false));
        });
    }
    group.finish();

    let mut group = criterion.benchmark_group("weight gradient");
    for (m, n, k) in GRADIENTS {
        let (rows_a, rows_b, mut c) = (vec![0.5; k * m], vec![0.25; k * n], vec![0.0; m * n]);
        let (mut a, mut b) = (PackedLeft::new(k, m), PackedMatrix::new(k, n));
        group.throughput(Throughput::Elements((2 * m * n * k) as u64));
        group.bench_function(format!("m {m} n {n} k {k}, packing"), |bencher| {
            bencher.iter(|| {
                a.reset(k, m);
                a.pack_row_iter(black_box(&rows_a).chunks(m));
                b.reset(k, n);
                b.pack_row_iter(black_box(&rows_b).chunks(n));
            });
        });
        group.bench_function(format!("m {m} n {n} k {k}, product"), |bencher| {
            bencher.iter(|| gemm_transposed(simd, &a, &b, black_box(&mut c), n, false));
        });
    }
    group.finish();
}

/// Zeros of `[steps][rows][width · H]`. Values do not change the time: no kernel branches on one.
fn zeros(shape: SequenceShape<'_>, steps: usize, width: usize) -> Vec<f32> {
    vec![0.0; steps * shape.rows() * width * shape.hidden_size]
}

fn name(direction: &str, shape: SequenceShape<'_>) -> BenchmarkId {
    let (seq_len, rows, hidden) = (shape.active.len(), shape.rows(), shape.hidden_size);
    BenchmarkId::new(direction, format!("T {seq_len} rows {rows} H {hidden}"))
}

fn lstm(criterion: &mut Criterion) {
    let simd = Simd::detect();
    let mut group = criterion.benchmark_group("lstm");
    group.sample_size(20);
    for shape in [CHAR, CHAR_512, IMAGE] {
        let (hidden, steps) = (shape.hidden_size, shape.active.len());
        let mut weight_hh = PackedMatrix::new(hidden, 4 * hidden);
        let [mut gates, mut d_gates] = [zeros(shape, steps, 4), zeros(shape, steps, 4)];
        let [mut h, mut c] = [zeros(shape, steps + 1, 1), zeros(shape, steps + 1, 1)];
        let [mut d_h, mut d_c] = [zeros(shape, 1, 1), zeros(shape, 1, 1)];
        let d_out = zeros(shape, steps, 1);
        let recurrent_activation = RecurrentActivation::Sigmoid;
        let options = LstmOptions { recurrent_activation, cell_clip: None, peepholes: None };
        group.bench_function(name("forward", shape), |bencher| {
            bencher.iter(|| {
                let (weight_hh, projection) = (&weight_hh, None);
                let (gates, h, c) = (&mut gates[..], &mut h[..], &mut c[..]);
                lstm_forward(simd, LstmForward { shape, options, weight_hh, projection, gates, h, c });
            });
        });
        weight_hh.reset(4 * hidden, hidden);
        group.bench_function(name("backward", shape), |bencher| {
            bencher.iter(|| {
                let (weight_hh, gates, c, d_out) = (&weight_hh, &gates, &c, &d_out);
                let (d_gates, d_h, d_c) = (&mut d_gates[..], &mut d_h[..], &mut d_c[..]);
                let projection = None;
                lstm_backward(
                    simd,
                    LstmBackward {
                        shape,
                        options,
                        weight_hh,
                        projection,
                        gates,
                        c,
                        d_out,
                        d_gates,
                        d_h,
                        d_c,
                    },
                );
            });
        });
    }
    group.finish();
}

fn gru(criterion: &mut Criterion) {
    let simd = Simd::detect();
    let mut group = criterion.benchmark_group("gru");
    group.sample_size(20);
    for shape in [CHAR, IMAGE] {
        let (hidden, steps) = (shape.hidden_size, shape.active.len());
        let mut weight_hh = PackedMatrix::new(hidden, 3 * hidden);
        let recurrent_activation = RecurrentActivation::Sigmoid;
        let bias_hh = vec![0.0; 3 * hidden];
        let [x_part, mut d_x_part, mut d_h_part] = [(); 3].map(|()| zeros(shape, steps, 3));
        let [mut h_part, mut gates] = [zeros(shape, 1, 3), zeros(shape, steps, 4)];
        let [mut h, mut d_h] = [zeros(shape, steps + 1, 1), zeros(shape, 1, 1)];
        let d_out = zeros(shape, steps, 1);
        group.bench_function(name("forward", shape), |bencher| {
            bencher.iter(|| {
                let args = GruForward {
                    shape,
                    recurrent_activation,
                    weight_hh: GruWeights::After(&weight_hh),
                    bias_hh: &bias_hh,
                    x_part: &x_part,
                    h_part: &mut h_part,
                    gates: &mut gates,
                    h: &mut h,
                };
                gru_forward(simd, args);
            });
        });
        weight_hh.reset(3 * hidden, hidden);
        group.bench_function(name("backward", shape), |bencher| {
            bencher.iter(|| {
                let args = GruBackward {
                    shape,
                    recurrent_activation,
                    weight_hh: GruWeights::After(&weight_hh),
                    gates: &gates,
                    h: &h,
                    d_out: &d_out,
                    d_x_part: &mut d_x_part,
                    d_h_part: &mut d_h_part,
                    d_h: &mut d_h,
                    h_scratch: &mut [],
                };
                gru_backward(simd, args);
            });
        });
    }
    group.finish();
}

fn rnn(criterion: &mut Criterion) {
    let simd = Simd::detect();
    let mut group = criterion.benchmark_group("rnn");
    group.sample_size(20);
    let (shape, steps) = (IMAGE, IMAGE.active.len());
    let weight_hh = PackedMatrix::new(shape.hidden_size, shape.hidden_size);
    let [mut pre, mut d_pre, d_out] = [(); 3].map(|()| zeros(shape, steps, 1));
    let [mut h, mut d_h] = [zeros(shape, steps + 1, 1), zeros(shape, 1, 1)];
    let (activation, weight_hh) = (Activation::Tanh, &weight_hh);
    group.bench_function(name("forward", shape), |bencher| {
        bencher.iter(|| {
            let (pre, h) = (&mut pre[..], &mut h[..]);
            rnn_forward(simd, RnnForward { shape, activation, weight_hh, pre, h });
        });
    });
    group.bench_function(name("backward", shape), |bencher| {
        bencher.iter(|| {
            let (h, d_out, d_pre, d_h) = (&h[..], &d_out[..], &mut d_pre[..], &mut d_h[..]);
            rnn_backward(simd, RnnBackward { shape, activation, weight_hh, h, d_out, d_pre, d_h });
        });
    });
    group.finish();
}

criterion_group!(benches, products, lstm, gru, rnn);
criterion_main!(benches);
