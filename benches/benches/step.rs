//! One whole training step of each preset, with every core: `cargo bench -p lockstep-benches --bench step`.
#![allow(missing_docs, reason = "criterion's macros make functions of which nobody reads the documentation")]

use std::thread::available_parallelism;

use benches::trainer::Trainer;
use benches::workload::Workload;
use criterion::{Criterion, criterion_group, criterion_main};
use kernels::Simd;
use protocol::job::presets;

fn steps(criterion: &mut Criterion) {
    let threads = available_parallelism().map_or(1, |n| n.get());
    let mut group = criterion.benchmark_group(format!("step, {threads} threads"));
    group.sample_size(10);
    for (preset, _) in presets() {
        let workload = Workload::new(&preset, &[]).expect("a preset is a valid job");
        // Made at the first sample and kept: a filter skips it, and no later sample sees memory for the first time.
        let mut trainer = None;
        group.bench_function(&preset, |bencher| {
            let trainer = trainer.get_or_insert_with(|| {
                Trainer::new(&workload, Simd::detect(), threads).expect("threads start")
            });
            bencher.iter(|| trainer.step().expect("a finite step"));
        });
    }
    group.finish();
}

criterion_group!(benches, steps);
criterion_main!(benches);
