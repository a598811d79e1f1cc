//! The kernels without recurrence against those of the CPU, on devices that are there everywhere: lavapipe, and for what it is
//! given as CUDA C++ the host's processor.

use cubecl::prelude::*;
use cubecl::wgpu::{WgpuDevice, WgpuRuntime};
use half::bf16;
use protocol::job::{EpsilonPlacement, Precision};
use protocol::random::{Purpose, keep_threshold, key};

use super::buffer::Buffer;
use super::elements;
use super::gemm::{Matrix, Right, Shape, Start, product};
use super::guard::abort_on_device_panic;
use super::output::{self, OutputPart, RunTables};
use super::rows::Extent;
use super::shards::{self, Partials, ShardTable, TokenOrder};
use super::softmax::{NO_TARGET, RESULT, cross_entropy};
use crate::Simd;
use crate::cpu::dropout::{MaskStream, dropout_forward};
use crate::cpu::optimizer::{AdamOptions, AdamStep, adam_update, squared_norm};
use crate::cpu::reduce;
use crate::cpu::softmax::softmax_cross_entropy;

/// Each of these, on each device.
macro_rules! on_each_device {
    ($($test:ident),* $(,)?) => {
        mod lavapipe {
            use super::*;

            $(#[test]
            fn $test() {
                abort_on_device_panic();
                super::$test(&WgpuRuntime::client(&WgpuDevice::Cpu));
            })*
        }

        #[cfg(feature = "cuda")]
        mod emulated {
            use super::super::emulated::skips;
            use super::super::source::{Launches, SourceDevice, SourceRuntime};
            use super::*;

            $(#[test]
            fn $test() {
                if !skips() {
                    abort_on_device_panic();
                    let device = SourceDevice { launches: Launches::Emulated { order: 1 }, ..Default::default() };
                    super::$test(&SourceRuntime::client(&device));
                }
            })*
        }
    };
}

on_each_device! {
    products_of_odd_shapes_with_either_right_operand,
    a_row_of_a_product_does_not_depend_on_the_others,
    weight_gradients_of_shards,
    sums_over_the_pairs_of_shards_and_along_the_tree,
    the_digest_is_the_cpus,
    adam_and_the_norm_are_the_cpus,
    losses_and_their_gradients_are_the_cpus,
    masks_are_the_cpus_bit_for_bit_in_both_directions_and_both_ways,
}

