//! A worker that is slower than the others is named, or given fewer shards, and changes nothing.

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use common::{Folder, Meddling, Run, train_in_process};
use protocol::problem::Exit;

/// Takes 40 s, because nobody is named before three windows have passed; a short run only has the same bits.
#[test]
fn a_slow_worker_is_named_and_changes_nothing() {
    let is_long = std::env::var_os("LOCKSTEP_LONG").is_some();
    let folder = Folder::new();
    let text = folder.text(12_000);
    let settings = format!("--set steps={} --set checkpoint_seconds=60", if is_long { 800 } else { 20 });
    let job = format!(
        "char-lstm --set data={text} --set hidden_size=16 --set seq_len=10 --set keep_prob=0.8 --set epochs=0"
    );
    let (run, undisturbed) = (folder.run("run", &job), folder.run("undisturbed", &job));
    let slow = Meddling { delay: Duration::from_millis(50), ..Meddling::HONEST };
    let quick = Meddling { delay: Duration::from_millis(10), ..Meddling::HONEST };
    assert_eq!(train_in_process(&run, &settings, vec![quick.clone(), slow, quick]).unwrap(), Exit::Done);
    assert_eq!(train_in_process(&undisturbed, &settings, vec![Meddling::HONEST]).unwrap(), Exit::Done);
    assert_eq!(run.hashes(), undisturbed.hashes());
    let journal = std::fs::read_to_string(run.dir().join("journal")).unwrap();
    let named =
        |name: &str| journal.matches(&format!("worker {name} is slow: for 30 s it has computed")).count();
    let expected = [0, usize::from(is_long), 0];
    assert_eq!(["worker-1", "worker-2", "worker-3"].map(named), expected, "{journal}");
}

/// Takes 25 s: shards are dealt anew after two windows of 10 s at the earliest. One of the two workers takes at least a quarter
/// of a second for each of the 100 steps, so some are left then, however slow the machine is.
#[test]
fn where_shards_are_dealt_by_speed_a_slow_worker_gets_fewer() {
    let folder = Folder::new();
    let text = folder.text(12_000);
    let job = format!(
        "char-lstm --set data={text} --set hidden_size=16 --set seq_len=10 --set keep_prob=0.8 --set epochs=0 \
         --set steps=100 --set checkpoint_seconds=60"
    );
    let (run, even) = (folder.run("run", &job), folder.run("even", &job));
    let slow = Meddling { delay: Duration::from_millis(250), ..Meddling::HONEST };
    let fleet = vec![Meddling::HONEST, slow];
    assert_eq!(train_in_process(&run, "--set balance=speed", fleet).unwrap(), Exit::Done);
    assert_eq!(train_in_process(&even, "--set balance=even", vec![Meddling::HONEST; 2]).unwrap(), Exit::Done);
    assert_eq!(run.hashes(), even.hashes());
    assert_eq!(shares(&even), [("worker-1".to_owned(), 4), ("worker-2".to_owned(), 4)].into());
    let shares = shares(&run);
    assert!(shares["worker-1"] > shares["worker-2"] && shares["worker-2"] > 0, "{shares:?}");
}

/// How many shards each worker of the last generation had, as the journal has it.
fn shares(run: &Run) -> BTreeMap<String, u64> {
    let journal = std::fs::read_to_string(run.dir().join("journal")).unwrap();
    let last = journal.lines().rfind(|line| line.contains("\"members\"")).unwrap();
    let record: serde_json::Value = serde_json::from_str(&last[last.find('{').unwrap()..]).unwrap();
    let share = |member: &serde_json::Value| {
        let bound = |at: usize| member["shards"][at].as_u64().unwrap();
        (member["name"].as_str().unwrap().to_owned(), bound(1) - bound(0))
    };
    let members = record["members"].as_array().or(record["generation"]["members"].as_array());
    members.unwrap().iter().map(share).collect()
}
