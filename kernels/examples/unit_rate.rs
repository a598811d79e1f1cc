//! Prints nanoseconds per unit of the pointwise kernels on one core: `cargo run --release --example unit_rate [level]`.
//!
//! The cost of a cell's gate mathematics is the time of the fused kernel less the time of its matrix products.

use kernels::cpu::dropout::{MaskStream, dropout_forward};
use kernels::cpu::gru::{GruBackward, GruForward, GruWeights, gru_backward, gru_forward};
use kernels::cpu::lstm::{LstmBackward, LstmForward, LstmOptions, lstm_backward, lstm_forward};
use kernels::cpu::optimizer::{AdamOptions, AdamStep, adam_update, squared_norm};
use kernels::cpu::reduce::{digest, tree_add};
use kernels::cpu::rnn::{RnnBackward, RnnForward, rnn_backward, rnn_forward};
use kernels::cpu::sequence::SequenceShape;
use kernels::cpu::softmax::softmax_cross_entropy;
use kernels::{PackedMatrix, Simd, gemm};
use protocol::cell::{Activation, RecurrentActivation};
use protocol::job::EpsilonPlacement;
use std::hint::black_box;
use std::time::{Duration, Instant};

fn main() {
    let simd = match std::env::args().nth(1) {
        Some(name) => name.parse().unwrap_or_else(|error| panic!("{error}")),
        None => Simd::detect(),
    };
    println!("{simd}");
    for hidden_size in [128, 150, 512] {
        cells(simd, SequenceShape { active: &[32; 8], hidden_size, output_size: hidden_size });
    }
    buffers(simd);
}

fn buffers(simd: Simd) {
    let report = |name: &str, elements: usize, call: &mut dyn FnMut()| {
        println!("  {name}: {:.2} ns per element", 1e9 * best(call) / elements as f64);
    };
    for classes in [10, 65] {
        let (rows, mut loss, mut correct) = (256, vec![0.0; 256], vec![false; 256]);
        let targets = vec![3; rows];
        let mut logits = vec![0.5; rows * classes];
        report(&format!("softmax cross-entropy, V {classes}"), rows * classes, &mut || {
            softmax_cross_entropy(simd, classes, &targets, &mut logits, &mut loss, &mut correct);
        });
    }
    for hidden in [128, 150, 512] {
        let stream = MaskStream { seed: 1, step: 2, row: 3, position: 4 };
        let (x, mut y) = (vec![1.0; hidden], vec![0.0; hidden]);
        report(&format!("dropout, H {hidden}"), hidden, &mut || {
            dropout_forward(simd, 0.8, stream, black_box(&x), black_box(&mut y));
        });
    }
    let len = 240_000;
    let (g, mut w, mut m, mut v) = (vec![0.1; len], vec![0.1; len], vec![0.1; len], vec![0.1; len]);
    let placement = EpsilonPlacement::AfterCorrection;
    let options = AdamOptions { lr: 1e-3, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, placement };
    let step = AdamStep::new(options, 10, 1.0);
    report("adam", len, &mut || adam_update(simd, &step, &mut w, &g, &mut m, &mut v));
    report("squared norm", len, &mut || {
        black_box(squared_norm(simd, black_box(&g)));
    });
    report("tree add", len, &mut || tree_add(simd, black_box(&mut w), &g));
    report("digest", len, &mut || {
        black_box(digest(simd, black_box(&w), 0));
    });
}

