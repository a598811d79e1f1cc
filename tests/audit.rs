//! `inspect --audit` proves from the data alone which rows every step used; a run is gone on with only by what
//! computed it.

mod common;

use std::time::{Duration, Instant};

use common::{Ended, Folder, Meddling, Process, Rows, Run, lockstep, train_in_process};
use protocol::problem::Exit;
use serde_json::Value;

/// 16 steps are an epoch.
fn text_job(folder: &Folder) -> String {
    format!("char-gru --set data={} --set hidden_size=8 --set seq_len=10 --set epochs=0", folder.text(12_000))
}

/// 10 steps are an epoch.
const IMAGES_JOB: &str = "mnist-rnn --set hidden_size=8 --set train_samples=1500 --set epochs=0";

fn audit(run: &Run, options: &str) -> Ended {
    let mut command = lockstep();
    command.args(["inspect", "--audit"]).arg(run.dir()).args(options.split_whitespace());
    Process::start(&mut command).end()
}

/// Trains to the end with an honest worker and one that meddles.
fn train(run: &Run, steps: u64, rows: Rows) {
    let fleet = vec![Meddling::HONEST, Meddling { rows, ..Meddling::HONEST }];
    assert_eq!(train_in_process(run, &format!("--set steps={steps}"), fleet), Ok(Exit::Done), "{rows:?}");
}

#[test]
fn a_run_that_used_its_rows_passes() {
    let folder = Folder::new();
    let text = &*text_job(&folder);
    let lines = &*format!("{text} --set mode=lines --set batch_size=20");
    let fields = "classify-text --set hidden_size=4 --set epochs=0 --set validation_fraction=0.9";
    let cases =
        [(text, "35", "2,240"), (IMAGES_JOB, "23", "3,450"), (lines, "30", "600"), (fields, "40", "1,280")];
    for (job, steps, rows) in cases {
        let run = folder.run(&format!("run-{steps}"), job);
        // In the middle of an epoch another fleet goes on.
        run.train("--set steps=7 --workers 2");
        run.train(&format!("--set steps={steps} --workers 3"));
        let ended = audit(&run, "");
        ended.expect_exit(0);
        let expected = format!(
            "audit: {steps} steps, {rows} rows: each step used exactly the rows that job and data prescribe"
        );
        assert_eq!(ended.stdout.lines().last(), Some(&*expected));
    }
}

#[test]
fn a_row_that_one_worker_drops_or_repeats_is_found_with_its_step() {
    let folder = Folder::new();
    let cases = [
        (Rows::DropOneIn(5), -1, ": rows were dropped; 1 of 20 steps is bad"),
        (Rows::RepeatOneIn(17), 0, ": rows were repeated or exchanged; 1 of 20 steps is bad"),
    ];
    for (job, batch_size) in [(&*text_job(&folder), 64), (IMAGES_JOB, 150)] {
        for (rows, more, what) in cases {
            let (Rows::DropOneIn(step) | Rows::RepeatOneIn(step)) = rows else { unreachable!() };
            let run = folder.run(&format!("run-{batch_size}-{step}"), job);
            // All replicas agree, so nothing else notices.
            train(&run, 20, rows);
            let used = format!("error: audit: step {step} used {} rows with hash ", batch_size + more);
            audit(&run, "").expect_failure(1, &[&used, what, "hint: "]);

            let ended = audit(&run, "--json");
            ended.expect_exit(1);
            let json: Value = serde_json::from_str(&ended.stdout).unwrap();
            assert_eq!(json["audit"]["bad_steps"], 1);
            let bad = &json["audit"]["first_bad"];
            assert_eq!(
                (bad["step"].as_u64(), bad["expected"]["rows"].as_i64()),
                (Some(step), Some(batch_size))
            );
            assert_eq!(bad["found"]["rows"].as_i64(), Some(batch_size + more));
            assert_ne!(bad["found"]["row_hash"], bad["expected"]["row_hash"]);
        }
    }
}

