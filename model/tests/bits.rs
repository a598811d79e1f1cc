//! The promise: how many threads, which instructions and how many devices compute a step changes no bit of it.

mod common;

use std::ops::Range;

use common::{
    CELLS, Combination, Fleet, OutcomeBits, Setup, Sizes, TASKS, bits, combinations, combinations_with, on,
};
use kernels::{Simd, SimdLevel};
use model::device::{Device, Pass};
use proptest::prelude::*;
use protocol::cell::Cell;
use protocol::job::Task;

/// All bits of three training steps and of the state they end in.
fn train<D: Device>(mut fleet: Fleet<D>) -> (Vec<OutcomeBits>, [Vec<u32>; 4]) {
    let mut state = fleet.setup.start(true);
    let before = bits(&state.parameters);
    let outcomes = (0..3)
        .map(|step| {
            let batch = fleet.setup.batch(step);
            fleet.train(step, &mut state, &batch).bits()
        })
        .collect();
    assert_ne!(bits(&state.parameters), before, "training moves the parameters");
    let parts = [&state.parameters, &state.first_moment, &state.second_moment, &state.recurrent];
    (outcomes, parts.map(|part| bits(part)))
}

#[test]
fn threads_instructions_and_devices_change_no_bit() {
    for cell in CELLS {
        for task in TASKS {
            for (num_layers, clip) in [(1, "shard"), (2, "global")] {
                let sizes =
                    Sizes { cell, task, num_layers, hidden_size: 33, seq_len: 5, batch_size: 11, shards: 5 };
                let setup = Setup::new(sizes, &[("keep_prob", "0.8"), ("clip", clip), ("clip_norm", "0.1")]);
                let want = train(setup.alone());
                let check = |simd: Simd, threads: usize, split: &[Range<u32>]| {
                    let got = train(setup.fleet(simd, threads, split));
                    assert!(got == want, "{threads} threads, {simd}, shards {split:?}: bits of {sizes:?}");
                };
                for threads in [1, 2, 3] {
                    check(Simd::detect(), threads, &setup.split(1));
                }
                for simd in Simd::available() {
                    check(simd, 2, &setup.split(1));
                }
                for workers in [2, 3, 5] {
                    check(Simd::detect(), 1, &setup.split(workers));
                }
            }
        }
    }
}

#[test]
fn no_option_changes_a_bit_with_the_fleet() {
    let (mut count, mut runs) = (0, 0);
    for Combination { name, setup } in combinations() {
        let want = train(setup.alone());
        let mut check = |simd: Simd, threads: usize, workers: u32, recompute: bool| {
            let got = train(setup.fleet_with(simd, threads, &setup.split(workers), recompute));
            assert!(
                got == want,
                "{workers} workers, {threads} threads, {simd}, recompute {recompute}: {name}"
            );
            runs += 1;
        };
        for workers in [2, 3] {
            check(Simd::detect(), 1, workers, false);
        }
        for simd in Simd::available() {
            check(simd, 2, 1, false);
        }
        for (threads, workers) in [(1, 1), (2, 3)] {
            check(Simd::detect(), threads, workers, true);
        }
        count += 1;
    }
    println!("{count} combinations of options, {runs} other fleets with the same bits");
}

#[test]
fn products_of_bf16_change_no_bit_with_the_fleet() {
    let bf16 = [("bf16", &[("precision", "bf16")][..])];
    for Combination { name, setup } in combinations_with(&bf16) {
        let want = train(setup.alone());
        for simd in Simd::available() {
            for (threads, workers, recompute) in [(2, 1, false), (1, 3, false), (1, 2, true)] {
                let got = train(setup.fleet_with(simd, threads, &setup.split(workers), recompute));
                assert!(
                    got == want,
                    "{workers} workers, {threads} threads, {simd}, recompute {recompute}: {name}"
                );
            }
        }
    }
}

/// Sizes at which sums are cut into blocks and long buffers are shared among threads.
#[test]
fn large_networks_and_long_rows_change_no_bit() {
    let long = Sizes {
        cell: Cell::Rnn,
        task: Task::Chars,
        num_layers: 2,
        hidden_size: 20,
        seq_len: 70,
        batch_size: 9,
        shards: 2,
    };
    let wide = Sizes { cell: Cell::Lstm, num_layers: 1, hidden_size: 260, seq_len: 2, ..long };
    for sizes in [long, wide, Sizes { cell: Cell::Gru, ..long }] {
        for precision in ["f32", "bf16"] {
            let setup =
                Setup::new(sizes, &[("keep_prob", "0.8"), ("clip_norm", "0.1"), ("precision", precision)]);
            let want = train(setup.alone());
            for simd in Simd::available() {
                for workers in [1, 2] {
                    let got = train(setup.fleet(simd, 3, &setup.split(workers)));
                    assert!(got == want, "{simd}, {workers} workers, {precision}: bits of {sizes:?}");
                }
            }
        }
    }
}

