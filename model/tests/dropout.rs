//! Dropout as the network uses it: which mask falls on which output, what it leaves alone, and its gradient.

mod common;

use common::{CELLS, Largest, Setup, Sizes, State, TASKS, widen};
use kernels::Simd;
use model::device::Pass;
use protocol::batch::{Batch, Inputs};
use protocol::cell::Cell;
use protocol::job::Task;
use protocol::random::{Purpose, dropout_counter, keep_threshold, key, philox4x32_10};
use protocol::sums::StepSums;

const KEEP: f32 = 0.8;
const STEP: u64 = 5;

fn sizes(cell: Cell, task: Task, num_layers: usize, seq_len: usize) -> Sizes {
    Sizes { cell, task, num_layers, hidden_size: 19, seq_len, batch_size: 4, shards: 3 }
}

/// The first `seq_len` steps of every row of a text batch.
fn shortened(setup: &Setup, batch: &Batch, from_seq_len: usize) -> Batch {
    let Inputs::Tokens(tokens) = &batch.inputs else { panic!("a text has tokens") };
    let tokens = tokens.chunks_exact(from_seq_len + 1).flat_map(|row| &row[..=setup.data.seq_len]);
    setup.batch_of(batch.work, batch.sample_ids.clone(), Inputs::Tokens(tokens.copied().collect()))
}

/// The loss of a row's prediction from the last layer's undropped output `h`, with the mask drawn here.
fn loss_behind_mask(setup: &Setup, state: &State, h: &[f64], slot: u32, t: usize, target: u16) -> f64 {
    let shape = &setup.layout.shape;
    let position = (t * shape.num_layers() + shape.num_layers() - 1) as u32;
    let kept = |unit: usize| {
        let counter = dropout_counter(STEP, slot, position, unit as u32 / 4);
        philox4x32_10(key(setup.job.seed, Purpose::Dropout), counter)[unit % 4] < keep_threshold(KEEP)
    };
    let masked: Vec<f64> =
        h.iter().enumerate().map(|(unit, h)| if kept(unit) { h / f64::from(KEEP) } else { 0.0 }).collect();
    let (weight, bias) = setup.layout.head();
    let logits: Vec<f64> = state.parameters[weight]
        .chunks_exact(shape.hidden_sizes[0])
        .zip(&state.parameters[bias])
        .map(|(w, b)| widen(w).iter().zip(&masked).map(|(w, h)| w * h).sum::<f64>() + f64::from(*b))
        .collect();
    logits.iter().map(|logit| logit.exp()).sum::<f64>().ln() - logits[usize::from(target)]
}

/// The state after k steps tells what the head saw at step k - 1 before the mask, and the losses of runs of k and of
/// k - 1 steps differ by what the head made of it.
#[test]
fn the_heads_masks_are_the_protocols() {
    let mut largest = Largest::default();
    for cell in CELLS {
        for num_layers in [1, 2] {
            let whole = Setup::new(sizes(cell, Task::Chars, num_layers, 4), &[]);
            let batch = whole.batch(STEP);
            let mut before = 0.0;
            for seq_len in 1..=4 {
                let setup =
                    Setup::new(sizes(cell, Task::Chars, num_layers, seq_len), &[("keep_prob", "0.8")]);
                let (state, batch) = (setup.start(true), shortened(&setup, &batch, 4));
                // Two workers, so that a row's place in its batch is not its slot.
                let mut fleet = setup.fleet(Simd::detect(), 1, &setup.split(2));
                let outcome = fleet.pass(Pass::Train { step: STEP }, &state, &batch);
                let loss = StepSums::total(&outcome.sums).loss;

                let Inputs::Tokens(tokens) = &batch.inputs else { panic!("a text has tokens") };
                let size = setup.layout.shape.state_size();
                let last_h = size - (1 + usize::from(cell == Cell::Lstm)) * 19;
                let want: f64 = (0..4)
                    .map(|slot| {
                        let h = widen(&outcome.recurrent[slot * size + last_h..][..19]);
                        let target = tokens[slot * (seq_len + 1) + seq_len];
                        loss_behind_mask(&setup, &state, &h, slot as u32, seq_len - 1, target)
                    })
                    .sum();
                let difference = ((loss - before) - want).abs() / want;
                largest.note(difference, 1e-6, || format!("{cell:?}, {num_layers} layers, step {seq_len}"));
                before = loss;
            }
        }
    }
    largest.print("loss behind the protocol's masks");
}

#[test]
fn the_carried_state_is_not_dropped() {
    for cell in CELLS {
        let run = |keep_prob: &str| {
            let setup = Setup::new(sizes(cell, Task::Chars, 2, 6), &[("keep_prob", keep_prob)]);
            setup.alone().pass(Pass::Train { step: STEP }, &setup.start(true), &setup.batch(STEP)).recurrent
        };
        let (plain, dropped) = (run("1.0"), run("0.8"));
        let size = plain.len() / 4;
        for (plain, dropped) in plain.chunks(size).zip(dropped.chunks(size)) {
            assert_eq!(plain[..size / 2], dropped[..size / 2], "{cell:?}: the first layer sees no mask");
            assert_ne!(plain[size / 2..], dropped[size / 2..], "{cell:?}: the second reads a dropped output");
        }
    }
}

/// The slope of the loss along each tensor's own gradient, by central differences, is that gradient's norm: the masks of
/// the way back are those of the way there, on every layer.
#[test]
fn gradients_with_dropout_are_the_slope_of_the_loss() {
    let mut largest = Largest::default();
    for cell in CELLS {
        for task in TASKS {
            let setup = Setup::new(sizes(cell, task, 2, 6), &[("keep_prob", "0.8"), ("init", "pytorch")]);
            let (state, batch, mut fleet) = (setup.start(true), setup.batch(STEP), setup.alone());
            let mut run = |state: &State| fleet.pass(Pass::Train { step: STEP }, state, &batch);
            let gradient = run(&state).gradient;
            for tensor in &setup.layout.tensors {
                let gradient = widen(&gradient[tensor.range.clone()]);
                let norm = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
                let mut loss_at = |distance: f64| {
                    let mut moved = state.clone();
                    for (w, g) in moved.parameters[tensor.range.clone()].iter_mut().zip(&gradient) {
                        *w = (f64::from(*w) + distance * g / norm) as f32;
                    }
                    StepSums::total(&run(&moved).sums).loss
                };
                // Fourth order: the rounding of an f32 loss needs a long step, which a plain difference would bend.
                let step = 0.02;
                let near = loss_at(step) - loss_at(-step);
                let far = loss_at(2.0 * step) - loss_at(-2.0 * step);
                let slope = (8.0 * near - far) / (12.0 * step);
                let place = || format!("{} of {cell:?} {task:?}", tensor.name);
                largest.note((slope - norm).abs() / norm, 1e-3, place);
            }
        }
    }
    largest.print("gradient with dropout against the slope of the loss");
}

/// `DropoutWrapper` drops outputs, and a head on the final state reads the state: one such layer has nothing to drop.
#[test]
fn the_final_state_is_never_dropped() {
    for cell in CELLS {
        let partials = |keep_prob| {
            let setup = Setup::new(sizes(cell, Task::Rows, 1, 5), &[("keep_prob", keep_prob)]);
            setup.alone().pass(Pass::Train { step: STEP }, &setup.start(true), &setup.batch(STEP)).partials
        };
        assert_eq!(partials("0.5"), partials("1.0"), "{cell:?}");
    }
}
