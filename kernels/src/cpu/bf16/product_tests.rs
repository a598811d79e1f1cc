//! Products against the definition, at every level.

use super::super::gemm::{Start, gemm, gemm_transposed};
use super::super::pack::{PackedLeft, PackedMatrix};
use super::super::sequence::tests::{bits, numbers};
use super::super::simd::Simd;
use super::{DEPTH, flushed, flushed_multiply_add, rounded};
use proptest::prelude::*;
use protocol::job::Precision;

fn value(x: f32) -> f32 {
    f32::from_bits(u32::from(rounded(x)) << 16)
}

/// One element: `start` and the products of a row of A with a column of B.
fn chain(start: f32, row: impl Iterator<Item = f32>, column: impl Iterator<Item = f32>) -> f32 {
    let mut pairs: Vec<(f32, f32)> = row.zip(column).map(|(a, b)| (value(a), value(b))).collect();
    pairs.resize(pairs.len().next_multiple_of(DEPTH), (0.0, 0.0));
    pairs.chunks(DEPTH).fold(start, |sum, tile| {
        let [even, odd] = [0, 1].map(|first| {
            tile.iter().skip(first).step_by(2).fold(0.0, |acc, &(a, b)| flushed_multiply_add(a, b, acc))
        });
        flushed(flushed(sum) + flushed(even + odd))
    })
}

/// The whole product of `a` `[m, k]` and `b` `[k, n]`, from `start(row, column)`.
fn chains(
    m: usize,
    n: usize,
    k: usize,
    a: &[f32],
    b: &[f32],
    start: impl Fn(usize, usize) -> f32,
) -> Vec<f32> {
    let element = |at: usize| {
        let (row, j) = (at / n, at % n);
        chain(start(row, j), a[row * k..][..k].iter().copied(), (0..k).map(|p| b[p * n + j]))
    };
    (0..m * n).map(element).collect()
}

fn packed(k: usize, n: usize, b: &[f32]) -> PackedMatrix {
    let mut packed = PackedMatrix::with_precision(Precision::Bf16, k, n);
    packed.pack_rows(Simd::detect(), b, n);
    packed
}

fn transposed(rows: usize, columns: usize, x: &[f32]) -> Vec<f32> {
    (0..rows * columns).map(|at| x[at % rows * columns + at / rows]).collect()
}

/// Holds all products of `a` and `b` against the definition.
fn check(m: usize, n: usize, k: usize, a: &[f32], b: &[f32]) {
    let c = numbers(m * n, 1.0, 3);
    let (from_zero, from_c) = (chains(m, n, k, a, b, |_, _| 0.0), chains(m, n, k, a, b, |i, j| c[i * n + j]));
    let tokens: Vec<u32> = (0..m as u32).map(|row| row * 7 % m as u32).collect();
    let from_table = chains(m, n, k, a, b, |i, j| c[tokens[i] as usize * n + j]);
    let from_row = chains(m, n, k, a, b, |_, j| c[j]);
    for simd in Simd::available() {
        let by_rows = packed(k, n, b);
        let mut by_columns = PackedMatrix::with_precision(Precision::Bf16, k, n);
        by_columns.pack_columns(simd, &transposed(k, n, b), k);
        let mut left = PackedLeft::with_precision(Precision::Bf16, k, m);
        left.pack_row_iter(simd, transposed(m, k, a).chunks(m));
        let run = |right: &PackedMatrix, start: Start<'_>| {
            // Rows further apart than they are long: what lies between them is left alone.
            let mut got = vec![7.0; m * (n + 3)];
            got.chunks_mut(n + 3).zip(c.chunks(n)).for_each(|(got, c)| got[..n].copy_from_slice(c));
            gemm(simd, m, a, k, right, &mut got, n + 3, start);
            assert!(got.chunks(n + 3).all(|row| row[n..] == [7.0; 3]), "{simd} wrote beyond a row");
            got.chunks(n + 3).flat_map(|row| row[..n].to_vec()).collect::<Vec<f32>>()
        };
        let at = format!("{simd} m {m} n {n} k {k}");
        assert_eq!(bits(&run(&by_rows, Start::Zero)), bits(&from_zero), "{at}");
        assert_eq!(bits(&run(&by_columns, Start::Kept)), bits(&from_c), "{at} kept");
        assert_eq!(bits(&run(&by_columns, Start::Row(&c))), bits(&from_row), "{at} row");
        let table = Start::Table { table: &c, tokens: &tokens };
        assert_eq!(bits(&run(&by_rows, table)), bits(&from_table), "{at} table");
        for (accumulate, want) in [(false, &from_zero), (true, &from_c)] {
            let mut got = c.clone();
            gemm_transposed(simd, &left, &by_rows, &mut got, n, accumulate);
            assert_eq!(bits(&got), bits(want), "{at} transposed");
        }
    }
}

#[test]
fn every_level_equals_the_definition_bit_for_bit_on_odd_shapes() {
    for m in [1, 7, 16, 33, 150] {
        for n in [1, 16, 33, 65] {
            for k in [1, 7, 31, 32, 33, 150] {
                check(m, n, k, &numbers(m * k, 1.0, 1), &numbers(k * n, 1.0, 2));
            }
        }
    }
    check(40, 70, 600, &numbers(40 * 600, 1.0, 1), &numbers(600 * 70, 1.0, 2));
}

