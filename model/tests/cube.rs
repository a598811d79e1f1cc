//! A device of cubecl's against the CPU device, in every option. For a GPU stand lavapipe, and the host's processor, which
//! runs the CUDA C++ that an H100 would be given.
#![cfg(any(feature = "cuda", feature = "wgpu"))]

mod common;

use common::{Combination, Largest, Setup, Sizes, combinations, distance, widen};
use cubecl::Runtime;
use model::device::{Device, Pass, StepInput};
use protocol::batch::{Batch, Inputs};
use protocol::cell::Cell;
use protocol::job::Task;
use protocol::layout::Input;
use protocol::schedule::Work;
use protocol::sums::StepSums;

/// The largest difference allowed, as a share of a tensor's largest number.
const LIMIT: f64 = 1e-5;

fn is_long() -> bool {
    std::env::var_os("LOCKSTEP_LONG").is_some()
}

/// Every pair of ways in which rows come and of what goes with everything, with the cells in turn; all combinations if
/// there is time.
fn some_combinations() -> impl Iterator<Item = Combination> {
    const PAIRS: usize = 55;
    let all: Vec<Combination> = combinations().collect();
    let cells = all.len() / PAIRS;
    all.into_iter()
        .enumerate()
        .filter(move |(at, _)| is_long() || (at % PAIRS) % cells == at / PAIRS)
        .map(|(_, c)| c)
}

fn check_options<R: Runtime>(on: &R::Device) {
    let [mut losses, mut states, mut gradients] = [(); 3].map(|()| Largest::default());
    let mut count = 0;
    for Combination { name, setup } in some_combinations() {
        let pass = Pass::Train { step: 3 };
        let (state, batch) = (setup.start(true), setup.batch(3));
        let want = setup.alone().pass(pass, &state, &batch);
        let got = setup.fleet_on::<R>(on, &setup.split(1)).pass(pass, &state, &batch);
        let counts = |sums: &[StepSums]| -> Vec<_> {
            sums.iter()
                .map(|sums| (sums.weight, sums.correct, sums.rows, sums.row_hash, sums.non_finite))
                .collect()
        };
        assert_eq!(counts(&got.sums), counts(&want.sums), "{name}");
        let [got_loss, want_loss] = [&got, &want].map(|outcome| StepSums::total(&outcome.sums).loss);
        losses.note((got_loss - want_loss).abs() / want_loss, 1e-6, || name.clone());
        states.note(distance(&got.recurrent, &widen(&want.recurrent)), LIMIT, || name.clone());
        for tensor in &setup.layout.tensors {
            let range = || tensor.range.clone();
            let difference = distance(&got.gradient[range()], &widen(&want.gradient[range()]));
            gradients.note(difference, LIMIT, || format!("{} of {name}", tensor.name));
        }
        count += 1;
    }
    println!("parity: {count} cases of cells, rows and options against the CPU device");
    losses.print("loss against the CPU");
    states.print("final state against the CPU");
    gradients.print("gradient tensors against the CPU");
    assert!(count >= 55);
}

/// Two layers of some cell, with dropout.
fn setup_of(cell: Cell, task: Task, shards: u32) -> Setup {
    setup_in("f32", cell, task, shards)
}

fn setup_in(precision: &str, cell: Cell, task: Task, shards: u32) -> Setup {
    let sizes = Sizes { cell, task, num_layers: 2, hidden_size: 10, seq_len: 7, batch_size: 11, shards };
    Setup::new(sizes, &[("keep_prob", "0.7"), ("precision", precision)])
}

/// With operands of bf16 the gradient is that of the CPU, but for the few that were rounded the other way; with those of tf32,
/// which the CPU has not, it is nearer to that of f32 by the three bits that it has more.
fn check_precisions<R: Runtime>(on: &R::Device) {
    for (cell, task) in [(Cell::Rnn, Task::Rows), (Cell::Lstm, Task::Chars), (Cell::Gru, Task::Rows)] {
        let pass = Pass::Train { step: 3 };
        let [on_cpu, on_device] = [false, true].map(|on_device| {
            move |precision: &str| {
                let setup = setup_in(precision, cell, task, 3);
                let (state, batch) = (setup.start(true), setup.batch(3));
                if on_device {
                    setup.fleet_on::<R>(on, &setup.split(1)).pass(pass, &state, &batch).gradient
                } else {
                    setup.alone().pass(pass, &state, &batch).gradient
                }
            }
        });
        let (exact, rounded) = (on_cpu("f32"), on_cpu("bf16"));
        let of_rounding = root_mean_square(&rounded, &exact);
        let difference = root_mean_square(&on_device("bf16"), &rounded);
        let of_tf32 = root_mean_square(&on_device("tf32"), &exact);
        println!(
            "{cell}: bf16 changes a gradient by {of_rounding:.1e}, tf32 by {of_tf32:.1e}; bf16 here and there differs by {difference:.1e}"
        );
        assert!(difference < 0.05 * of_rounding, "{cell} in bf16");
        assert!(of_tf32 < 0.25 * of_rounding && of_tf32 > 0.02 * of_rounding, "{cell} in tf32");
    }
}

/// The root mean square of the differences, as a share of that of the numbers.
fn root_mean_square(got: &[f32], want: &[f32]) -> f64 {
    let squares = |of: &dyn Fn(f64, f64) -> f64| -> f64 {
        got.iter().zip(want).map(|(got, want)| of(f64::from(*got), f64::from(*want)).powi(2)).sum()
    };
    (squares(&|got, want| got - want) / squares(&|_, want| want)).sqrt()
}