/// Anything a step's bits must depend on alone.
fn any_sizes() -> impl Strategy<Value = Sizes> {
    let cell = prop_oneof![Just(Cell::Rnn), Just(Cell::Lstm), Just(Cell::Gru)];
    let task = prop_oneof![Just(Task::Chars), Just(Task::Rows)];
    (cell, task, 1usize..3, 1usize..80, 1usize..8, 1usize..20, any::<proptest::sample::Index>()).prop_map(
        |(cell, task, num_layers, hidden_size, seq_len, batch_size, shards)| {
            let shards = 1 + shards.index(batch_size) as u32;
            Sizes { cell, task, num_layers, hidden_size, seq_len, batch_size, shards }
        },
    )
}

/// `0 .. shards` cut anywhere; every part has a shard.
fn parts(shards: u32, cuts: &[u32]) -> Vec<Range<u32>> {
    let mut bounds: Vec<u32> = cuts.iter().map(|cut| cut % shards).chain([0, shards]).collect();
    bounds.sort_unstable();
    bounds.dedup();
    bounds.windows(2).map(|bounds| bounds[0]..bounds[1]).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_split_of_any_batch_gives_the_same_bits(
        sizes in any_sizes(),
        cuts in proptest::collection::vec(any::<u32>(), 0..5),
        threads in 1usize..4,
        level in 0..SimdLevel::ALL.len(),
        precision in prop_oneof![Just("f32"), Just("bf16")],
    ) {
        let setup = Setup::new(sizes, &[("keep_prob", "0.8"), ("clip_norm", "0.1"), ("precision", precision)]);
        let levels = Simd::available();
        let simd = levels[level % levels.len()];
        let split = parts(setup.job.shards, &cuts);
        let (got, want) = (train(setup.fleet(simd, threads, &split)), train(setup.alone()));
        prop_assert!(got == want, "{} threads, {}, {}, shards {:?}", threads, simd, precision, split);
    }

    #[test]
    fn any_split_of_an_evaluation_gives_the_same_sums(
        sizes in any_sizes(),
        cuts in proptest::collection::vec(any::<u32>(), 0..5),
        threads in 1usize..4,
        filled in any::<proptest::sample::Index>(),
    ) {
        let setup = Setup::new(sizes, &[("keep_prob", "0.8")]);
        let batch = setup.evaluation_batch(1 + filled.index(sizes.batch_size));
        let split = parts(setup.job.shards, &cuts);
        let evaluate = |mut fleet: Fleet<_>| fleet.pass(Pass::Evaluate, &setup.start(true), &batch).bits();
        let (got, want) = (evaluate(setup.fleet(Simd::detect(), threads, &split)), evaluate(setup.alone()));
        prop_assert!(got == want, "{} threads, shards {:?}", threads, split);
    }
}

fn sizes(cell: Cell, task: Task) -> Sizes {
    Sizes { cell, task, num_layers: 2, hidden_size: 21, seq_len: 6, batch_size: 10, shards: 4 }
}

#[test]
fn an_evaluation_gives_the_loss_of_training_without_dropout() {
    for cell in CELLS {
        for task in TASKS {
            let plain = Setup::new(sizes(cell, task), &[]);
            let dropping = Setup::new(sizes(cell, task), &[("keep_prob", "0.8")]);
            let (state, batch) = (plain.start(true), plain.batch(0));
            let trained = plain.alone().pass(Pass::Train { step: 0 }, &state, &batch);
            for setup in [&plain, &dropping] {
                let evaluated = setup.alone().pass(Pass::Evaluate, &state, &batch);
                assert_eq!(evaluated.sums, trained.sums, "{cell:?} {task:?}");
                assert_eq!(bits(&evaluated.recurrent), bits(&trained.recurrent), "{cell:?} {task:?}");
            }
            let dropped = dropping.alone().pass(Pass::Train { step: 0 }, &state, &batch);
            assert_ne!(dropped.sums, trained.sums, "{cell:?} {task:?}");
        }
    }
}