fn cells(simd: Simd, shape: SequenceShape<'_>) {
    let (rows, seq_len, hidden) = (shape.rows(), shape.active.len(), shape.hidden_size);
    let units = (shape.steps() * hidden) as f64;
    let zeros = |steps: usize, width: usize| vec![0.1f32; steps * rows * width * hidden];
    let (mut h, mut c) = (zeros(seq_len + 1, 1), zeros(seq_len + 1, 1));
    let d_out = zeros(seq_len, 1);
    let (mut d_h, mut d_c) = (zeros(1, 1), zeros(1, 1));
    let report = |name: &str, seconds: f64, k: usize, n: usize| {
        let a = vec![0.0; rows * k];
        let b = PackedMatrix::new(k, n);
        let mut product = vec![0.0; rows * n];
        let gemms = seq_len as f64
            * best(|| gemm(simd, rows, black_box(&a), k, &b, black_box(&mut product), n, true));
        println!(
            "  H {hidden} {name}: {:.2} ns per unit, of that pointwise {:.2}",
            1e9 * seconds / units,
            1e9 * (seconds - gemms) / units
        );
    };

    let mut packed = PackedMatrix::new(hidden, hidden);
    let (mut pre, mut d_pre) = (zeros(seq_len, 1), zeros(seq_len, 1));
    let activation = Activation::Tanh;
    let seconds = best(|| {
        let args = RnnForward { shape, activation, weight_hh: &packed, pre: &mut pre, h: &mut h };
        rnn_forward(simd, args);
    });
    report("rnn forward", seconds, hidden, hidden);
    let seconds = best(|| {
        let (h, d_out, d_pre, d_h) = (&h, &d_out, &mut d_pre, &mut d_h);
        rnn_backward(simd, RnnBackward { shape, activation, weight_hh: &packed, h, d_out, d_pre, d_h });
    });
    report("rnn backward", seconds, hidden, hidden);

    packed.reset(hidden, 4 * hidden);
    let (mut gates, mut d_gates) = (zeros(seq_len, 4), zeros(seq_len, 4));
    let options =
        LstmOptions { recurrent_activation: RecurrentActivation::Sigmoid, cell_clip: None, peepholes: None };
    let seconds = best(|| {
        let (gates, h, c) = (&mut gates, &mut h, &mut c);
        let args = LstmForward { shape, options, weight_hh: &packed, projection: None, gates, h, c };
        lstm_forward(simd, args);
    });
    report("lstm forward", seconds, hidden, 4 * hidden);
    packed.reset(4 * hidden, hidden);
    let seconds = best(|| {
        d_c.fill(0.0);
        let args = LstmBackward {
            shape,
            options,
            weight_hh: &packed,
            projection: None,
            gates: &gates,
            c: &c,
            d_out: &d_out,
            d_gates: &mut d_gates,
            d_h: &mut d_h,
            d_c: &mut d_c,
        };
        lstm_backward(simd, args);
    });
    report("lstm backward", seconds, 4 * hidden, hidden);

    packed.reset(hidden, 3 * hidden);
    let (x_part, mut h_part) = (zeros(seq_len, 3), zeros(1, 3));
    let (mut d_x_part, mut d_h_part) = (zeros(seq_len, 3), zeros(seq_len, 3));
    let bias = vec![0.0; 3 * hidden];
    let recurrent_activation = RecurrentActivation::Sigmoid;
    let seconds = best(|| {
        let args = GruForward {
            shape,
            recurrent_activation,
            weight_hh: GruWeights::After(&packed),
            bias_hh: &bias,
            x_part: &x_part,
            h_part: &mut h_part,
            gates: &mut gates,
            h: &mut h,
        };
        gru_forward(simd, args);
    });
    report("gru forward", seconds, hidden, 3 * hidden);
    packed.reset(3 * hidden, hidden);
    let seconds = best(|| {
        let args = GruBackward {
            shape,
            recurrent_activation,
            weight_hh: GruWeights::After(&packed),
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
    report("gru backward", seconds, 3 * hidden, hidden);
}

/// Seconds per call in the best of several batches.
fn best(mut call: impl FnMut()) -> f64 {
    let mut best = f64::INFINITY;
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(150) {
        let batch = Instant::now();
        let mut calls = 0;
        while batch.elapsed() < Duration::from_millis(5) {
            call();
            calls += 1;
        }
        best = best.min(batch.elapsed().as_secs_f64() / f64::from(calls));
    }
    best
}
