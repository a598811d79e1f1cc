//! `lockstep-cuda-source`: the CUDA C++ of every kernel, as JSON, one object a line. It takes the steps of all presets
//! and options on a device that only keeps the kernels' source; `scripts/cuda-check` compiles what this prints.

use benches::workload::Workload;
use cubecl::Runtime;
use cubecl::future::block_on;
use kernels::cube::guard::abort_on_device_panic;
use kernels::cube::roofline;
use kernels::cube::source::{Architecture, KernelSource, Launches, SourceDevice, SourceRuntime, launched};
use model::cube::CubeBackend;
use model::device::{Backend, Device, Pass, Result, StepInput, Update};
use protocol::job::{Precision, presets};
use protocol::layout::Input;
use protocol::tree::TreeNode;
use serde_json::json;
use worker::replica::Replica;
use worker::train::summed_nodes;

/// Beside the presets: each option of a cell, each way in which rows come and go, each rule of an update, and operands of fewer
/// bits.
const OPTIONS: [(&str, &str); 21] = [
    ("mnist-rnn", "activation=relu"),
    ("mnist-rnn", "bidirectional=true"),
    ("mnist-rnn", "optimizer=sgd"),
    ("mnist-rnn", "clip=shard"),
    ("mnist-lstm", "peepholes=true"),
    ("mnist-lstm", "cell_clip=3"),
    ("mnist-lstm", "peepholes=true cell_clip=3"),
    ("mnist-lstm", "recurrent_activation=hard_sigmoid"),
    ("mnist-lstm", "projection=50"),
    ("mnist-lstm", "bidirectional=true num_layers=2 keep_prob=0.5 variational_dropout=true"),
    ("mnist-gru", "reset=before"),
    ("mnist-gru", "recurrent_activation=hard_sigmoid"),
    ("char-gru", "embedding_size=16 keep_prob=0.5"),
    ("char-lstm", "hidden_size=1024 seq_len=2"),
    ("char-lstm", "precision=tf32"),
    ("char-lstm", "precision=bf16"),
    ("char-lstm-512", "precision=bf16"),
    ("char-gru", "precision=bf16"),
    ("mnist-rnn", "precision=bf16"),
    ("mnist-lstm", "precision=bf16 projection=50"),
    ("mnist-gru", "precision=bf16 reset=before"),
];

fn main() {
    abort_on_device_panic();
    if let Err(error) = launch_all() {
        eprintln!("lockstep-cuda-source: {error}");
        std::process::exit(1);
    }
    for KernelSource { architecture, entry, id, units, shared_bytes, text } in launched() {
        let object = json!({
            "architecture": architecture.name(),
            "entry": entry,
            "id": id,
            "units": units,
            "shared_bytes": shared_bytes,
            "text": text,
        });
        println!("{object}");
    }
}

fn launch_all() -> Result<()> {
    for architecture in Architecture::ALL {
        let device = SourceDevice { architecture, launches: Launches::Kept };
        let client = SourceRuntime::client(&device);
        for precision in [Precision::F32, Precision::Bf16, Precision::Tf32] {
            roofline::multiply_add(&client, precision, 1, 1);
        }
        let buffer = client.empty(4 * size_of::<f32>());
        roofline::copy(&client, &buffer, &buffer, 4);
        let backend = CubeBackend::<SourceRuntime>::new(device, architecture.name().to_owned());
        let presets = presets().into_iter().map(|(name, _)| (name, String::new()));
        let options = OPTIONS.map(|(preset, settings)| (preset.to_owned(), settings.to_owned()));
        for (preset, settings) in presets.chain(options) {
            let settings: Vec<(String, String)> = settings
                .split_whitespace()
                .filter_map(|setting| setting.split_once('='))
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .collect();
            let workload = Workload::new(&preset, &settings)
                .unwrap_or_else(|problem| panic!("{preset} {settings:?}: {}", problem.sentence));
            call_everything(&backend, &workload)?;
        }
        block_on(client.sync()).expect("nothing is executed");
    }
    Ok(())
}

/// Every call that training and sampling make of a device. Its numbers are all zero, and nobody looks at them.
fn call_everything(backend: &CubeBackend<SourceRuntime>, workload: &Workload) -> Result<()> {
    let Workload { job, data, layout, .. } = workload;
    let mut device = backend.open(layout, job, data, true)?;
    let mut replica = Replica::initial(&device, layout.clone(), job)?;
    let Replica { parameters, first_moment, second_moment, state, next_state, .. } = &mut replica;
    device.step(Pass::Train { step: 1 }, parameters, workload.batch(1), state, next_state)?;
    let nodes: Vec<TreeNode> = summed_nodes(job, 0..job.shards);
    let mut sums = nodes.iter().map(|_| device.zeros(layout.parameters())).collect::<Result<Vec<_>>>()?;
    device.finish_buckets(0..layout.buckets().len(), &nodes, &mut sums)?;
    device.read_sums()?;
    let mut gradient = sums.swap_remove(0);
    device.clip_shard(&mut gradient, 1, 1.0)?;
    let other = device.zeros(layout.parameters())?;
    device.tree_add(&mut gradient, &other, 0..layout.parameters())?;
    device.mean_norm(&gradient, 1)?;
    let update = Update::new(job, 1, 1, job.learning_rate);
    device.update(&update, 1.0, &gradient, parameters, first_moment, second_moment)?;
    device.digest(parameters, 0)?;
    device.step(Pass::Evaluate, parameters, workload.batch(2), state, next_state)?;
    device.read_sums()?;
    if !layout.shape.bidirectional {
        let mut reader = device.reader(parameters)?;
        let bytes = match layout.shape.input {
            Input::Bytes(width) => Some(vec![0; width]),
            _ => None,
        };
        let input = bytes.as_deref().map_or(StepInput::Token(0), StepInput::Bytes);
        device.read(&mut reader, input, &mut vec![0.0; layout.shape.classes])?;
    }
    Ok(())
}
