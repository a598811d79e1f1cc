//! A worker whose training thread hangs while its process lives is told from those that wait for it, and named.

mod common;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use common::{Events, Folder, Process, Run, files_below, lockstep};

fn job(folder: &Folder) -> String {
    let text = folder.text(12_000);
    format!("char-lstm --data {text} --set hidden_size=16 --set seq_len=10 --set keep_prob=0.8")
}

/// The dump of the generation that broke first.
fn dump(run: &Run) -> String {
    std::fs::read_to_string(run.dir().join("hangs/generation-00000001.txt")).unwrap()
}

/// Worker 2 of three hangs at this point after 100 steps; gives the coordinator's word about it.
fn hang(point: &str) -> String {
    let folder = Folder::new();
    let (run, events) = (folder.run("run", &job(&folder)), Events::new(&folder, "events"));
    let entry = format!("{point}@100:hang");
    let mut process = events.start(&run, "--steps 400 --workers 3", &format!("worker-2/{entry}"));
    assert_eq!(events.wait(&entry).step, 100);
    let since = Instant::now();
    let line = process.line_with("was lost: ");
    println!("{point}: after {:?}: {line}", since.elapsed());
    // 60 s are what silence among workers takes.
    assert!(since.elapsed() < Duration::from_secs(30), "{:?}", since.elapsed());
    assert!(line.contains("worker worker-2 was lost: its training thread hangs in "), "{line}");
    process.end().expect_exit(0);
    assert_eq!(run.hashes(), folder.run("undisturbed", &job(&folder)).train("--steps 400 --workers 1"));
    // Everybody's last steps are told, also those of the one that hangs.
    let dump = dump(&run);
    assert!(
        dump.starts_with("generation 1 broke after step 100: worker worker-2 was lost: its training"),
        "{dump}"
    );
    for worker in ["worker-1", "worker-2", "worker-3"] {
        assert!(dump.contains(&format!("\nworker {worker}: in ")), "{worker} is not in:\n{dump}");
    }
    line
}

#[test]
fn a_thread_that_hangs_in_its_work_is_named_with_its_phase_and_step() {
    assert!(hang("compute").contains("hangs in compute of step 101, for "));
}

#[test]
fn a_thread_that_does_not_enter_the_collective_is_named_and_not_those_that_wait() {
    let line = hang("reduce");
    assert!(line.contains("hangs in reduce of step 101") && line.contains("it entered "), "{line}");
}

#[test]
fn a_thread_that_does_not_take_its_batch_is_named() {
    assert!(hang("feed").contains("hangs in data of step 101, for "));
}

/// One bit of worker 2's moments turns after 60 steps; gives what the run said in the end.
fn flip(workers: u32, parted: &[&str]) {
    let folder = Folder::new();
    let (run, events) = (folder.run("run", &job(&folder)), Events::new(&folder, "events"));
    let options = format!("--epochs 1000000 --workers {workers}");
    let ended = events.start(&run, &options, "worker-2/update@60:flip").end();
    assert_eq!(events.at("update@60:flip")[0].step, 60);
    ended.expect_failure(1, &["error: the replicas differ after step ", " computed another state"]);
    let line = ended.stderr.lines().find(|line| line.starts_with("error: ")).unwrap();
    let (_, step) = line.split_once(" after step ").unwrap();
    let step: u64 = step.split(':').next().unwrap().parse().unwrap();
    assert!((61..=110).contains(&step), "{line}");
    assert!(parted.iter().any(|parted| line.contains(&format!(": {parted} computed another"))), "{line}");

    // Both states are there, of one step, and are no checkpoints.
    let files = files_below(&run.dir().join("diverged"));
    println!("{line}\n{files:?}");
    assert_eq!(files.len(), 2, "{files:?}");
    assert!(line.contains(run.dir().join("diverged").to_str().unwrap()), "{line}");
    let step_of = |file: &PathBuf| file.file_name().unwrap().to_str().unwrap()[..13].to_owned();
    assert_eq!(step_of(&files[0]), step_of(&files[1]));
    let diff = Process::start(lockstep().arg("diff").args(&files)).end();
    diff.expect_exit(1);
    assert!(diff.stdout.contains("differ"), "{}", diff.stdout);
    assert!(run.hashes().step <= 50, "a state after the fault was written");
    let steps = format!("--steps {} --workers 2", run.hashes().step + 100);
    assert_eq!(run.train(&steps), folder.run("undisturbed", &job(&folder)).train(&steps));
}

#[test]
fn a_bit_that_turns_in_one_replica_of_three_is_found_within_50_steps_and_both_states_are_kept() {
    flip(3, &["worker-2"]);
}

#[test]
fn a_bit_that_turns_in_one_replica_of_two_is_found_and_nobody_knows_in_which() {
    // In the order of their ranks, which is that of their coming.
    flip(2, &["worker-1 and worker-2", "worker-2 and worker-1"]);
}
