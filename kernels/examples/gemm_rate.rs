//! Prints GFLOP/s of the GEMM on one core, for the shapes of the presets: `cargo run --release --example gemm_rate`.

use kernels::{PackedLeft, PackedMatrix, Simd, gemm, gemm_transposed};
use std::hint::black_box;
use std::time::{Duration, Instant};

fn main() {
    let levels: Vec<Simd> = match std::env::args().nth(1) {
        Some(name) => vec![name.parse().unwrap_or_else(|error| panic!("{error}"))],
        None => vec![Simd::detect()],
    };
    for simd in levels {
        println!("{simd}");
        for (n, k) in [(128, 128), (128, 512), (512, 128), (512, 512), (600, 150)] {
            for m in [1, 2, 4, 8, 16, 32, 64, 150, 1024] {
                let a = vec![0.5; m * k];
                let mut b = PackedMatrix::new(k, n);
                b.pack_rows(&vec![0.25; k * n], n);
                let mut c = vec![0.0; m * n];
                let seconds = best(|| gemm(simd, m, black_box(&a), k, &b, black_box(&mut c), n, true));
                print!("  m {m} n {n} k {k}: {:.1}", 2e-9 * (m * n * k) as f64 / seconds);
            }
            println!();
        }
        for (m, n, k) in
            [(512, 128, 400), (512, 128, 3200), (512, 65, 400), (600, 150, 500), (2048, 512, 800)]
        {
            let mut a = PackedLeft::new(k, m);
            let mut b = PackedMatrix::new(k, n);
            let mut c = vec![0.0; m * n];
            let (rows_a, rows_b) = (vec![0.5; k * m], vec![0.5; k * n]);
            let pack = best(|| {
                a.pack_row_iter(simd, black_box(&rows_a).chunks(m));
                b.pack_row_iter(simd, black_box(&rows_b).chunks(n));
            });
            let seconds = best(|| gemm_transposed(simd, &a, &b, black_box(&mut c), n, true));
            let rate = 2e-9 * (m * n * k) as f64 / seconds;
            println!(
                "  transposed m {m} n {n} k {k}: {rate:.1}, packing {:.0}% more time",
                100.0 * pack / seconds
            );
        }
    }
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
