//! `diff` says whether two runs hold the same bits, and if not, where they part.

mod common;

use std::path::Path;

use common::{Ended, Folder, Process, Run, lockstep};
use coordinator::store::checkpoint::Checkpoint;
use coordinator::store::checkpoint_dir::CheckpointDir;
use coordinator::store::state::StateImage;
use serde_json::Value;

/// 16 steps are an epoch.
fn job(folder: &Folder) -> String {
    format!("char-gru --data {} --set hidden_size=8 --set seq_len=10", folder.text(12_000))
}

fn diff(a: &Path, b: &Path, options: &str) -> Ended {
    Process::start(lockstep().arg("diff").args([a, b]).args(options.split_whitespace())).end()
}

/// Exit code 1, this first line, and each of these lines.
fn assert_different(a: &Run, b: &Run, verdict: &str, parts: &[&str]) -> Value {
    let ended = diff(a.dir(), b.dir(), "");
    ended.expect_exit(1);
    assert_eq!(ended.stdout.lines().next(), Some(verdict), "{}", ended.stdout);
    for part in parts {
        assert!(ended.stdout.contains(part), "stdout lacks '{part}':\n{}", ended.stdout);
    }
    let ended = diff(a.dir(), b.dir(), "--json");
    ended.expect_exit(1);
    let json: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(json["bit_equal"], false);
    json
}

#[test]
fn runs_of_other_fleets_are_bit_equal() {
    let folder = Folder::new();
    let [a, b] = ["a", "b"].map(|name| folder.run(name, &job(&folder)));
    let hashes = a.train("--steps 20 --workers 1");
    b.train("--steps 10 --workers 2");
    b.train("--steps 20 --workers 3");
    let ended = diff(a.dir(), b.dir(), "");
    ended.expect_exit(0);
    let expected =
        format!("bit-equal: both hold the same state after step 20 (state_sha256 {})\n", hashes.state);
    assert_eq!(ended.stdout, expected);
    // A checkpoint on its own is as good.
    diff(&a.dir().join("latest"), b.dir(), "").expect_exit(0);
}

#[test]
fn one_bit_of_one_element_is_named() {
    let folder = Folder::new();
    let [a, b] = ["a", "b"].map(|name| folder.run(name, &job(&folder)));
    a.train("--steps 20 --workers 1");
    b.train("--steps 20 --workers 1");
    let checkpoint = Checkpoint::from_bytes(&b.checkpoint()).unwrap();
    let layout = checkpoint.image.layout().clone();
    let head = layout.tensors.iter().find(|tensor| tensor.name == "head.weight").unwrap();
    let float = head.range.start + 3 * 8 + 5;
    let before = f32::from_le_bytes(checkpoint.image.floats(float..float + 1).try_into().unwrap());
    let after = f32::from_bits(before.to_bits() ^ 1);
    let mut bytes = checkpoint.image.bytes().to_vec();
    bytes[4 * float..4 * float + 4].copy_from_slice(&after.to_le_bytes());
    let image = StateImage::new(&layout, bytes).unwrap();
    CheckpointDir::new(b.dir()).write(&Checkpoint { image, ..checkpoint }, 3).unwrap();

    let elements = 3 * layout.parameters() + layout.recurrent();
    let first = format!(
        "first difference: head.weight [3, 5]: {before:?} ({:#010x}) in A, {after:?} ({:#010x}) in B\n",
        before.to_bits(),
        after.to_bits()
    );
    let json = assert_different(
        &a,
        &b,
        "the states after step 20 differ, although the records of 20 steps are equal",
        &[&first, &format!("\n1 of {elements} elements differ\n")],
    );
    let difference = &json["states"]["difference"];
    assert_eq!(difference["largest"], difference["first"]);
    assert_eq!(difference["first"]["index"], serde_json::json!([3, 5]));
    let differing = |tensor: &Value| tensor["differing"].as_u64().unwrap();
    let tensors = difference["tensors"].as_array().unwrap();
    let differ: Vec<&Value> = tensors.iter().filter(|tensor| differing(tensor) > 0).collect();
    assert_eq!((differ.len(), &differ[0]["name"]), (1, &Value::from("head.weight")));
    assert_eq!(tensors.last().unwrap()["name"], "recurrent_state");
}

#[test]
fn other_seeds_part_at_the_first_step() {
    let folder = Folder::new();
    let [a, b] = ["a", "b"].map(|name| folder.run(name, &job(&folder)));
    a.train("--steps 20 --workers 1");
    b.train("--steps 20 --workers 1 --seed 2");
    let json = assert_different(
        &a,
        &b,
        "A and B part at step 1",
        &["\nseed ", "\ntrain_loss, step 1 ", "\ngrad_norm, step 1 "],
    );
    assert_eq!(json["job"], serde_json::json!([{"name": "seed", "a": "1", "b": "2"}]));
    assert_eq!(json["states"]["kind"], "different");
    let tensors = json["states"]["difference"]["tensors"].as_array().unwrap();
    assert!(tensors.iter().all(|tensor| tensor["differing"].as_u64() > Some(0)), "{tensors:#?}");
}

#[test]
fn a_longer_run_is_equal_as_far_as_the_shorter_goes() {
    let folder = Folder::new();
    let [long, short] = ["long", "short"].map(|name| folder.run(name, &job(&folder)));
    long.train("--steps 40 --workers 2");
    short.train("--steps 16 --workers 1");
    let json = assert_different(
        &long,
        &short,
        "B is equal to A as far as it goes: step 16 (states compared after step 16)",
        &["recorded steps  40", "after step 16"],
    );
    assert_eq!(json["records"], serde_json::json!({"recorded": [40, 16], "common": 16, "parted": null}));
    assert_eq!(json["states"], serde_json::json!({"kind": "equal", "step": 16}));
}

#[test]
fn networks_of_other_shapes_are_not_compared() {
    let folder = Folder::new();
    let [a, b] = ["a", "b"].map(|name| folder.run(name, &job(&folder)));
    a.train("--steps 3 --workers 1");
    b.train("--steps 3 --workers 1 --set hidden_size=9");
    assert_different(
        &a,
        &b,
        "A and B part at step 1",
        &["\nhidden_size ", "\nThe states cannot be compared: rnn.weight_ih_l0 is [24, ", " in A and [27, "],
    );
}

#[test]
fn what_is_no_run_is_refused_with_a_hint() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    run.train("--steps 3 --workers 1");
    diff(run.dir(), &folder.path().join("nothing"), "")
        .expect_failure(2, &["there is no directory", "hint: "]);
    diff(Path::new(&folder.text(12_000)), run.dir(), "")
        .expect_failure(2, &["text-12000.txt is not a usable checkpoint: not a safetensors file", "hint: "]);
}
