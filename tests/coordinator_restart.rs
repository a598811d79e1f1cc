//! A coordinator that is killed and started again takes its workers back: no step is lost, none is on record twice, and
//! the run ends as if nobody had disturbed it.

mod common;

use std::collections::HashSet;
use std::time::Duration;

use common::{
    Coordinator, Folder, Process, Run, children_of, eventually, is_alive, skipped, with_own_mounts,
};
use rustix::process::{Pid, Signal, kill_process};

/// An epoch has few steps: whatever is killed, one ends soon after.
fn job(folder: &Folder) -> String {
    let text = folder.text(4_500);
    format!(
        "char-lstm --data {text} --set hidden_size=32 --set seq_len=10 --set keep_prob=0.8 --set sample_chars=8 \
         --set checkpoint_seconds=1"
    )
}

const BACK: &str = "workers are back and go on";

/// Enough that a run does not end before it was disturbed.
const LENGTH: &str = "--steps 1500";

fn wait_for_steps(run: &Run, steps: u64) {
    eventually(format!("step {steps}"), || (run.steps_so_far() >= steps).then_some(()));
}

fn child_with(parent: &Process, words: &str) -> Option<u32> {
    children_of(parent.pid()).iter().find(|(_, line)| line.contains(words)).map(|(pid, _)| *pid)
}

fn coordinator_of(train: &Process) -> u32 {
    eventually("a coordinator", || child_with(train, "lockstep coordinator"))
}

fn kill(pid: u32) {
    kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::KILL).unwrap();
}

/// The run has ended like one that nobody disturbed: hashes, numbers of every step and epoch, texts, ledger.
fn assert_undisturbed(folder: &Folder, run: &Run, length: &str) {
    let undisturbed = folder.run("undisturbed", &job(folder));
    let expected = undisturbed.train(&format!("{length} --workers 1"));
    assert_eq!(run.hashes(), expected);
    let (ours, theirs) = (run.metric_lines(), undisturbed.metric_lines());
    assert_eq!(ours.len(), theirs.len());
    ours.iter().zip(&theirs).for_each(|(our, their)| assert_eq!(our, their));
    run.audit().expect_exit(0);
}

/// The ledger has each step once: nothing was done again.
fn assert_nothing_done_twice(run: &Run) {
    let journal = std::fs::read_to_string(run.dir().join("journal")).unwrap();
    let steps: Vec<&str> = journal.lines().filter(|line| line.contains(r#""kind":"step""#)).collect();
    assert_eq!(steps.len() as u64, run.hashes().step);
    assert_eq!(steps.iter().collect::<HashSet<_>>().len(), steps.len());
    assert!(!journal.contains("rewind"), "{journal}");
}

#[test]
fn a_killed_coordinator_takes_its_workers_back_and_changes_nothing() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    let mut process = run.start(&format!("{LENGTH} --workers 3"));
    wait_for_steps(&run, 50);
    kill(coordinator_of(&process));
    process.line_with("the coordinator was lost (signal: 9");
    process.line_with("generation 1: all 3 workers are back and go on");
    process.end().expect_exit(0);
    assert_nothing_done_twice(&run);
    assert_undisturbed(&folder, &run, LENGTH);
}

#[test]
fn workers_hold_on_while_their_coordinator_is_down() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    let options = format!("{LENGTH} --workers 2");
    let coordinator = Coordinator::start(&run, &options, None);
    let here = folder.empty("worker");
    let workers = [coordinator.worker(&here, ""), coordinator.worker(&here, "")];
    wait_for_steps(&run, 40);
    let mut again = coordinator;
    again.process.signal(Signal::KILL);
    let steps = run.steps_so_far();
    let down = if std::env::var_os("LOCKSTEP_LONG").is_some() { 30 } else { 3 };
    std::thread::sleep(Duration::from_secs(down));
    assert!(workers.iter().all(|worker| is_alive(worker.pid())), "a worker has not held on");
    let mut back = again.start_again(&run, &options);
    back.process.line_with("generation 1: all 2 workers are back and go on");
    wait_for_steps(&run, steps + 1);
    for process in workers.into_iter().chain([back.process]) {
        process.end().expect_exit(0);
    }
    assert_nothing_done_twice(&run);
    assert_undisturbed(&folder, &run, LENGTH);
}

#[test]
fn a_coordinator_and_a_worker_die_together() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    let mut process = run.start(&format!("{LENGTH} --workers 3"));
    wait_for_steps(&run, 50);
    let worker = child_with(&process, "--name worker-2").unwrap();
    kill(coordinator_of(&process));
    kill(worker);
    // Whoever is left goes on from what it holds, not from the disk.
    process.line_with("generation 2: ");
    process.end().expect_exit(0);
    assert_nothing_done_twice(&run);
    assert_undisturbed(&folder, &run, LENGTH);
}

