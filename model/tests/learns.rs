//! Training learns: a text that repeats, and two kinds of images that differ at a glance.

mod common;

use common::{CELLS, Setup, Sizes};
use model::device::Pass;
use protocol::batch::{Batch, Inputs};
use protocol::job::Task;
use protocol::random::{Purpose, Stream};
use protocol::schedule::Work;
use protocol::sums::StepSums;

const LEARNING_RATE: (&str, &str) = ("learning_rate", "0.01");

/// Windows of the repeating text, each row at another place in it, going on where the last step ended.
fn window(setup: &Setup, text: &[u16], step: usize) -> Batch {
    let (rows, seq_len) = (setup.job.batch_size as usize, setup.data.seq_len);
    let row = |row: usize| (0..=seq_len).map(move |t| text[(3 * row + step * seq_len + t) % text.len()]);
    let tokens = (0..rows).flat_map(row).collect();
    let work = Work::Train { step: step as u64, epoch: 0, index: step as u64 };
    setup.batch_of(work, (0..rows as u64).collect(), Inputs::Tokens(tokens))
}

#[test]
fn every_cell_learns_a_repeating_text() {
    let text: Vec<u16> = "the fleet may change, the bits may not; "
        .bytes()
        .map(|byte| if byte.is_ascii_lowercase() { u16::from(byte - b'a') } else { u16::from(byte) % 4 + 26 })
        .collect();
    for (cell, precision) in CELLS.into_iter().flat_map(|cell| [(cell, "f32"), (cell, "bf16")]) {
        let sizes = Sizes {
            cell,
            task: Task::Chars,
            num_layers: 1,
            hidden_size: 32,
            seq_len: 10,
            batch_size: 6,
            shards: 3,
        };
        let setup = Setup::with_data(sizes, 30, 30, &[LEARNING_RATE, ("precision", precision)]);
        let (mut state, mut fleet) = (setup.start(false), setup.alone());
        let losses: Vec<f64> = (0..250)
            .map(|step| {
                let outcome = fleet.train(step as u64, &mut state, &window(&setup, &text, step));
                StepSums::total(&outcome.sums).mean_loss()
            })
            .collect();
        let (first, last) = (losses[0], losses[losses.len() - 1]);
        let steps = losses.len();
        println!(
            "{cell:?}, {precision}: loss of a repeating text from {first:.3} to {last:.4} in {steps} steps"
        );
        assert!((first - 30f64.ln()).abs() < 0.3, "{cell:?}, {precision} starts near ln 30, at {first}");
        assert!(last < 0.1, "{cell:?}, {precision} ends at {last}");
    }
}

/// Noise that is brighter in the first rows (class 0) or in the last ones (class 1).
fn images(setup: &Setup, work: Work, name: u32) -> Batch {
    let (rows, seq_len, width) = (setup.job.batch_size, setup.data.seq_len, setup.data.model.input.size());
    let mut random = Stream::new(9, Purpose::Digits, [name, 0]);
    let (mut bytes, mut labels) = (Vec::new(), Vec::new());
    for _ in 0..rows {
        let label = random.below(2) as u16;
        for t in 0..seq_len {
            let bright = if (t >= seq_len / 2) == (label == 1) { 128 } else { 0 };
            bytes.extend((0..width).map(|_| bright + random.below(128) as u8));
        }
        labels.push(label);
    }
    setup.batch_of(work, (0..rows.into()).collect(), Inputs::Bytes { bytes, labels })
}

#[test]
fn every_cell_learns_to_tell_two_images_apart() {
    for cell in CELLS {
        let sizes = Sizes {
            cell,
            task: Task::Rows,
            num_layers: 1,
            hidden_size: 16,
            seq_len: 8,
            batch_size: 16,
            shards: 4,
        };
        let setup = Setup::with_data(sizes, 6, 2, &[LEARNING_RATE, ("clip", "none")]);
        let (mut state, mut fleet) = (setup.start(false), setup.alone());
        for step in 0..100 {
            let work = Work::Train { step, epoch: 0, index: step };
            fleet.train(step, &mut state, &images(&setup, work, step as u32));
        }
        let unseen = images(&setup, Work::Evaluate { step: 100, index: 0 }, 1000);
        let sums = StepSums::total(&fleet.pass(Pass::Evaluate, &state, &unseen).sums);
        println!("{cell:?}: {} of 16 unseen images, loss {:.4}", sums.correct, sums.mean_loss());
        assert!(sums.accuracy() == 1.0 && sums.mean_loss() < 0.1, "{cell:?}: {sums:?}");
    }
}