/// Products about the smallest normal number, where hardware rounds, flushes and cancels.
#[test]
fn numbers_below_the_normal_ones_are_flushed_alike() {
    let power = |exponent: i32| 2f32.powi(exponent);
    for salt in 0..20 {
        let (m, n, k) = (20, 20, 40);
        let scaled = |len, numbers_salt| {
            let spread = numbers(len, 6.0, numbers_salt + 100);
            let scaled = |(x, spread): (&f32, &f32)| x * power(-63 + salt as i32 / 2 + *spread as i32);
            numbers(len, 1.0, numbers_salt).iter().zip(&spread).map(scaled).collect::<Vec<f32>>()
        };
        check(m, n, k, &scaled(m * k, salt), &scaled(k * n, salt + 50));
    }
    // The smallest normal number less a little: where rounding to 24 bits and IEEE 754's gradual numbers differ.
    let (mut a, mut b) = (vec![0.0; 33 * 32], vec![0.0; 32 * 4]);
    for (row, a) in a.chunks_mut(32).enumerate() {
        (a[0], a[2], a[1]) = (power(-63), -power(-75) * (1.0 + row as f32 / 16.0), power(-60));
    }
    for (j, scale) in [-74, -75, -76, -77].into_iter().enumerate() {
        (b[j], b[8 + j], b[4 + j]) = (power(-63), power(scale), -power(-66));
    }
    check(33, 4, 32, &a, &b);
    assert_eq!(
        chain(
            0.0,
            [power(-63), 0.0, -1.5 * power(-75)].into_iter(),
            [power(-63), 0.0, power(-76)].into_iter()
        ),
        0.0
    );
}

/// Two products whose difference is the last bit that a product can have.
#[test]
fn the_smallest_difference_is_kept_as_long_as_it_is_normal() {
    let power = |exponent: i32| 2f32.powi(exponent);
    for (sum_of_exponents, want) in [(-111, power(-125)), (-112, f32::MIN_POSITIVE), (-113, 0.0)] {
        for exponent in [-60, -56, -50] {
            let (one, other) = (power(exponent), power(sum_of_exponents - exponent));
            let a = [1.0078125 * one, 0.0, -1.015625 * one];
            let b = [1.0078125 * other, 0.0, other];
            assert_eq!(chain(0.0, a.into_iter(), b.into_iter()), want);
            check(1, 1, 3, &a, &b);
            check(17, 1, 3, &a.repeat(17), &b);
        }
    }
}

#[test]
fn what_is_not_finite_comes_through() {
    let (m, n, k) = (17, 17, 40);
    for bad in [f32::NAN, f32::INFINITY] {
        let (mut a, b) = (numbers(m * k, 1.0, 1), packed(k, n, &numbers(k * n, 1.0, 2)));
        a[3 * k + 5] = bad;
        for simd in Simd::available() {
            let mut c = vec![0.0; m * n];
            gemm(simd, m, &a, k, &b, &mut c, n, Start::Zero);
            for (row, values) in c.chunks(n).enumerate() {
                let is_bad = |x: &f32| if bad.is_nan() { x.is_nan() } else { x.is_infinite() };
                assert!(
                    values.iter().all(|x| if row == 3 { is_bad(x) } else { x.is_finite() }),
                    "{simd} {row}"
                );
            }
        }
    }
}

#[test]
fn a_product_is_as_near_as_rounded_operands_allow() {
    let (m, n, k) = (30, 40, 500);
    let (a, b) = (numbers(m * k, 1.0, 1), numbers(k * n, 1.0, 2));
    let mut c = vec![f32::NAN; m * n];
    gemm(Simd::detect(), m, &a, k, &packed(k, n, &b), &mut c, n, Start::Zero);
    for (at, got) in c.iter().enumerate() {
        let terms = (0..k).map(|p| f64::from(a[at / n * k + p]) * f64::from(b[p * n + at % n]));
        let (sum, sizes) = terms.fold((0.0, 0.0), |(sum, sizes): (f64, f64), x| (sum + x, sizes + x.abs()));
        // Each operand is off by at most 2^-9 of itself.
        assert!((f64::from(*got) - sum).abs() <= sizes * 2.1 / 512.0, "{got} {sum}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn any_grouping_of_rows_and_any_cut_of_k_at_a_tile_gives_the_same_bits(
        cuts in prop::collection::vec(1usize..40, 1..5),
        depths in prop::collection::vec(1usize..4, 1..4),
        n in 1usize..70,
    ) {
        let (m, k) = (cuts.iter().sum::<usize>(), DEPTH * depths.iter().sum::<usize>());
        let (a, b) = (numbers(m * k, 1.0, 8), numbers(k * n, 1.0, 9));
        for simd in Simd::available() {
            let right = packed(k, n, &b);
            let mut whole = vec![f32::NAN; m * n];
            gemm(simd, m, &a, k, &right, &mut whole, n, Start::Zero);
            let mut first = 0;
            for rows in &cuts {
                let mut part = vec![f32::NAN; rows * n];
                gemm(simd, *rows, &a[first * k..], k, &right, &mut part, n, Start::Zero);
                prop_assert_eq!(bits(&part), bits(&whole[first * n..(first + rows) * n]));
                first += rows;
            }
            let (mut pieces, mut at) = (vec![0.0; m * n], 0);
            for depth in &depths {
                let right = packed(DEPTH * depth, n, &b[at * n..][..DEPTH * depth * n]);
                gemm(simd, m, &a[at..], k, &right, &mut pieces, n, Start::Kept);
                at += DEPTH * depth;
            }
            prop_assert_eq!(bits(&pieces), bits(&whole));
        }
    }
}
