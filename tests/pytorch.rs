//! PyTorch's weights give PyTorch's answers: files that `scripts/check-pytorch --write-fixtures` made with torch, put
//! into a run by the command line and read by the network.

mod common;
#[allow(dead_code, reason = "its main is for the command line")]
#[path = "../examples/logits.rs"]
mod logits;

use std::path::Path;

use common::{Folder, Process, lockstep};
use logits::{Step, logits};

/// The largest difference allowed, as a share of the largest logit.
const LIMIT: f32 = 1e-5;

/// The part of a fixture's JSON that says what torch answered.
#[derive(serde::Deserialize)]
struct Answers {
    /// Words of the command line that say what network it is.
    job: String,
    /// The characters of the text that its tokens are of; none for images.
    characters: Option<String>,
    inputs: Vec<Step>,
    logits: Vec<Vec<f32>>,
}

#[test]
fn imported_weights_give_torchs_logits() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pytorch");
    let folder = Folder::new();
    for name in ["rnn", "lstm", "gru", "rows"] {
        let json = std::fs::read_to_string(fixtures.join(format!("{name}.json"))).unwrap();
        let answers: Answers = serde_json::from_str(&json).unwrap();
        let mut command = lockstep();
        let run_dir = folder.path().join(name);
        command.arg("import").arg(fixtures.join(format!("{name}.safetensors")));
        command.args(answers.job.split_whitespace()).arg("--run-dir").arg(&run_dir);
        if let Some(characters) = &answers.characters {
            let text = folder.path().join(format!("{name}.txt"));
            std::fs::write(&text, characters.repeat(500)).unwrap();
            command.arg("--data").arg(text);
        }
        Process::start(&mut command).end().expect_exit(0);

        let ours = logits(&run_dir, &answers.inputs).unwrap();
        let pairs = ours.iter().flatten().zip(answers.logits.iter().flatten());
        let largest = answers.logits.iter().flatten().fold(0.0_f32, |most, x| most.max(x.abs()));
        let difference = pairs.fold(0.0_f32, |most, (a, b)| most.max((a - b).abs()));
        println!("{name}: largest difference {difference:e} of {largest}");
        assert_eq!(ours.len(), answers.logits.len());
        assert!(largest > 0.1 && difference <= LIMIT * largest, "{name}: {difference:e} of {largest}");
    }
}
