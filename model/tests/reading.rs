//! Reading one step at a time gives the bits of an evaluation, whatever instructions compute either.

mod common;

use common::{CELLS, Setup, Sizes, TASKS, bits, on};
use kernels::Simd;
use kernels::cpu::softmax::softmax_cross_entropy_forward;
use model::cpu::CpuBackend;
use model::device::{Backend, Device, Pass, StepInput};
use protocol::batch::{Batch, Inputs};
use protocol::cell::Cell;
use protocol::job::Task;

/// One time step of a row: what is read, and the target if there is one.
type Step<'a> = (StepInput<'a>, Option<u32>);

fn steps_of<'a>(setup: &Setup, batch: &'a Batch, row: usize) -> Vec<Step<'a>> {
    let seq_len = setup.data.seq_len;
    match &batch.inputs {
        Inputs::Tokens(tokens) => {
            let tokens = &tokens[row * (seq_len + 1)..(row + 1) * (seq_len + 1)];
            let step = |pair: &[u16]| (StepInput::Token(pair[0].into()), Some(pair[1].into()));
            tokens.windows(2).map(step).collect()
        }
        Inputs::LabelledTokens { .. } => unreachable!("no test here classifies text"),
        Inputs::Bytes { bytes, labels } => {
            let width = setup.data.model.input.size();
            let bytes = bytes[row * seq_len * width..].chunks_exact(width).take(seq_len);
            let target = |t: usize| (t + 1 == seq_len).then(|| labels[row].into());
            bytes.zip(0..).map(|(bytes, t)| (StepInput::Bytes(bytes), target(t))).collect()
        }
    }
}

/// All logits of a row `[T][V]`, its summed loss and its hits.
fn read_row(setup: &Setup, simd: Simd, batch: &Batch, row: usize) -> (Vec<f32>, f64, u64) {
    let classes = setup.data.model.classes;
    let mut device = CpuBackend::new(simd, 1).open(&setup.layout, &setup.job, &setup.data, false).unwrap();
    let mut parameters = on(&device, &setup.start(false).parameters);
    let mut reader = device.reader(&parameters).unwrap();
    parameters.fill(f32::NAN); // The reader has its own.
    let (mut all, mut loss, mut correct) = (Vec::new(), 0.0, 0);
    for (input, target) in steps_of(setup, batch, row) {
        let mut logits = vec![f32::NAN; classes];
        device.read(&mut reader, input, &mut logits).unwrap();
        if let Some(target) = target {
            let (mut step_loss, mut hit) = ([f64::NAN], [false]);
            softmax_cross_entropy_forward(simd, classes, &[target], &logits, &mut step_loss, &mut hit);
            loss += step_loss[0];
            correct += u64::from(hit[0]);
        }
        all.extend(logits);
    }
    (all, loss, correct)
}

#[test]
fn a_row_read_step_by_step_has_the_bits_of_its_evaluation() {
    let hidden_sizes = [("f32", [1, 7, 33, 150].as_slice()), ("bf16", &[7, 33])];
    for (precision, hidden_sizes) in hidden_sizes {
        for cell in CELLS {
            for task in TASKS {
                for num_layers in [1, 2] {
                    for &hidden_size in hidden_sizes {
                        // Each row is a shard, so that its sums are known alone.
                        let (seq_len, batch_size, shards) = (9, 3, 3);
                        let sizes =
                            Sizes { cell, task, num_layers, hidden_size, seq_len, batch_size, shards };
                        // Reading drops nothing, as an evaluation does not.
                        assert_rows(&Setup::new(sizes, &[("keep_prob", "0.8"), ("precision", precision)]));
                    }
                }
            }
        }
    }
}

/// Each row of a batch, alone in its shard, has the loss that its reading has, which is the same at every level.
fn assert_rows(setup: &Setup) {
    let (batch, job) = (setup.evaluation_batch(3), &setup.job);
    let want = setup.alone().pass(Pass::Evaluate, &setup.start(false), &batch).sums;
    for (row, want) in want.iter().enumerate() {
        let (logits, loss, correct) = read_row(setup, Simd::detect(), &batch, row);
        assert_eq!(loss.to_bits(), want.loss.to_bits(), "row {row} of {job:?}");
        assert_eq!(correct, want.correct, "row {row} of {job:?}");
        for simd in Simd::available() {
            let other = read_row(setup, simd, &batch, row);
            assert_eq!(bits(&other.0), bits(&logits), "{simd}, row {row} of {job:?}");
            assert_eq!(other.1.to_bits(), loss.to_bits(), "{simd}, row {row} of {job:?}");
        }
    }
}

#[test]
fn readers_of_one_device_have_states_of_their_own() {
    let sizes = Sizes {
        cell: Cell::Lstm,
        task: Task::Chars,
        num_layers: 2,
        hidden_size: 21,
        seq_len: 6,
        batch_size: 2,
        shards: 2,
    };
    let setup = Setup::new(sizes, &[]);
    let batch = setup.evaluation_batch(2);
    let mut device =
        CpuBackend::new(Simd::detect(), 2).open(&setup.layout, &setup.job, &setup.data, false).unwrap();
    let state = setup.start(false);
    let parameters = on(&device, &state.parameters);
    let mut readers = [(); 2].map(|()| device.reader(&parameters).unwrap());
    let rows = [0, 1].map(|row| steps_of(&setup, &batch, row));
    let mut logits = [const { Vec::<f32>::new() }; 2];
    for t in 0..sizes.seq_len {
        // Training goes on between two steps and must not be seen.
        let (state_in, mut state_out) = (on(&device, &state.recurrent), on(&device, &state.recurrent));
        device
            .step(Pass::Train { step: 0 }, &parameters, &setup.batch(0), &state_in, &mut state_out)
            .unwrap();
        for row in [0, 1] {
            let mut step = vec![f32::NAN; setup.data.model.classes];
            device.read(&mut readers[row], rows[row][t].0, &mut step).unwrap();
            logits[row].extend(step);
        }
    }
    for row in [0, 1] {
        assert_eq!(bits(&logits[row]), bits(&read_row(&setup, Simd::detect(), &batch, row).0));
    }
}