#[test]
fn a_resume_keeps_what_was_done_and_a_rewind_drops_it() {
    let folder = Folder::new();
    let run = folder.run("run", &text_job(&folder));
    let bad = "error: audit: step 18 used 63 rows";
    train(&run, 20, Rows::DropOneIn(18));
    train(&run, 24, Rows::AsSent);
    audit(&run, "").expect_failure(1, &[bad, "1 of 24 steps is bad"]);

    // What comes after the first epoch's checkpoint is computed again, once with and once without the row.
    for (rows, step) in [(Rows::DropOneIn(18), 26), (Rows::AsSent, 28)] {
        for file in std::fs::read_dir(run.dir().join("checkpoints")).unwrap() {
            let path = file.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if name.starts_with("step-") && name != "step-00000016.safetensors" {
                std::fs::remove_file(path).unwrap();
            }
        }
        assert_eq!(run.hashes().step, 16);
        train(&run, step, rows);
        let ended = audit(&run, "");
        match rows {
            Rows::AsSent => ended.expect_exit(0),
            _ => ended.expect_failure(1, &[bad, "1 of 26 steps is bad"]),
        }
    }
    let undisturbed = folder.run("undisturbed", &text_job(&folder));
    assert_eq!(run.hashes(), undisturbed.train("--set steps=28 --workers 1"));
}

#[test]
fn only_the_runs_own_data_can_prove_anything() {
    let folder = Folder::new();
    let run = folder.run("run", &text_job(&folder));
    run.train("--set steps=3 --workers 1");
    let digest = std::fs::read_to_string(run.dir().join("data.toml")).unwrap();
    let digest = digest.split('"').nth(1).unwrap();
    let other = folder.text(12_001);
    let parts = [&*format!("the data '{other}' has digest "), &format!("was trained on {digest}"), "hint: "];
    audit(&run, &format!("--data {other}")).expect_failure(2, &parts);

    let moved = folder.path().join("moved.txt");
    std::fs::rename(folder.text(12_000), &moved).unwrap();
    audit(&run, "").expect_failure(2, &["there is no such file"]);
    audit(&run, &format!("--data {}", moved.display())).expect_exit(0);
}

#[test]
fn a_lost_line_of_the_ledger_is_found() {
    let folder = Folder::new();
    let run = folder.run("run", &text_job(&folder));
    run.train("--set steps=5 --workers 1");
    let journal = run.dir().join("journal");
    let lines = std::fs::read_to_string(&journal).unwrap();
    let kept: String =
        lines.split_inclusive('\n').filter(|line| !line.contains(r#""kind":"step","step":3,"#)).collect();
    assert!(kept.len() < lines.len());
    std::fs::write(&journal, kept).unwrap();
    audit(&run, "").expect_failure(1, &["the journal has no line for step 3, which must have used 64 rows"]);
}

#[test]
fn a_run_is_not_gone_on_with_by_a_build_that_computes_other_bits() {
    let folder = Folder::new();
    let run = folder.run("run", &text_job(&folder));
    let old = |count| vec![Meddling { bits: Some("cpu numerics 0"), ..Meddling::HONEST }; count];
    assert_eq!(train_in_process(&run, "--set steps=3", old(2)), Ok(Exit::Done));
    assert_eq!(run.inspect()["bits"], "cpu numerics 0");
    let (before, checkpoint) = (run.hashes(), run.checkpoint());

    let started = Instant::now();
    run.end("--set steps=6 --workers 2").expect_failure(
        1,
        &[
            "error: this run was computed with cpu numerics 0, worker worker-",
            " computes with cpu numerics 2: going on would change the result",
            "hint: build the version that wrote the run, or give --fresh to start over",
        ],
    );
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
    assert_eq!(run.hashes(), before);
    assert!(run.checkpoint() == checkpoint, "a refusal changes nothing");

    // The build that wrote it goes on, and any build starts over.
    assert_eq!(train_in_process(&run, "--set steps=6", old(1)), Ok(Exit::Done));
    assert_eq!(run.hashes().step, 6);
    run.train("--set steps=6 --workers 2 --fresh");
    assert_eq!(run.inspect()["bits"], "cpu numerics 2");
}