#[test]
fn a_coordinator_dies_twice() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    let mut process = run.start(&format!("{LENGTH} --workers 2"));
    wait_for_steps(&run, 50);
    let first = coordinator_of(&process);
    kill(first);
    // At once when it is there again, whatever it has come to.
    kill(eventually("another coordinator", || {
        child_with(&process, "lockstep coordinator").filter(|pid| *pid != first)
    }));
    process.line_with(BACK);
    process.end().expect_exit(0);
    assert_nothing_done_twice(&run);
    assert_undisturbed(&folder, &run, LENGTH);
}

#[test]
fn a_coordinator_dies_while_a_generation_forms() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    let mut process = run.start(&format!("{LENGTH} --workers 3"));
    wait_for_steps(&run, 50);
    kill(child_with(&process, "--name worker-2").unwrap());
    process.line_with("worker worker-2 was lost");
    kill(coordinator_of(&process));
    process.line_with("the coordinator was lost");
    process.end().expect_exit(0);
    assert_undisturbed(&folder, &run, LENGTH);
}

#[test]
fn when_everything_dies_the_same_command_goes_on_from_the_disk() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    let mut process = run.start(&format!("{LENGTH} --workers 2"));
    eventually("a checkpoint", || run.dir().join("latest").exists().then_some(()));
    let fleet = children_of(process.pid());
    process.signal(Signal::KILL);
    fleet.iter().for_each(|(pid, _)| kill(*pid));
    drop(process);
    let mut process = run.start(&format!("{LENGTH} --workers 3"));
    process.line_with("going on from ");
    process.end().expect_exit(0);
    assert_undisturbed(&folder, &run, LENGTH);
}

#[test]
fn a_coordinator_that_dies_again_and_again_is_given_up() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    let process = run.start("--epochs 1000000 --workers 2");
    wait_for_steps(&run, 20);
    let workers = children_of(process.pid());
    let mut last = 0;
    for _ in 0..4 {
        last = eventually("another coordinator", || {
            child_with(&process, "lockstep coordinator").filter(|pid| *pid != last)
        });
        kill(last);
    }
    let sentence = "error: the coordinator ended 4 times soon after its start or without a step of the run between; what went wrong first: \
                    the coordinator ended with signal: 9";
    process.end().expect_failure(1, &[sentence, "hint: start the same command again"]);
    for (pid, line) in workers {
        assert!(!is_alive(pid), "{line} lives on");
    }
}

#[test]
fn a_worker_gives_a_coordinator_up_that_does_not_come_back() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    let mut coordinator = Coordinator::start(&run, "--epochs 1000000 --workers 1", None);
    let worker = coordinator.worker(&folder.empty("worker"), "--park-timeout 1");
    wait_for_steps(&run, 5);
    coordinator.process.signal(Signal::KILL);
    worker
        .end()
        .expect_failure(75, &["error: the coordinator was lost (", "did not come back within 1 s", "hint: "]);
}

#[test]
fn a_coordinator_that_comes_back_to_a_folder_it_cannot_write_says_so_and_loses_nothing() {
    let folder = Folder::new();
    let (run, job) = (folder.run("run", &job(&folder)), job(&folder));
    std::fs::create_dir(run.dir()).unwrap();
    let change = folder.path().join("change");
    // Files that are open stay writable: whoever trains notices nothing.
    let script = format!(
        "$LOCKSTEP train {job} --epochs 1000000 --workers 2 --run-dir $DIR &
         until [ -e {change} ]; do sleep 0.05; done
         mount --bind $DIR $DIR && mount -o remount,bind,ro $DIR || exit 97
         echo changed; wait $!; echo code $?",
        change = change.display()
    );
    let Some(mut process) = with_own_mounts(&script, run.dir()) else {
        return skipped("coordinator_restart::a_folder_it_cannot_write", "this machine lets nobody mount");
    };
    eventually("a checkpoint", || run.dir().join("latest").exists().then_some(()));
    std::fs::write(change, "").unwrap();
    process.line_with("changed");
    let train = eventually("the supervisor", || child_with(&process, "lockstep train"));
    let coordinator = eventually("a coordinator", || {
        children_of(train).iter().find(|(_, line)| line.contains("lockstep coordinator")).map(|(pid, _)| *pid)
    });
    kill(coordinator);
    process.line_with("the coordinator was lost (signal: 9");
    let ended = process.end();
    let said = format!("{}{}", ended.stdout, ended.stderr);
    assert!(said.contains("Read-only file system") && said.contains("hint: choose a place"), "{said}");
    assert!(said.contains("code 1\n"), "{said}");
    let length = format!("--steps {}", run.steps_so_far() + 20);
    run.train(&format!("{length} --workers 1"));
    assert_undisturbed(&folder, &run, &length);
}
