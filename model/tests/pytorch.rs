//! The CPU device against PyTorch: ten training steps from the same parameters on the same data, read from the files
//! that `fixtures/make_fixtures.py` writes.

mod common;

use std::path::{Path, PathBuf};

use common::{Largest, Setup, Sizes, distance, widen};
use protocol::batch::{Batch, Inputs};
use protocol::cell::Cell;
use protocol::job::Task;
use protocol::schedule::Work;
use protocol::sums::StepSums;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

const STEPS: usize = 10;

/// The largest difference allowed, as a share of the largest number of a curve or tensor.
const LIMIT: f64 = 1e-4;

/// The same for the first step's gradients, into which no difference of steps before has grown.
const GRADIENT_LIMIT: f64 = 1e-5;

#[test]
fn ten_steps_equal_pytorch() {
    let paths = fixtures();
    assert_eq!(paths.len(), 20, "3 cells x 1 and 2 layers x 2 tasks, and 8 networks with options");
    let [mut losses, mut norms, mut gradients, mut parameters] = [(); 4].map(|()| Largest::default());
    for path in paths {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let bytes = std::fs::read(&path).unwrap();
        let fixture = SafeTensors::deserialize(&bytes).unwrap();
        let setup = setup(&bytes, &fixture);
        let mut state = setup.start(false);
        for tensor in &setup.layout.tensors {
            let (shape, values) = floats(&fixture, "init", &tensor.name);
            assert_eq!(shape, tensor.shape, "{name}: {}", tensor.name);
            state.parameters[tensor.range.clone()].copy_from_slice(&values);
        }
        let theirs = fixture.names().iter().filter_map(|name| name.strip_prefix("init.")).count();
        assert_eq!(theirs, setup.layout.tensors.len(), "{name}: every parameter is ours too");

        let mut fleet = setup.alone();
        let (mut loss_curve, mut norm_curve) = (Vec::new(), Vec::new());
        for step in 0..STEPS {
            let outcome = fleet.train(step as u64, &mut state, &batch(&setup, &fixture, step));
            let sums = StepSums::total(&outcome.sums);
            loss_curve.push(sums.mean_loss() as f32);
            norm_curve.push(outcome.norm as f32);
            if step > 0 {
                continue;
            }
            let mean: Vec<f32> = outcome.gradient.iter().map(|g| g / sums.weight as f32).collect();
            for tensor in &setup.layout.tensors {
                let want = widen(&floats(&fixture, "grad", &tensor.name).1);
                let difference = distance(&mean[tensor.range.clone()], &want);
                gradients.note(difference, GRADIENT_LIMIT, || format!("{} of {name}", tensor.name));
            }
        }
        losses.note(distance(&loss_curve, &doubles(&fixture, "losses")), LIMIT, || name.clone());
        norms.note(distance(&norm_curve, &doubles(&fixture, "norms")), LIMIT, || name.clone());
        for tensor in &setup.layout.tensors {
            let want = widen(&floats(&fixture, "final", &tensor.name).1);
            let difference = distance(&state.parameters[tensor.range.clone()], &want);
            parameters.note(difference, LIMIT, || format!("{} of {name}", tensor.name));
        }
    }
    losses.print("losses of 10 steps against PyTorch");
    norms.print("gradient norms of 10 steps against PyTorch");
    gradients.print("gradient tensors of the first step against PyTorch");
    parameters.print("parameter tensors after 10 steps against PyTorch");
}

fn fixtures() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"))
        .collect();
    paths.sort();
    paths
}

/// The job that a file's metadata states, on data of the file's widths.
fn setup(bytes: &[u8], fixture: &SafeTensors<'_>) -> Setup {
    let (_, metadata) = SafeTensors::read_metadata(bytes).unwrap();
    let job: Value = serde_json::from_str(&metadata.metadata().as_ref().unwrap()["job"]).unwrap();
    let number = |key: &str| job[key].as_u64().unwrap_or_else(|| panic!("no number {key} in {job}")) as usize;
    let sizes = Sizes {
        cell: serde_json::from_value::<Cell>(job["cell"].clone()).unwrap(),
        task: serde_json::from_value::<Task>(job["task"].clone()).unwrap(),
        num_layers: number("num_layers"),
        hidden_size: number("hidden_size"),
        seq_len: number("seq_len"),
        batch_size: number("batch_size"),
        shards: 4,
    };
    let first = if job["embedding_size"].is_null() { "rnn.weight_ih_l0" } else { "embedding.weight" };
    let (shape, classes) = (floats(fixture, "init", first).0, floats(fixture, "init", "head.weight").0[0]);
    let width = shape[usize::from(first == "rnn.weight_ih_l0")];
    let settings: Vec<(&str, String)> =
        job.as_object().unwrap().iter().map(|(key, value)| (key.as_str(), setting(value))).collect();
    let settings: Vec<(&str, &str)> = settings.iter().map(|(key, value)| (*key, value.as_str())).collect();
    Setup::with_data(sizes, width, classes, &settings)
}

/// A value as `--set` takes it.
fn setting(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// The batch of all shards that the file holds for a step.
fn batch(setup: &Setup, fixture: &SafeTensors<'_>, step: usize) -> Batch {
    let part = |name: &str, dtype: Dtype| {
        let tensor = fixture.tensor(name).unwrap();
        assert_eq!((tensor.dtype(), tensor.shape()[0]), (dtype, STEPS), "{name}");
        let len = tensor.data().len() / STEPS;
        tensor.data()[step * len..(step + 1) * len].to_vec()
    };
    let words = |name: &str| -> Vec<u16> {
        part(name, Dtype::U16).chunks_exact(2).map(|word| u16::from_le_bytes([word[0], word[1]])).collect()
    };
    let (rows, steps) = (setup.job.batch_size as usize, setup.data.seq_len);
    let lengths = match fixture.tensor("lengths") {
        Ok(_) => words("lengths").into_iter().map(u32::from).collect(),
        Err(_) => vec![steps as u32; rows],
    };
    // The tokens of each row, of which the file has as many as the longest row: its steps and `targets` more.
    let tokens = |targets: usize| {
        let tokens = words("tokens");
        let rows = tokens.chunks_exact(steps + targets).zip(&lengths);
        rows.flat_map(|(row, &length)| &row[..length as usize + targets]).copied().collect()
    };
    let inputs = match setup.job.task {
        Task::Chars => Inputs::Tokens(tokens(1)),
        Task::Classify => Inputs::LabelledTokens { tokens: tokens(0), labels: words("labels") },
        Task::Rows => Inputs::Bytes { bytes: part("bytes", Dtype::U8), labels: words("labels") },
    };
    let work = Work::Train { step: step as u64, epoch: 0, index: step as u64 };
    let batch = setup.batch_of(work, (0..rows as u64).collect(), inputs);
    Batch { lengths, ..batch }
}

fn floats(fixture: &SafeTensors<'_>, prefix: &str, name: &str) -> (Vec<usize>, Vec<f32>) {
    let tensor = fixture.tensor(&format!("{prefix}.{name}")).unwrap();
    assert_eq!(tensor.dtype(), Dtype::F32, "{prefix}.{name}");
    let values =
        tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    (tensor.shape().to_vec(), values)
}

fn doubles(fixture: &SafeTensors<'_>, name: &str) -> Vec<f64> {
    let tensor = fixture.tensor(name).unwrap();
    assert_eq!(tensor.dtype(), Dtype::F64, "{name}");
    tensor.data().chunks_exact(8).map(|b| f64::from_le_bytes(std::array::from_fn(|i| b[i]))).collect()
}
