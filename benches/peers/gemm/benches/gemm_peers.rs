//! Our GEMM beside the `gemm` crate's on one thread: `cargo bench` in `benches/peers/gemm`.
//!
//! The peer takes plain matrices and does what it needs inside the call; ours reads weights that were packed once per
//! training step. That is what a recurrent step pays for either, so our packing is left out. The peer keeps no row
//! rule and cannot take our place; it shows what a free choice of order could gain. "Elements" are floating-point
//! operations.
#![allow(missing_docs, reason = "criterion's macros make functions of which nobody reads the documentation")]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kernels::{PackedMatrix, Simd};

fn products(criterion: &mut Criterion) {
    let simd = Simd::detect();
    let mut group = criterion.benchmark_group("gemm beside its peer");
    group.sample_size(30);
    for m in [8, 32, 64] {
        for n in [128, 512] {
            for k in [128, 512] {
                let (a, b, mut c) = (vec![0.5; m * k], vec![0.25; k * n], vec![0.0; m * n]);
                let mut packed = PackedMatrix::new(k, n);
                packed.pack_rows(Simd::detect(), &b, n);
                group.throughput(Throughput::Elements((2 * m * n * k) as u64));
                group.bench_function(format!("m {m} n {n} k {k}/ours"), |bencher| {
                    bencher.iter(|| {
                        kernels::gemm(simd, m, black_box(&a), k, &packed, black_box(&mut c), n, kernels::Start::Kept)
                    });
                });
                group.bench_function(format!("m {m} n {n} k {k}/gemm 0.19"), |bencher| {
                    bencher.iter(|| peer(m, n, k, black_box(&a), black_box(&b), black_box(&mut c)));
                });
            }
        }
    }
    group.finish();
}

/// `c += a · b`, all row-major and dense.
fn peer(m: usize, n: usize, k: usize, a: &[f32], b: &[f32], c: &mut [f32]) {
    assert_eq!((a.len(), b.len(), c.len()), (m * k, k * n, m * n));
    let (row_a, row_b) = (k as isize, n as isize);
    // SAFETY: the assertion above shows that [m, k], [k, n] and [m, n] with these strides lie in their slices; c is
    // borrowed exclusively, so it overlaps neither.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            row_b,
            true,
            a.as_ptr(),
            1,
            row_a,
            b.as_ptr(),
            1,
            row_b,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

criterion_group!(benches, products);
criterion_main!(benches);
