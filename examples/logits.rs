//! Prints what a trained network answers, for comparison with other programs:
//!
//! ```text
//! cargo run --example logits -- RUN_DIR|CHECKPOINT < inputs.json
//! ```
//!
//! The input is a JSON array with what is read at each step: a token id, or an array of bytes. The output is one of
//! the same length with the logits after each step.

use std::path::Path;

use coordinator::store::load::load;
use kernels::Simd;
use model::cpu::CpuDevice;
use model::device::{Device, StepInput};
use protocol::problem::Problem;

/// What is read at one step.
#[derive(Debug, Clone, serde::Deserialize)]
#[serde(untagged)]
pub(crate) enum Step {
    Token(u32),
    Bytes(Vec<u8>),
}

/// The logits after each step, `[T][V]`, from a recurrent state of zeros.
pub(crate) fn logits(path: &Path, steps: &[Step]) -> Result<Vec<Vec<f32>>, Problem> {
    let checkpoint = load(path)?.checkpoint;
    let layout = checkpoint.image.layout().clone();
    let parameters = checkpoint.image.parameters();
    let failed = |error: model::device::DeviceError| Problem::failed(error.to_string());
    let classes = layout.shape.classes;
    let mut device = CpuDevice::new(Simd::detect(), 1, layout, &checkpoint.job, false).map_err(failed)?;
    let mut reader = device.reader(&parameters).map_err(failed)?;
    let mut answers = Vec::new();
    for step in steps {
        let input = match step {
            Step::Token(token) => StepInput::Token(*token),
            Step::Bytes(bytes) => StepInput::Bytes(bytes),
        };
        let mut answer = vec![0.0; classes];
        device.read(&mut reader, input, &mut answer).map_err(failed)?;
        answers.push(answer);
    }
    Ok(answers)
}

fn main() {
    let path = std::env::args_os().nth(1).expect("the first argument is a run directory or a checkpoint");
    let steps: Vec<Step> =
        serde_json::from_reader(std::io::stdin()).expect("standard input is a JSON array of steps");
    let answers = logits(Path::new(&path), &steps).unwrap_or_else(|problem| panic!("{problem}"));
    println!("{}", serde_json::to_string(&answers).expect("numbers can be written as JSON"));
}
