//! How processes end: 0 done, 1 failed, 75 start me again, 93 do not; and that whoever is asked to stop does so in time.

mod common;

use std::time::{Duration, Instant};

use common::{Coordinator, Folder, Process, Run, children_of, eventually};
use rustix::process::{Pid, Signal, kill_process};

fn job(folder: &Folder) -> String {
    format!("char-lstm --data {} --set hidden_size=32 --set seq_len=10", folder.text(12_000))
}

fn wait_for_steps(run: &Run, steps: u64) {
    eventually(format!("step {steps}"), || (run.steps_so_far() >= steps).then_some(()));
}

/// A coordinator and two workers that were started by hand, training.
fn by_hand(folder: &Folder, run: &Run, options: &str) -> (Coordinator, [Process; 2]) {
    let coordinator = Coordinator::start(run, &format!("--workers 2 {options}"), None);
    let here = folder.empty("worker");
    let workers = ["first", "second"].map(|name| coordinator.worker(&here, &format!("--name {name}")));
    (coordinator, workers)
}

#[test]
fn every_signal_to_the_coordinator_or_to_one_worker_ends_all_with_75_and_a_state() {
    for signal in [Signal::TERM, Signal::USR1, Signal::INT] {
        for to_worker in [false, true] {
            let folder = Folder::new();
            let run = folder.run("run", &job(&folder));
            let (mut coordinator, mut workers) = by_hand(&folder, &run, "--epochs 1000000");
            wait_for_steps(&run, 20);
            if to_worker {
                workers[1].signal(signal)
            } else {
                coordinator.process.signal(signal)
            }
            let ended = coordinator.process.end();
            ended.expect_exit(75);
            assert!(ended.stdout.contains("the same command goes on from there"), "{}", ended.stdout);
            workers.into_iter().for_each(|worker| worker.end().expect_exit(75));
            assert_eq!(run.hashes().step, run.steps_so_far(), "{signal:?}: the last state is not written");
        }
    }
}

#[test]
fn a_run_that_is_done_ends_all_with_0_also_if_it_is_asked_to_stop_behind_its_last_step() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    let (coordinator, workers) = by_hand(&folder, &run, "--steps 20");
    workers.into_iter().for_each(|worker| worker.end().expect_exit(0));
    coordinator.process.end().expect_exit(0);
    // There is nothing left to do, so nothing to stop.
    run.end("--steps 20").expect_exit(0);
}

#[test]
fn a_failure_that_would_come_again_ends_all_with_93() {
    let folder = Folder::new();
    let run = folder.run("run", &format!("{} --set learning_rate=3e38 --set clip=none", job(&folder)));
    let (coordinator, workers) = by_hand(&folder, &run, "--epochs 9");
    for process in workers.into_iter().chain([coordinator.process]) {
        process.end().expect_failure(93, &["is not finite (loss "]);
    }
    run.end("--epochs 9 --workers 1")
        .expect_failure(93, &["is not finite (loss ", "hint: start over with --fresh"]);
}

/// A driver, or a compiler of kernels, may take its time.
#[cfg(feature = "failpoints")]
#[test]
fn a_worker_that_still_opens_its_device_ends_at_once_when_it_is_asked_to() {
    let folder = Folder::new();
    let (run, events) = (folder.run("run", &job(&folder)), common::Events::new(&folder, "events"));
    let coordinator = Coordinator::start(&run, "--workers 1 --steps 20", None);
    let here = folder.empty("worker");
    let mut slow = events.start_command(&mut coordinator.worker_command(&here, ""), "open@0:hang");
    events.wait("open@0:hang");
    let asked = Instant::now();
    slow.signal(Signal::TERM);
    slow.end().expect_exit(75);
    assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
    // The run waits for another.
    coordinator.worker(&here, "").end().expect_exit(0);
    coordinator.process.end().expect_exit(0);
}

#[test]
fn a_drain_that_takes_too_long_is_cut_short() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    // So that what is saved is not what was done last.
    let mut process = run.start("--epochs 1000000 --workers 2 --drain-timeout 1");
    eventually("a checkpoint", || run.dir().join("latest").exists().then_some(()));
    for (pid, line) in children_of(process.pid()) {
        if line.contains("--name worker-") {
            kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::STOP).unwrap();
        }
    }
    let asked = Instant::now();
    process.signal(Signal::TERM);
    process.line_with("the last state was not written within the 1 s of --drain-timeout: stopping at once");
    let ended = process.end();
    println!("it had ended {:?} after the signal", asked.elapsed());
    ended.expect_exit(75);
    assert!(asked.elapsed() < Duration::from_secs(60), "{:?}", asked.elapsed());
    let steps = format!("--steps {}", run.steps_so_far() + 20);
    assert_eq!(run.train(&steps), folder.run("undisturbed", &job(&folder)).train(&steps));
}

#[test]
fn a_second_signal_ends_at_once() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    let mut process = run.start("--epochs 1000000 --workers 2 --drain-timeout 86400");
    eventually("a checkpoint", || run.dir().join("latest").exists().then_some(()));
    for (pid, line) in children_of(process.pid()) {
        if line.contains("--name worker-") {
            kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::STOP).unwrap();
        }
    }
    process.signal(Signal::TERM);
    process.line_with("stopping after this step (once more: stop at once)");
    process.signal(Signal::TERM);
    process.end().expect_exit(75);
}

#[test]
fn whoever_was_asked_to_stop_does_not_linger() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    let mut process = run.start("--epochs 1000000 --workers 1 --linger 86400");
    wait_for_steps(&run, 20);
    process.signal(Signal::TERM);
    process.end().expect_exit(75);
}