#[test]
fn the_last_rows_of_an_evaluation_leave_shards_empty() {
    let setup = Setup::new(sizes(Cell::Lstm, Task::Rows), &[]);
    // Slots 0 .. 3 are filled: shard 0 wholly, shard 1 by one of its three rows.
    let batch = setup.evaluation_batch(3);
    let sums = setup.alone().pass(Pass::Evaluate, &setup.start(true), &batch).sums;
    let rows: Vec<u64> = sums.iter().map(|sums| sums.rows).collect();
    assert_eq!(rows, [2, 1, 0, 0]);
    assert!(sums[..2].iter().all(|sums| sums.loss > 0.0 && sums.weight == sums.rows));
    assert!(sums[2..].iter().all(|sums| *sums == Default::default()));
}

/// An aborted step is run again, and an evaluation runs, on a device that has done other work meanwhile.
#[test]
fn what_a_device_did_before_changes_no_bit() {
    for cell in CELLS {
        for task in TASKS {
            let setup = Setup::new(sizes(cell, task), &[("keep_prob", "0.8")]);
            let state = setup.start(true);
            let (train, other) = (setup.batch(3), setup.batch(4));
            let (evaluation, fewer) = (setup.evaluation_batch(10), setup.evaluation_batch(3));
            let step = Pass::Train { step: 3 };
            let order = [
                (step, &train),
                (step, &train),
                (Pass::Evaluate, &evaluation),
                (step, &other),
                (step, &train),
                (Pass::Evaluate, &fewer),
                (step, &train),
            ];
            for threads in [1, 2] {
                let mut used = setup.fleet(Simd::detect(), threads, &setup.split(1));
                for (at, (pass, batch)) in order.into_iter().enumerate() {
                    let got = used.pass(pass, &state, batch).bits();
                    let want = setup.alone().pass(pass, &state, batch).bits();
                    assert!(
                        got == want,
                        "{cell:?} {task:?}, {threads} threads: {pass}, piece {at} of the work"
                    );
                }
            }
        }
    }
}

#[test]
fn a_device_takes_over_other_shards() {
    let setup = Setup::new(sizes(Cell::Gru, Task::Chars), &[("keep_prob", "0.8")]);
    let (state, batch) = (setup.start(true), setup.batch(0));
    let want = setup.alone().pass(Pass::Train { step: 0 }, &state, &batch).bits();
    let mut fleet = setup.fleet(Simd::detect(), 2, &setup.split(2));
    for cut in [2, 1, 3] {
        (fleet.workers[0].shards, fleet.workers[1].shards) = (0..cut, cut..4);
        assert!(fleet.pass(Pass::Train { step: 0 }, &state, &batch).bits() == want, "cut at shard {cut}");
    }
}

#[test]
fn digests_of_parts_add_up_to_that_of_the_whole() {
    let setup = Setup::new(sizes(Cell::Rnn, Task::Rows), &[]);
    let device = &setup.alone().workers[0].device;
    let values = setup.start(true).parameters;
    let digest = |range: Range<usize>| {
        let buffer = on(device, &values[range.clone()]);
        device.digest(&buffer, range.start).unwrap()
    };
    let whole = digest(0..values.len());
    for cut in [0, 1, 16, 33, values.len()] {
        assert_eq!(digest(0..cut).wrapping_add(digest(cut..values.len())), whole, "cut at {cut}");
    }
    assert_ne!(device.digest(&on(device, &values), 1).unwrap(), whole, "the place counts");
}

/// A step that must not be applied is known from its sums or its norm, with every way of clipping.
#[test]
fn what_is_not_finite_shows() {
    for clip in ["global", "shard", "none"] {
        for bad in [f32::NAN, f32::INFINITY] {
            let setup = Setup::new(sizes(Cell::Lstm, Task::Chars), &[("clip", clip)]);
            let (mut state, batch) = (setup.start(true), setup.batch(0));
            let outcome = setup.alone().train(0, &mut state.clone(), &batch);
            assert!(outcome.norm.is_finite() && outcome.sums.iter().all(|sums| !sums.non_finite));
            state.parameters[setup.layout.head().1.start] = bad;
            let outcome = setup.alone().train(0, &mut state.clone(), &batch);
            assert!(!outcome.norm.is_finite() && outcome.sums.iter().all(|sums| sums.non_finite));

            // A gradient that is not finite may hide behind a finite loss, in one shard only.
            let (mut fleet, mut outcome) = (setup.alone(), outcome);
            let device = &mut fleet.workers[0].device;
            outcome.partials[1].fill(1.0);
            outcome.partials[1][5] = bad;
            let mut partial = on(device, &outcome.partials[1]);
            if clip == "shard" {
                device.clip_shard(&mut partial, 12, 5.0).unwrap();
            }
            assert!(!device.mean_norm(&partial, 12).unwrap().is_finite(), "{clip} {bad}");
        }
    }
}
