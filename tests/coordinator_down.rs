//! A coordinator that is down for long. Its workers go on with the batches that they have, past an epoch's end, and wait for
//! the next; what they did they tell the coordinator that comes back.

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use common::{Coordinator, Event, Events, Folder, Run, eventually, is_alive};
use rustix::process::Signal;
use serde_json::Value;

/// An epoch has so many steps, and ends with an evaluation, a text and a checkpoint.
const EPOCH: u64 = 16;
/// The coordinator is killed while the workers compute the last step of their second epoch.
const KILLED_AT: u64 = 2 * EPOCH - 1;
const STEPS: u64 = 20 * EPOCH;

fn job(folder: &Folder) -> String {
    let text = folder.text(12_000);
    format!(
        "char-lstm --data {text} --set hidden_size=16 --set seq_len=10 --set keep_prob=0.8 --set sample_chars=8 \
         --set checkpoint_seconds=1 --steps {STEPS}"
    )
}

/// The `step` of each record of this kind in the ledger, in the order of the records.
fn ledger(run: &Run, kind: &str) -> Vec<u64> {
    let text = std::fs::read_to_string(run.dir().join("journal")).unwrap();
    // Each line is a checksum and JSON.
    let json = |line: &str| serde_json::from_str::<Value>(line.split_once(' ').unwrap().1).unwrap();
    let records = text.lines().map(json);
    records.filter(|record| record["kind"] == kind).map(|record| record["step"].as_u64().unwrap()).collect()
}

#[test]
fn a_coordinator_is_down_across_a_checkpoint_and_an_epochs_end() {
    let down = Duration::from_secs(if std::env::var_os("LOCKSTEP_LONG").is_some() { 30 } else { 3 });
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    let coordinator = Coordinator::start(&run, "--workers 2", None);
    let (here, events) = (folder.empty("worker"), Events::new(&folder, "events"));
    let (hold, passed) = (format!("compute@{KILLED_AT}:hold"), format!("epoch-end@{}:delay:1", 2 * EPOCH));
    let start = |name: &str| {
        let mut command = coordinator.worker_command(&here, &format!("--name {name}"));
        events.start_command(&mut command, &format!("{hold};{passed}"))
    };
    let workers = [start("w1"), start("w2")];
    let held = eventually("both workers hold", || Some(events.at(&hold)).filter(|held| held.len() == 2));
    // All batches that they have room for come meanwhile.
    std::thread::sleep(Duration::from_secs(1));
    let mut coordinator = coordinator;
    coordinator.process.signal(Signal::KILL);
    eventually("its end", || coordinator.process.has_ended().then_some(()));
    held.iter().for_each(Event::release);
    eventually("both past the epoch's end", || (events.at(&passed).len() == 2).then_some(()));
    std::thread::sleep(down);
    assert!(workers.iter().all(|worker| is_alive(worker.pid())), "a worker has not held on");
    assert_eq!(run.metric_steps("epoch"), [EPOCH], "nobody was there to put the second epoch on record");
    let mut back = coordinator.start_again(&run, "--workers 2");
    back.process.line_with("generation 1: all 2 workers are back and go on");
    for process in workers.into_iter().chain([back.process]) {
        process.end().expect_exit(0);
    }
    let steps: Vec<u64> = (1..=STEPS).collect();
    assert_eq!(run.metric_steps("step"), steps);
    assert_eq!(ledger(&run, "step"), steps);
    let epochs: Vec<u64> = (1..=STEPS / EPOCH).map(|epoch| epoch * EPOCH).collect();
    assert_eq!(run.metric_steps("epoch"), epochs);
    // The state of the epoch's end that passed is gone; the next that falls due is written.
    let checkpoints: BTreeSet<u64> = ledger(&run, "checkpoint").into_iter().collect();
    println!("checkpoints after {checkpoints:?} steps");
    assert!(checkpoints.range(2 * EPOCH..STEPS).next().is_some(), "{checkpoints:?}");
    run.audit().expect_exit(0);
    let undisturbed = folder.run("undisturbed", &job(&folder));
    assert_eq!(run.hashes(), undisturbed.train("--workers 1"));
    assert_eq!(run.metric_lines(), undisturbed.metric_lines());
}
