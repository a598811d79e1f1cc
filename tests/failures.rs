//! What breaks is said in a sentence with an exit code, and the run directory can be gone on with.

mod common;

use std::time::{Duration, Instant};

use common::{Coordinator, Folder, Process, Run, children_of, eventually, is_alive, lockstep};
use rustix::process::{Pid, Signal, kill_process};

/// 16 steps are an epoch.
fn job(folder: &Folder) -> String {
    let text = folder.text(12_000);
    format!("char-lstm --data {text} --set hidden_size=32 --set seq_len=10 --set keep_prob=0.8")
}

/// More than any test waits for.
const ENDLESS: &str = "--epochs 1000000";

/// Waits until the run has done so many steps.
fn wait_for_steps(run: &Run, steps: u64) {
    eventually(format!("step {steps}"), || (run.steps_so_far() >= steps).then_some(()));
}

/// The process that `parent` has started with these words in its command line.
fn child_with(parent: &Process, words: &str) -> u32 {
    let children = children_of(parent.pid());
    let child = children.iter().find(|(_, line)| line.contains(words));
    child.unwrap_or_else(|| panic!("no child has '{words}': {children:#?}")).0
}

fn kill(pid: u32) {
    kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::KILL).unwrap();
}

/// Goes on to 40 steps after wherever it is, and compares with a run that nobody disturbed.
fn assert_resumable(folder: &Folder, run: &Run) {
    let steps = format!("--steps {} --workers 2", run.hashes().step + 40);
    let resumed = run.train(&steps);
    assert_eq!(resumed, folder.run("undisturbed", &job(folder)).train(&steps));
    assert_eq!(run.metric_steps("step"), Vec::from_iter(1..=resumed.step));
}

#[test]
fn a_killed_worker_ends_the_run_by_name_and_the_run_can_go_on() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    let mut process = run.start(&format!("{ENDLESS} --workers 3"));
    process.line_with("generation 1");
    wait_for_steps(&run, 50);
    let fleet = children_of(process.pid());
    assert_eq!(fleet.len(), 4, "{fleet:#?}");
    kill(child_with(&process, "--name worker-2"));
    let killed = Instant::now();
    let ended = process.end();
    println!("the run ended {:?} after the kill:\n{}", killed.elapsed(), ended.stderr);
    ended.expect_failure(1, &["error: worker worker-2 was lost: ", "hint: start the same command again"]);
    assert!(killed.elapsed() < Duration::from_secs(20), "{:?}", killed.elapsed());
    for (pid, line) in fleet {
        assert!(!is_alive(pid), "{line} lives on");
    }
    assert_resumable(&folder, &run);
}

#[test]
fn an_evaluation_that_was_cut_off_is_made_up_for() {
    let folder = Folder::new();
    // 9 steps are an epoch, and its evaluation is 84 batches: the kill lands in it.
    let text = folder.text(60_000);
    let job = format!(
        "char-lstm --data {text} --set hidden_size=96 --set seq_len=10 --set validation_fraction=0.9"
    );
    let run = folder.run("run", &job);
    let process = run.start("--epochs 3 --workers 2");
    wait_for_steps(&run, 9);
    kill(child_with(&process, "--name worker-2"));
    process.end().expect_failure(1, &["error: worker worker-2 was lost: "]);
    println!("killed after the evaluations of steps {:?}", run.metric_steps("epoch"));
    let resumed = run.train("--epochs 3 --workers 2");
    assert_eq!(resumed, folder.run("undisturbed", &job).train("--epochs 3 --workers 1"));
    assert_eq!(run.metric_steps("epoch"), [9, 18, 27]);
}

#[test]
fn a_worker_killed_before_the_run_begins_is_named() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    let mut coordinator = Coordinator::start(&run, "--epochs 1 --workers 2", None);
    let here = folder.empty("worker");
    let lost = coordinator.worker(&here, "--name early");
    eventually("the first worker", || {
        common::get(&coordinator.http, "/status.json").body.contains("\"early\"").then_some(())
    });
    drop(lost);
    // Two others are enough.
    let workers = [coordinator.worker(&here, ""), coordinator.worker(&here, "")];
    coordinator.process.line_with("done: 16 steps");
    for process in workers.into_iter().chain([coordinator.process]) {
        process.end().expect_exit(0);
    }
    assert_eq!(run.hashes().step, 16);
}

#[test]
fn a_killed_supervisor_takes_its_children_along() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    let mut process = run.start(&format!("{ENDLESS} --workers 2"));
    process.line_with("generation 1");
    wait_for_steps(&run, 20);
    let fleet = children_of(process.pid());
    assert_eq!(fleet.len(), 3, "{fleet:#?}");
    process.signal(Signal::KILL);
    let killed = Instant::now();
    assert_eq!(process.end().signal(), Some(Signal::KILL.as_raw()));
    for (pid, line) in fleet {
        eventually(format!("the end of {line}"), || (!is_alive(pid)).then_some(()));
    }
    println!("the children were gone after {:?}", killed.elapsed());
    assert!(killed.elapsed() < Duration::from_secs(10), "{:?}", killed.elapsed());
    assert_resumable(&folder, &run);
}

#[test]
fn a_killed_coordinator_ends_its_workers_and_the_run_can_go_on() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    let mut process = run.start(&format!("{ENDLESS} --workers 2"));
    process.line_with("generation 1");
    // The first checkpoint of an undisturbed run is that of its first epoch.
    eventually("a checkpoint", || run.dir().join("latest").exists().then_some(()));
    let fleet = children_of(process.pid());
    kill(child_with(&process, "coordinator"));
    process.end().expect_failure(
        1,
        &["error: the coordinator was lost (signal: 9", "hint: start the same command again"],
    );
    for (pid, line) in fleet {
        assert!(!is_alive(pid), "{line} lives on");
    }
    assert_resumable(&folder, &run);
}

#[test]
fn inspect_says_what_is_missing() {
    let folder = Folder::new();
    let inspect = |dir: &std::path::Path| Process::start(lockstep().arg("inspect").arg(dir)).end();
    inspect(&folder.path().join("nothing")).expect_failure(2, &["there is no directory", "hint: "]);
    inspect(folder.path()).expect_failure(2, &["is not a run directory", "hint: "]);
}
