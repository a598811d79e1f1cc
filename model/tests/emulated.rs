//! The CUDA kernels as an A100 and an H100 would be given them, run by the host's processor, against the CPU device.
#![cfg(feature = "cuda")]

mod common;

use common::{Largest, Setup, Sizes, distance, widen};
use kernels::cube::emulated;
use kernels::cube::source::{Architecture, Launches, SourceDevice, SourceRuntime};
use model::device::Pass;
use protocol::cell::Cell::{self, Gru, Lstm, Rnn};
use protocol::job::Precision;
use protocol::job::Task::{self, Chars, Rows};
use protocol::sums::StepSums;

/// The largest difference allowed, as a share of a tensor's largest number.
const LIMIT: f64 = 1e-5;

/// A network as wide as a preset's, of few steps.
const fn network(cell: Cell, task: Task, num_layers: usize, hidden_size: usize, batch_size: usize) -> Sizes {
    let (seq_len, shards) = (if matches!(task, Chars) { 4 } else { 3 }, 2);
    Sizes { cell, task, num_layers, hidden_size, seq_len, batch_size, shards }
}

/// What each architecture is given, its places for the weights and its tiles: a preset's networks, and each option.
const JOBS: [(Sizes, &[(&str, &str)]); 18] = [
    (network(Lstm, Chars, 2, 128, 5), &[]),
    (network(Gru, Chars, 2, 128, 5), &[]),
    (network(Lstm, Chars, 1, 512, 3), &[]),
    (network(Rnn, Rows, 1, 150, 150), &[]),
    (network(Lstm, Rows, 1, 150, 150), &[]),
    (network(Gru, Rows, 1, 150, 150), &[]),
    (network(Rnn, Rows, 1, 150, 5), &[("activation", "relu"), ("optimizer", "sgd")]),
    (network(Rnn, Rows, 2, 150, 5), &[("bidirectional", "true"), ("clip", "shard"), ("keep_prob", "0.5")]),
    (network(Lstm, Rows, 1, 150, 5), &[("peepholes", "true")]),
    (network(Lstm, Rows, 1, 150, 5), &[("cell_clip", "0.1")]),
    (network(Lstm, Rows, 1, 150, 5), &[("peepholes", "true"), ("cell_clip", "0.1")]),
    (network(Lstm, Chars, 1, 150, 5), &[("recurrent_activation", "hard_sigmoid"), ("embedding_size", "16")]),
    (network(Lstm, Rows, 1, 150, 5), &[("projection", "50")]),
    (
        network(Lstm, Rows, 2, 150, 5),
        &[("bidirectional", "true"), ("variational_dropout", "true"), ("keep_prob", "0.5")],
    ),
    (network(Gru, Rows, 1, 150, 5), &[("reset", "before")]),
    (network(Gru, Rows, 1, 150, 5), &[("recurrent_activation", "hard_sigmoid")]),
    (network(Lstm, Chars, 2, 128, 5), &[("precision", "bf16")]),
    (network(Gru, Rows, 1, 150, 5), &[("precision", "tf32")]),
];

/// The order of threads and cubes, that of 0 upwards, and how many devices share the shards.
const WAYS: [(Architecture, u8, u32); 2] = [(Architecture::Sm80, 0, 1), (Architecture::Sm90, 1, 2)];

#[test]
fn cuda_kernels_follow_the_cpu_with_the_same_bits_on_any_architecture_split_and_order_of_threads() {
    if emulated::skips() {
        return;
    }
    let [mut losses, mut states, mut gradients] = [(); 3].map(|()| Largest::default());
    for (sizes, settings) in JOBS {
        let name = || format!("{sizes:?} {settings:?}");
        let setup = Setup::new(sizes, settings);
        let (state, batch, evaluated) = (setup.start(true), setup.batch(3), setup.evaluation_batch(1));
        // How near rounded operands are to the CPU's `cube.rs` says.
        let is_exact = setup.job.precision == Precision::F32;
        let want = is_exact.then(|| setup.alone().pass(Pass::Train { step: 3 }, &state, &batch));
        let mut first = None;
        for (architecture, order, workers) in WAYS {
            let device = SourceDevice { architecture, launches: Launches::Emulated { order } };
            let mut fleet = setup.fleet_on::<SourceRuntime>(&device, &setup.split(workers));
            let mut state = state.clone();
            let got = fleet.train(3, &mut state, &batch);
            let evaluated = fleet.pass(Pass::Evaluate, &state, &evaluated).bits();
            let bits = (got.bits(), evaluated, state);
            if let Some(first) = &first {
                assert!(bits == *first, "{} has other bits on {workers} of {device:?}", name());
                continue;
            }
            first = Some(bits);
            if let Some(want) = &want {
                let [got_loss, want_loss] = [&got, want].map(|outcome| StepSums::total(&outcome.sums).loss);
                losses.note((got_loss - want_loss).abs() / want_loss, 1e-6, name);
                states.note(distance(&got.recurrent, &widen(&want.recurrent)), LIMIT, name);
                for tensor in &setup.layout.tensors {
                    let range = || tensor.range.clone();
                    let difference = distance(&got.gradient[range()], &widen(&want.gradient[range()]));
                    gradients.note(difference, LIMIT, || format!("{} of {}", tensor.name, name()));
                }
            }
        }
    }
    println!("parity: {} cases of CUDA kernels on the host's processor", JOBS.len());
    losses.print("loss against the CPU");
    states.print("final state against the CPU");
    gradients.print("gradient tensors against the CPU");
}