fn check_splits<R: Runtime>(on: &R::Device) {
    for (precision, cell, task) in [
        ("f32", Cell::Rnn, Task::Rows),
        ("f32", Cell::Lstm, Task::Chars),
        ("f32", Cell::Gru, Task::Chars),
        ("bf16", Cell::Lstm, Task::Rows),
        ("bf16", Cell::Gru, Task::Chars),
        ("tf32", Cell::Rnn, Task::Rows),
    ] {
        let setup = setup_in(precision, cell, task, 5);
        let mut outcomes = Vec::new();
        for workers in [1, 1, 2, 3, 5] {
            let mut state = setup.start(true);
            let mut fleet = setup.fleet_on::<R>(on, &setup.split(workers));
            let bits: Vec<_> =
                (0..3).map(|step| fleet.train(step, &mut state, &setup.batch(step)).bits()).collect();
            // Of an evaluation's last batch all devices but the first may have no row.
            let evaluated = fleet.pass(Pass::Evaluate, &state, &one_row(&setup)).bits();
            outcomes.push((workers, (bits, evaluated), state));
        }
        let (_, bits, state) = &outcomes[0];
        for (workers, other_bits, other_state) in &outcomes[1..] {
            assert!(bits == other_bits, "{cell} in {precision}: {workers} workers have other bits");
            assert!(state == other_state, "{cell} in {precision}: {workers} workers have another state");
        }
    }
}

fn check_twenty_steps<R: Runtime>(on: &R::Device) {
    for cell in [Cell::Rnn, Cell::Lstm, Cell::Gru] {
        let setup = setup_of(cell, Task::Chars, 3);
        let [mut on_cpu, mut on_device] = [(); 2].map(|()| setup.start(false));
        let (mut cpu, mut device) = (setup.alone(), setup.fleet_on::<R>(on, &setup.split(1)));
        for step in 0..20 {
            let batch = setup.batch(step);
            let want = StepSums::total(&cpu.train(step, &mut on_cpu, &batch).sums).mean_loss();
            let got = StepSums::total(&device.train(step, &mut on_device, &batch).sums).mean_loss();
            assert!((got - want).abs() < 1e-4, "{cell}, step {step}: {got}, the CPU {want}");
        }
    }
}

/// A batch of one row for an evaluation.
fn one_row(setup: &Setup) -> Batch {
    let batch = setup.evaluation_batch(1);
    assert!(matches!(batch.work, Work::Evaluate { .. }));
    batch
}

fn check_reading<R: Runtime>(on: &R::Device) {
    for (cell, task) in [(Cell::Lstm, Task::Chars), (Cell::Gru, Task::Rows), (Cell::Rnn, Task::Chars)] {
        let setup = setup_of(cell, task, 1);
        let (state, batch) = (setup.start(false), one_row(&setup));
        let mut fleet = setup.fleet_on::<R>(on, &setup.split(1));
        let want = fleet.pass(Pass::Evaluate, &state, &batch).sums[0].loss;
        let device = &mut fleet.workers[0].device;
        let mut parameters = device.zeros(state.parameters.len()).unwrap();
        device.import(&mut parameters, 0, &state.parameters).unwrap();
        let mut reader = device.reader(&parameters).unwrap();
        let classes = setup.data.model.classes;
        let mut loss = 0.0;
        let steps = batch.lengths[0] as usize;
        for t in 0..steps {
            let (input, target) = match (&batch.inputs, setup.data.model.input) {
                (Inputs::Tokens(tokens), _) => (StepInput::Token(tokens[t].into()), Some(tokens[t + 1])),
                (Inputs::Bytes { bytes, labels }, Input::Bytes(width)) => {
                    (StepInput::Bytes(&bytes[t * width..][..width]), (t + 1 == steps).then(|| labels[0]))
                }
                _ => unreachable!("no other task is tried"),
            };
            let mut logits = vec![f32::NAN; classes];
            device.read(&mut reader, input, &mut logits).unwrap();
            if let Some(target) = target {
                let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let total: f64 = logits.iter().map(|&x| libm::exp(f64::from(x - max))).sum();
                loss += libm::log(total) + f64::from(max - logits[usize::from(target)]);
            }
        }
        // The sum of exponentials is one of f32s there.
        assert!((loss - want).abs() < 1e-6 * want, "{cell}: {loss}, the evaluation {want}");
    }
}

/// All checks on a device, unless it is not there.
macro_rules! check_on {
    ($runtime:ty, $device:expr, $skips:expr) => {
        #[test]
        fn every_option_equals_the_cpu() {
            if !$skips {
                super::check_options::<$runtime>(&$device);
            }
        }

        #[test]
        fn rounded_operands_are_the_cpus() {
            if !$skips {
                super::check_precisions::<$runtime>(&$device);
            }
        }

        #[test]
        fn neither_the_split_nor_the_run_changes_a_bit() {
            if !$skips {
                super::check_splits::<$runtime>(&$device);
            }
        }

        #[test]
        fn twenty_steps_come_out_as_on_the_cpu() {
            if !$skips {
                super::check_twenty_steps::<$runtime>(&$device);
            }
        }

        #[test]
        fn a_row_read_step_by_step_has_the_bits_of_an_evaluation() {
            if !$skips {
                super::check_reading::<$runtime>(&$device);
            }
        }
    };
}

#[cfg(feature = "wgpu")]
mod lavapipe {
    use cubecl::wgpu::{WgpuDevice, WgpuRuntime};

    check_on!(WgpuRuntime, WgpuDevice::Cpu, false);
}

#[cfg(feature = "cuda")]
mod emulated {
    use kernels::cube::emulated::skips;
    use kernels::cube::source::{Architecture, Launches, SourceDevice, SourceRuntime};

    const H100: SourceDevice =
        SourceDevice { architecture: Architecture::Sm90, launches: Launches::Emulated { order: 2 } };

    check_on!(SourceRuntime, H100, skips());
}
