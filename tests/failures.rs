//! Whatever dies, the run goes on with the same bits; what cannot go on is said in a sentence with an exit code, and the
//! run directory can be gone on with.

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

/// The run has ended as if nobody had disturbed it, with every step on record once.
fn assert_undisturbed(folder: &Folder, run: &Run, job: &str, schedule: &str) {
    let undisturbed = folder.run("undisturbed", job).train(&format!("{schedule} --workers 1"));
    assert_eq!(run.hashes(), undisturbed);
    assert_eq!(run.metric_steps("step"), Vec::from_iter(1..=undisturbed.step));
}

#[test]
fn a_killed_worker_is_replaced_and_changes_no_bit() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    let mut process = run.start("--steps 1500 --workers 3");
    process.line_with("generation 1: 3 workers share 8 shards");
    wait_for_steps(&run, 50);
    kill(child_with(&process, "--name worker-2"));
    process.line_with("worker worker-2 was lost: ");
    process.line_with("generation 2: 2 workers share 8 shards");
    process.line_with("generation 3: 3 workers share 8 shards");
    process.end().expect_exit(0);
    assert_undisturbed(&folder, &run, &job(&folder), "--steps 1500");
}

#[test]
fn a_run_that_loses_all_its_workers_goes_on_from_the_disk() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    let mut process = run.start("--steps 1500 --workers 2");
    process.line_with("generation 1");
    wait_for_steps(&run, 200);
    let fleet = children_of(process.pid());
    fleet.iter().filter(|(_, line)| line.contains("--name worker-")).for_each(|(pid, _)| kill(*pid));
    process.line_with("2 workers share 8 shards");
    process.end().expect_exit(0);
    assert_undisturbed(&folder, &run, &job(&folder), "--steps 1500");
}

#[test]
fn a_fleet_of_1_then_4_then_2_then_3_workers_computes_the_same_from_the_same_rows() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    let mut coordinator = Coordinator::start(&run, "--steps 3000 --workers 1", None);
    let here = folder.empty("worker");
    let mut workers = vec![coordinator.worker(&here, "--name first")];
    coordinator.process.line_with("generation 1: 1 worker has 8 shards");
    for name in ["second", "third", "fourth"] {
        workers.push(coordinator.worker(&here, &format!("--name {name}")));
    }
    coordinator.process.line_with("4 workers share 8 shards");
    wait_for_steps(&run, run.steps_so_far() + 20);
    // The first holds the run's state longest; it goes too.
    drop(workers.drain(..2));
    coordinator.process.line_with("worker first was lost: ");
    coordinator.process.line_with("worker second was lost: ");
    coordinator.process.line_with("2 workers share 8 shards");
    wait_for_steps(&run, run.steps_so_far() + 20);
    workers.push(coordinator.worker(&here, "--name fifth"));
    let grown = eventually("a third generation of that size", || {
        let formed = coordinator.process.output();
        let sizes: Vec<_> = formed.lines().filter_map(|line| line.split_once(" share 8 shards")).collect();
        sizes.last().is_some_and(|(line, _)| line.ends_with("3 workers")).then(|| run.steps_so_far())
    });
    assert!(grown < 3000, "the run was over before the fleet had grown again");
    coordinator.process.line_with("done: 3000 steps");
    for process in workers.into_iter().chain([coordinator.process]) {
        process.end().expect_exit(0);
    }
    assert_undisturbed(&folder, &run, &job(&folder), "--steps 3000");
    let audit = Process::start(lockstep().args(["inspect", "--audit"]).arg(run.dir())).end();
    audit.expect_exit(0);
    let passed =
        "audit: 3,000 steps, 192,000 rows: each step used exactly the rows that job and data prescribe";
    assert_eq!(audit.stdout.lines().last(), Some(passed));
}

#[test]
fn a_worker_that_is_stopped_is_taken_for_lost() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    let mut process = run.start(&format!("{ENDLESS} --workers 3"));
    process.line_with("generation 1");
    wait_for_steps(&run, 50);
    let pid = child_with(&process, "--name worker-3");
    kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::STOP).unwrap();
    let stopped = Instant::now();
    let line = process.line_with("worker worker-3 was lost: nothing came from it for 5 s");
    let steps = run.steps_so_far();
    wait_for_steps(&run, steps + 1);
    println!("{line}; the next step was done {:?} after the stop", stopped.elapsed());
    assert!(stopped.elapsed() < Duration::from_secs(10), "{:?}", stopped.elapsed());
    process.signal(Signal::TERM);
    process.end().expect_exit(75);
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
    process.end().expect_exit(0);
    let journal = std::fs::read_to_string(run.dir().join("journal")).unwrap();
    let line_of = |words: &str| journal.lines().position(|line| line.contains(words)).unwrap();
    let second = line_of("\"generation\":2");
    assert!(
        line_of("\"step\":9") < second && second < line_of("\"evaluation\""),
        "the kill was not in the evaluation"
    );
    assert_undisturbed(&folder, &run, &job, "--epochs 3");
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
fn inspect_says_what_is_missing() {
    let folder = Folder::new();
    let inspect = |dir: &std::path::Path| Process::start(lockstep().arg("inspect").arg(dir)).end();
    inspect(&folder.path().join("nothing")).expect_failure(2, &["there is no directory", "hint: "]);
    inspect(folder.path()).expect_failure(2, &["is not a run directory", "hint: "]);
}
