//! Prints nanoseconds per unit of the pointwise kernels on one core: `cargo run --release --example unit_rate [level]`.
//!
//! The cost of a cell's gate mathematics is the time of the fused kernel less the time of its matrix products.

use kernels::cpu::dropout::{MaskStream, dropout_forward};
use kernels::cpu::gru::{GruBackward, GruForward, GruWeights, gru_backward, gru_forward};
use kernels::cpu::lstm::{LstmBackward, LstmForward, LstmOptions, Peepholes, lstm_backward, lstm_forward};
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
    rnn(simd, shape);
    let recurrent_activation = RecurrentActivation::Sigmoid;
    let plain = LstmOptions { recurrent_activation, cell_clip: None, peepholes: None };
    lstm(simd, shape, "lstm", plain);
    let weights = vec![0.1; shape.hidden_size];
    let peepholes = Some(Peepholes { i: &weights, f: &weights, o: &weights });
    lstm(simd, shape, "lstm, clip, peepholes", LstmOptions { cell_clip: Some(3.0), peepholes, ..plain });
    gru(simd, shape, "gru", false);
    gru(simd, shape, "gru, reset before", true);
}

fn rnn(simd: Simd, shape: SequenceShape<'_>) {
    let (hidden, activation) = (shape.hidden_size, Activation::Tanh);
    let [mut pre, mut d_pre, d_out] = [(); 3].map(|()| steps(shape, 1));
    let (mut h, mut d_h) = (states(shape), carry(shape, 1));
    let packed = PackedMatrix::new(hidden, hidden);
    let seconds = best(|| {
        let args = RnnForward { shape, activation, weight_hh: &packed, pre: &mut pre, h: &mut h };
        rnn_forward(simd, args);
    });
    report(simd, shape, "rnn forward", seconds, &[(hidden, hidden)]);
    let seconds = best(|| {
        let (h, d_out, d_pre, d_h) = (&h, &d_out, &mut d_pre, &mut d_h);
        rnn_backward(simd, RnnBackward { shape, activation, weight_hh: &packed, h, d_out, d_pre, d_h });
    });
    report(simd, shape, "rnn backward", seconds, &[(hidden, hidden)]);
}

fn lstm(simd: Simd, shape: SequenceShape<'_>, name: &str, options: LstmOptions<'_>) {
    let hidden = shape.hidden_size;
    let [mut gates, mut d_gates] = [(); 2].map(|()| steps(shape, 4));
    let [mut h, mut c] = [(); 2].map(|()| states(shape));
    let [mut d_h, mut d_c] = [(); 2].map(|()| carry(shape, 1));
    let d_out = steps(shape, 1);
    let mut packed = PackedMatrix::new(hidden, 4 * hidden);
    let seconds = best(|| {
        let (gates, h, c) = (&mut gates, &mut h, &mut c);
        let args = LstmForward { shape, options, weight_hh: &packed, projection: None, gates, h, c };
        lstm_forward(simd, args);
    });
    report(simd, shape, &format!("{name} forward"), seconds, &[(hidden, 4 * hidden)]);
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
    report(simd, shape, &format!("{name} backward"), seconds, &[(4 * hidden, hidden)]);
}

fn gru(simd: Simd, shape: SequenceShape<'_>, name: &str, reset_before: bool) {
    let (hidden, recurrent_activation) = (shape.hidden_size, RecurrentActivation::Sigmoid);
    let [x_part, mut d_x_part, mut d_h_part] = [(); 3].map(|()| steps(shape, 3));
    let (mut gates, d_out, bias) = (steps(shape, 4), steps(shape, 1), vec![0.0; 3 * hidden]);
    let (mut h, mut h_part) = (states(shape), carry(shape, 3));
    let [mut d_h, mut h_scratch] = [(); 2].map(|()| carry(shape, 1));
    // The products of a step: of all gates, or of r and z, then of n.
    let rows: &[usize] = if reset_before { &[2 * hidden, hidden] } else { &[3 * hidden] };
    let packed: Vec<_> = rows.iter().map(|rows| PackedMatrix::new(hidden, *rows)).collect();
    let seconds = best(|| {
        let args = GruForward {
            shape,
            recurrent_activation,
            weight_hh: gru_weights(&packed),
            bias_hh: &bias,
            x_part: &x_part,
            h_part: &mut h_part,
            gates: &mut gates,
            h: &mut h,
        };
        gru_forward(simd, args);
    });
    let products: Vec<_> = rows.iter().map(|rows| (hidden, *rows)).collect();
    report(simd, shape, &format!("{name} forward"), seconds, &products);
    let packed: Vec<_> = rows.iter().map(|rows| PackedMatrix::new(*rows, hidden)).collect();
    let seconds = best(|| {
        let args = GruBackward {
            shape,
            recurrent_activation,
            weight_hh: gru_weights(&packed),
            gates: &gates,
            h: &h,
            d_out: &d_out,
            d_x_part: &mut d_x_part,
            d_h_part: &mut d_h_part,
            d_h: &mut d_h,
            h_scratch: &mut h_scratch,
        };
        gru_backward(simd, args);
    });
    let products: Vec<_> = rows.iter().map(|rows| (*rows, hidden)).collect();
    report(simd, shape, &format!("{name} backward"), seconds, &products);
}

fn gru_weights(packed: &[PackedMatrix]) -> GruWeights<'_> {
    match packed {
        [gates, candidate] => GruWeights::Before { gates, candidate },
        all => GruWeights::After(&all[0]),
    }
}

/// Prints the time of a cell, and what is left of it without its products of (k, n).
fn report(simd: Simd, shape: SequenceShape<'_>, name: &str, seconds: f64, products: &[(usize, usize)]) {
    let (rows, units) = (shape.rows(), (shape.steps() * shape.hidden_size) as f64);
    let mut pointwise = seconds;
    for &(k, n) in products {
        let (a, b, mut c) = (vec![0.0; rows * k], PackedMatrix::new(k, n), vec![0.0; rows * n]);
        let product = best(|| gemm(simd, rows, black_box(&a), k, &b, black_box(&mut c), n, true));
        pointwise -= shape.active.len() as f64 * product;
    }
    println!(
        "  H {} {name}: {:.2} ns per unit, of that pointwise {:.2}",
        shape.hidden_size,
        1e9 * seconds / units,
        1e9 * pointwise / units
    );
}

fn steps(shape: SequenceShape<'_>, width: usize) -> Vec<f32> {
    vec![0.1; shape.steps() * width * shape.hidden_size]
}

fn states(shape: SequenceShape<'_>) -> Vec<f32> {
    vec![0.1; (shape.rows() + shape.steps()) * shape.hidden_size]
}

fn carry(shape: SequenceShape<'_>, width: usize) -> Vec<f32> {
    vec![0.1; shape.rows() * width * shape.hidden_size]
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