fn numbers(len: usize, seed: u32) -> Vec<f32> {
    let mut word = seed.wrapping_mul(0x9E37_79B9) | 1;
    let mut next = || {
        word ^= word << 13;
        word ^= word >> 17;
        word ^= word << 5;
        (word >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// A buffer in which every number is one that nobody computed.
fn unwritten<R: Runtime>(client: &ComputeClient<R>, len: usize) -> Buffer {
    Buffer::from_floats(client, &vec![f32::NAN; len])
}

fn read<R: Runtime>(client: &ComputeClient<R>, buffer: &Buffer) -> Vec<f32> {
    buffer.read_floats(client, 0..buffer.len()).unwrap()
}

/// The largest difference as a share of the largest number.
fn distance(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let largest = want.iter().fold(0.0f64, |most, x| most.max(x.abs()));
    let differences = got.iter().zip(want).map(|(got, want)| (f64::from(*got) - want).abs());
    differences.fold(0.0, |most: f64, x| if x.is_nan() { f64::INFINITY } else { most.max(x) })
        / largest.max(1e-30)
}

/// What products may have for operands.
const PRECISIONS: [Precision; 3] = [Precision::F32, Precision::Bf16, Precision::Tf32];

/// An operand as a product sees it.
fn rounded(precision: Precision, x: f32) -> f64 {
    match precision {
        Precision::F32 => x.into(),
        Precision::Bf16 => bf16::from_f32(x).into(),
        // Twelve bits less of mantissa, and half of the last one added before they go.
        Precision::Tf32 => f32::from_bits((x.to_bits() + (1 << 12)) & !((1 << 13) - 1)).into(),
    }
}

/// Numbers some of which are in the middle between two that operands are rounded to.
fn operands(len: usize, seed: u32) -> Vec<f32> {
    let mut numbers = numbers(len, seed);
    for (at, x) in numbers.iter_mut().enumerate() {
        match at % 16 {
            3 => *x = f32::from_bits(x.to_bits() & 0xffff_0000 | 0x8000),
            7 => *x = f32::from_bits(x.to_bits() & 0xffff_e000 | 0x1000),
            _ => {}
        }
    }
    numbers
}

fn products_of_odd_shapes_with_either_right_operand<R: Runtime>(client: &ComputeClient<R>) {
    let shapes =
        [(1, 1, 1), (5, 7, 3), (33, 65, 17), (64, 64, 64), (70, 130, 100), (1, 129, 33), (150, 70, 40)];
    for (precision, (m, n, k)) in PRECISIONS.into_iter().flat_map(|it| shapes.map(|shape| (it, shape))) {
        let (a_at, a_stride, b_at) = (3, k + 2, 5);
        let a = operands(a_at + m * a_stride, 1);
        let b = operands(b_at + k * n, 2);
        let row = numbers(n + 4, 3);
        let [a_buffer, b_buffer, row_buffer] = [&a, &b, &row].map(|x| Buffer::from_floats(client, x));
        for (transposed, adds) in [(false, false), (false, true), (true, false), (true, true)] {
            let stride = if transposed { k } else { n };
            let matrix = Matrix { buffer: &b_buffer, at: b_at, stride };
            let right = if transposed { Right::Transposed(matrix) } else { Right::Plain(matrix) };
            let c = unwritten(client, m * n);
            let a_matrix = Matrix { buffer: &a_buffer, at: a_at, stride: a_stride };
            let start = if adds { Start::Row(&row_buffer, 4) } else { Start::Zero };
            product(client, precision, Shape { m, n, k }, a_matrix, right, start, &c, n);
            let of_a = |i: usize, p: usize| rounded(precision, a[a_at + i * a_stride + p]);
            let place_in_b = |p: usize, j: usize| if transposed { j * k + p } else { p * n + j };
            let of_b = |p: usize, j: usize| rounded(precision, b[b_at + place_in_b(p, j)]);
            let want: Vec<f64> = (0..m * n)
                .map(|at| {
                    let (i, j) = (at / n, at % n);
                    let sum: f64 = (0..k).map(|p| of_a(i, p) * of_b(p, j)).sum();
                    sum + if adds { f64::from(row[4 + j]) } else { 0.0 }
                })
                .collect();
            let difference = distance(&read(client, &c), &want);
            let what = || format!("{m}x{n}x{k} of {precision}, transposed {transposed}, adds {adds}");
            assert!(difference < 1e-6, "{}: {difference:e}", what());
        }
    }
}

fn a_row_of_a_product_does_not_depend_on_the_others<R: Runtime>(client: &ComputeClient<R>) {
    let (m, n, k) = (150, 33, 50);
    let (a, b) = (numbers(m * k, 4), numbers(k * n, 5));
    let b = Buffer::from_floats(client, &b);
    for precision in PRECISIONS {
        let product_of = |a: &[f32], m: usize| {
            let (a, c) = (Buffer::from_floats(client, a), unwritten(client, m * n));
            let (a, right) = (Matrix::dense(&a, k), Right::Plain(Matrix::dense(&b, n)));
            product(client, precision, Shape { m, n, k }, a, right, Start::Zero, &c, n);
            read(client, &c)
        };
        let together = product_of(&a, m);
        for row in [0, 31, 69, 149] {
            assert_eq!(product_of(&a[row * k..][..k], 1), together[row * n..][..n], "{precision}");
        }
    }
}

fn weight_gradients_of_shards<R: Runtime>(client: &ComputeClient<R>) {
    let (steps, runs) = (14, 7);
    // Shards of 3, 0, 3 and 1 runs; the last one's are shorter than others.
    let table = [(0, 3, 14), (3, 0, 0), (3, 3, 14), (6, 1, 2)];
    let words: Vec<u32> = table.iter().flat_map(|&(first, own, steps)| [first, own, steps]).collect();
    let table_buffer = ShardTable::new(Buffer::from_words(client, &words), runs);
    let pairs = |shard: usize| {
        let (first, own, steps): (u32, u32, u32) = table[shard];
        (0..steps as usize).flat_map(move |t| (0..own as usize).map(move |j| t * runs + first as usize + j))
    };
    for (precision, (m, n)) in
        PRECISIONS.into_iter().flat_map(|it| [(6, 9), (130, 70)].map(|size| (it, size)))
    {
        let (d, x) = (operands(steps * runs * (m + 1), 6), operands(steps * runs * n + 2, 7));
        let [d_buffer, x_buffer] = [&d, &x].map(|x| Buffer::from_floats(client, x));
        let stride = m * n + 10;
        let buffer = unwritten(client, 4 * stride);
        let d_matrix = Matrix { buffer: &d_buffer, at: 0, stride: m + 1 };
        let x_matrix = Matrix { buffer: &x_buffer, at: 2, stride: n };
        let into = Partials { buffer: &buffer, stride, at: 4 };
        shards::products(client, precision, &table_buffer, (m, n), d_matrix, x_matrix, into);
        let got = read(client, &buffer);
        for shard in 0..4 {
            let of = |at: usize| -> f64 {
                let of_d = |pair: usize| rounded(precision, d[pair * (m + 1) + at / n]);
                let of_x = |pair: usize| rounded(precision, x[2 + pair * n + at % n]);
                pairs(shard).map(|pair| of_d(pair) * of_x(pair)).sum()
            };
            let want: Vec<f64> = (0..m * n).map(of).collect();
            let difference = distance(&got[shard * stride + 4..][..m * n], &want);
            assert!(difference < 1e-6, "{m}x{n} of {precision}, shard {shard}: {difference:e}");
            let beside = [&got[shard * stride..][..4], &got[shard * stride + 4 + m * n..][..6]].concat();
            assert!(beside.iter().all(|x| x.is_nan()), "{m}x{n} of {precision} beside shard {shard}");
        }
    }
}

fn sums_over_the_pairs_of_shards_and_along_the_tree<R: Runtime>(client: &ComputeClient<R>) {
    let (steps, runs, m, n) = (5, 7, 6, 9);
    // Shards of 3, 0, 3 and 1 runs; the last one's are shorter than others.
    let table = [(0, 3, 5), (3, 0, 0), (3, 3, 5), (6, 1, 2)];
    let words: Vec<u32> = table.iter().flat_map(|&(first, own, steps)| [first, own, steps]).collect();
    let table_buffer = ShardTable::new(Buffer::from_words(client, &words), runs);
    let (d, x) = (numbers(steps * runs * m, 6), numbers(steps * runs * n, 7));
    let tokens: Vec<u32> = (0..steps * runs).map(|at| (at * 5 % 4) as u32).collect();
    let [d_buffer, x_buffer] = [&d, &x].map(|x| Buffer::from_floats(client, x));
    let tokens_buffer = Buffer::from_words(client, &tokens);
    let stride = 100;
    let buffer = unwritten(client, 4 * stride);
    let pairs = |shard: usize| {
        let (first, own, steps): (u32, u32, u32) = table[shard];
        (0..steps as usize).flat_map(move |t| (0..own as usize).map(move |j| t * runs + first as usize + j))
    };
    let into = Partials { buffer: &buffer, stride, at: 4 };

    let check = |what: &str, len: usize, of: &dyn Fn(usize, usize) -> f64| {
        let got = read(client, &buffer);
        for shard in 0..4 {
            let want: Vec<f64> = (0..len).map(|at| pairs(shard).map(|pair| of(pair, at)).sum()).collect();
            let difference = distance(&got[shard * stride + 4..][..len], &want);
            assert!(difference < 1e-6, "{what} of shard {shard}: {difference:e}");
        }
    };
    let of_d = |pair: usize, i: usize| f64::from(d[pair * m + i]);
    shards::column_sums(client, &table_buffer, m, Matrix::dense(&d_buffer, m), None, into);
    check("column sums", m, &of_d);
    let x_part = Matrix { buffer: &x_buffer, at: 2, stride: n };
    shards::column_sums(client, &table_buffer, m, Matrix::dense(&d_buffer, m), Some(x_part), into);
    check("products of columns", m, &|pair, at| of_d(pair, at) * f64::from(x[2 + pair * n + at]));
    let read_by = |pair: usize, token: usize| f64::from(u8::from(tokens[pair] as usize == token));
    for order in [TokenOrder::Rows, TokenOrder::Columns] {
        shards::token_sums(client, &table_buffer, &tokens_buffer, (4, m), order, &d_buffer, m, into);
        check("tokens", 4 * m, &|pair, at| match order {
            TokenOrder::Rows => of_d(pair, at % m) * read_by(pair, at / m),
            TokenOrder::Columns => of_d(pair, at / 4) * read_by(pair, at % 4),
        });
    }

    let parts = numbers(4 * stride, 8);
    let partials = Buffer::from_floats(client, &parts);
    let additions = Buffer::from_words(client, &[0, 1, 2, 3, 0, 2]);
    let out = unwritten(client, 60);
    let from = Partials { buffer: &partials, stride, at: 0 };
    shards::tree_sum(client, &additions, 0, from, 50, &out, 7);
    let part = |shard: usize, at: usize| parts[shard * stride + at];
    let want: Vec<f32> =
        (0..50).map(|at| (part(0, at) + part(1, at)) + (part(2, at) + part(3, at))).collect();
    assert_eq!(read(client, &out)[7..57], want);
}

fn the_digest_is_the_cpus<R: Runtime>(client: &ComputeClient<R>) {
    for len in [1, 100, 4096, 4097, 20_000] {
        let values = numbers(len, 9);
        let buffer = Buffer::from_floats(client, &values);
        for start in [0, 17, u64::from(u32::MAX) - 5] {
            let want = reduce::digest(Simd::detect(), &values, start);
            assert_eq!(elements::digest(client, &buffer, start).unwrap(), want, "{len} from {start}");
        }
    }
}

fn adam_and_the_norm_are_the_cpus<R: Runtime>(client: &ComputeClient<R>) {
    let options = AdamOptions {
        lr: 1e-3,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        placement: EpsilonPlacement::BeforeCorrection,
    };
    let step = AdamStep::new(options, 3, 0.125);
    let len = 5000;
    let gradient = numbers(len, 10);
    let [mut w, mut m] = [11, 12].map(|seed| numbers(len, seed));
    let mut v: Vec<f32> = numbers(len, 13).into_iter().map(f32::abs).collect();
    let on_device = [&gradient, &w, &m, &v].map(|x| Buffer::from_floats(client, x));
    let [g_buffer, w_buffer, m_buffer, v_buffer] = &on_device;
    elements::adam(client, &step, g_buffer, w_buffer, m_buffer, v_buffer);
    adam_update(Simd::detect(), &step, &mut w, &gradient, &mut m, &mut v);
    for (name, got, want) in [("w", w_buffer, &w), ("m", m_buffer, &m), ("v", v_buffer, &v)] {
        let want: Vec<f64> = want.iter().map(|&x| f64::from(x)).collect();
        let difference = distance(&read(client, got), &want);
        assert!(difference < 1e-6, "{name}: {difference:e}");
    }
    let (got, want) =
        (elements::squared_norm(client, g_buffer).unwrap(), squared_norm(Simd::detect(), &gradient));
    assert!((got - want).abs() < 1e-6 * want, "{got} {want}");
    let mut with_nan = gradient;
    with_nan[4999] = f32::NAN;
    let with_nan = Buffer::from_floats(client, &with_nan);
    assert!(elements::squared_norm(client, &with_nan).unwrap().is_nan());
}

fn losses_and_their_gradients_are_the_cpus<R: Runtime>(client: &ComputeClient<R>) {
    for classes in [1, 5, 32, 65, 100] {
        let targets: Vec<u32> = (0..9).map(|at| at * 7 % classes as u32).collect();
        let mut logits = numbers(9 * classes, 14);
        // Two largest logits: the first is the one that counts.
        let most = 3.0;
        logits[0] = most;
        logits[classes - 1] = most;
        let mut with_none = targets.clone();
        with_none[4] = NO_TARGET;
        let [logits_buffer, results] = [Buffer::from_floats(client, &logits), unwritten(client, 9 * RESULT)];
        cross_entropy(
            client,
            classes,
            &Buffer::from_words(client, &with_none),
            &logits_buffer,
            &results,
            true,
        );
        let (mut loss, mut correct) = ([0.0; 9], [false; 9]);
        softmax_cross_entropy(Simd::detect(), classes, &targets, &mut logits, &mut loss, &mut correct);
        let (got, results) = (read(client, &logits_buffer), read(client, &results));
        for row in 0..9 {
            let part = |x: &[f32]| x[row * classes..][..classes].to_vec();
            if row == 4 {
                assert_eq!(part(&got), vec![0.0; classes]);
                continue;
            }
            let want: Vec<f64> = part(&logits).into_iter().map(f64::from).collect();
            let largest = distance(&part(&got), &want);
            assert!(largest < 2e-6 || classes == 1, "{classes} classes, row {row}: {largest:e}");
            let own = libm::log(f64::from(results[RESULT * row])) + f64::from(results[RESULT * row + 1]);
            assert!((own - loss[row]).abs() < 1e-6 * loss[row].max(1.0), "loss {own}, {}", loss[row]);
            assert_eq!(results[RESULT * row + 2] == 1.0, correct[row], "{classes} classes, row {row}");
        }
    }
}

fn masks_are_the_cpus_bit_for_bit_in_both_directions_and_both_ways<R: Runtime>(client: &ComputeClient<R>) {
    let (extent, size, keep) = (Extent { steps: 4, runs: 3 }, 10, 0.6);
    let (seed, step) = (0x0123_4567_89ab_cdef, 7);
    let lengths = [4, 2, 3];
    // The second run is a later part of the first's row.
    let (slots, first_steps) = ([20, 20, 21], [0, 4, 0]);
    let (layers, layer) = (3, 1);
    let tables = [lengths, slots, first_steps].map(|words| Buffer::from_words(client, &words));
    let runs = RunTables { lengths: &tables[0], slots: &tables[1], first_steps: &tables[2] };
    let dropout = output::Dropout {
        key: key(seed, Purpose::Dropout),
        step,
        threshold: keep_threshold(keep),
        scale: 1.0 / keep,
        step_stride: 2 * layers,
        position: 2 * layer,
    };
    let h = [15, 16].map(|seed| numbers(5 * 3 * size, seed));
    let out = unwritten(client, extent.places() * 2 * size);
    for direction in 0..2 {
        let part = OutputPart { direction, size, width: 2 * size };
        let h = Buffer::from_floats(client, &h[direction]);
        output::output(client, extent, part, runs, Some(&dropout), &h, &out);
    }
    let got = read(client, &out);
    let ones = Buffer::from_floats(client, &vec![1.0; extent.places() * 2 * size]);
    for direction in 0..2 {
        let part = OutputPart { direction, size, width: 2 * size };
        let d_h = unwritten(client, extent.places() * size);
        output::output_gradient(client, extent, part, runs, Some(&dropout), &ones, &d_h);
        let d_h = read(client, &d_h);
        for run in 0..3 {
            let length = lengths[run] as usize;
            for t in 0..length {
                let own = if direction == 1 { length - 1 - t } else { t };
                let position = ((t as u32 + first_steps[run]) * layers + layer) * 2 + direction as u32;
                let stream = MaskStream { seed, step: u64::from(step), row: slots[run], position };
                let mut want = vec![0.0; size];
                let x = &h[direction][((own + 1) * 3 + run) * size..][..size];
                dropout_forward(Simd::detect(), keep, stream, x, &mut want);
                assert_eq!(got[((t * 3 + run) * 2 + direction) * size..][..size], want);
                dropout_forward(Simd::detect(), keep, stream, &[1.0; 10], &mut want);
                assert_eq!(d_h[(own * 3 + run) * size..][..size], want);
            }
        }
    }
}
