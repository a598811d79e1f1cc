//! The weights of other programs give their answers: files that `scripts/check-pytorch --write-fixtures` and
//! `tests/fixtures/tensorflow/make.py` made with PyTorch and TensorFlow, put into a run by the command line and read by the
//! network.

mod common;
#[allow(dead_code, reason = "its main is for the command line")]
#[path = "../examples/logits.rs"]
mod logits;

use std::path::Path;

use common::{Folder, Process, lockstep};
use logits::{Step, logits};

/// The largest difference allowed, as a share of the largest logit.
const LIMIT: f32 = 1e-5;

/// The part of a fixture's JSON that says what the other program answered.
#[derive(serde::Deserialize)]
struct Answers {
    /// Words of the command line that say what network it is.
    job: String,
    /// The characters of the text that its tokens are of; none for images.
    characters: Option<String>,
    inputs: Vec<Step>,
    logits: Vec<Vec<f32>>,
}

/// Imports `NAME.EXTENSION` of a folder of fixtures and compares its answers with those in `NAME.json`.
fn answers_are_theirs(program: &str, name: &str, extension: &str) {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(program);
    let folder = Folder::new();
    let json = std::fs::read_to_string(fixtures.join(format!("{name}.json"))).unwrap();
    let answers: Answers = serde_json::from_str(&json).unwrap();
    let mut command = lockstep();
    let run_dir = folder.path().join(name);
    command.arg("import").arg(fixtures.join(format!("{name}.{extension}")));
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
    println!("{program} {name}: largest difference {difference:e} of {largest}");
    assert_eq!(ours.len(), answers.logits.len());
    assert!(largest > 0.1 && difference <= LIMIT * largest, "{name}: {difference:e} of {largest}");
}

#[test]
fn weights_of_pytorch_give_its_logits() {
    for name in ["rnn", "lstm", "gru", "rows"] {
        answers_are_theirs("pytorch", name, "safetensors");
    }
}

/// What is bidirectional does not answer step by step; `src/warm_start/tests/tensorflow.rs` has it.
#[test]
fn arrays_of_tensorflow_give_its_logits() {
    for name in ["basic-rnn", "basic-lstm", "gru", "lstm", "keras-gru"] {
        answers_are_theirs("tensorflow", name, "npz");
    }
}

#[test]
fn what_a_file_of_arrays_does_not_say_can_be_said() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let folder = Folder::new();
    let text = folder.path().join("text.txt");
    std::fs::write(&text, "abcdefg\n".repeat(500)).unwrap();
    let arrays = fixtures.join("tensorflow/basic-lstm.npz");
    let words = |words: &str| {
        let mut command = lockstep();
        command.args(words.split_whitespace()).arg("--data").arg(&text);
        command.args("char-lstm --set hidden_size=6 --fresh --run-dir".split_whitespace());
        command.arg(folder.path().join("run"));
        Process::start(&mut command).end()
    };
    let hash_of = |options: &str| {
        words(&format!("import {} {options}", arrays.display())).expect_exit(0);
        let mut inspect = lockstep();
        inspect.args(["inspect", "--json"]).arg(folder.path().join("run"));
        let json: serde_json::Value =
            serde_json::from_str(&Process::start(&mut inspect).end().stdout).unwrap();
        json["parameter_sha256"].as_str().unwrap().to_owned()
    };
    let default = hash_of("");
    assert_eq!(hash_of("--forget-bias 1 --gates tf1"), default);
    assert_ne!(hash_of("--forget-bias 0"), default);
    // Haste has the same order, and no bias but the stored one.
    assert_eq!(hash_of("--gates haste --forget-bias=1.0"), default);
    assert_ne!(hash_of("--gates keras --forget-bias 1"), default);

    words(&format!("train --steps 1 --init-from {} --forget-bias=-0.5", arrays.display())).expect_exit(0);
    words("train --forget-bias 1")
        .expect_failure(2, &["are about a file to start from, but none is named", "--init-from FILE.npz"]);
    let torch = fixtures.join("pytorch/lstm.safetensors");
    words(&format!("import {} --gates tf1", torch.display()))
        .expect_failure(2, &["are about the arrays of a .npz file, and ", "leave them out"]);
    std::fs::write(folder.path().join("cut.npz"), &std::fs::read(&arrays).unwrap()[..1000]).unwrap();
    words(&format!("import {}", folder.path().join("cut.npz").display()))
        .expect_failure(2, &["cut.npz cannot be read as NumPy's arrays: ", "numpy.savez"]);
}
