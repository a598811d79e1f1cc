//! How the workers' time goes in the steps of a profile.

mod common;

use std::collections::BTreeMap;

use common::Folder;
use serde_json::Value;

/// What the spans of one name are about, by worker: steps, in order.
fn steps_of(trace: &Value, phase: &str) -> BTreeMap<u64, Vec<u64>> {
    let mut steps: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    for event in trace["traceEvents"].as_array().unwrap() {
        if event["ph"] == "X" && event["name"] == phase {
            let (worker, step) = (event["pid"].as_u64().unwrap(), event["args"]["step"].as_u64().unwrap());
            steps.entry(worker).or_default().push(step);
        }
    }
    steps
}

fn names(trace: &Value, kind: &str, of: impl Fn(&Value) -> &Value) -> Vec<String> {
    let events = trace["traceEvents"].as_array().unwrap().iter().filter(|event| event["ph"] == kind);
    events.filter_map(|event| of(event).as_str().map(str::to_owned)).collect()
}

#[test]
fn a_profile_shows_the_phases_of_all_workers_and_changes_nothing() {
    let folder = Folder::new();
    let text = folder.text(12_000);
    let job = format!("char-lstm --data {text} --steps 12 --set hidden_size=16 --set seq_len=10");
    let (profiled, plain) = (folder.run("profiled", &job), folder.run("plain", &job));
    let said = profiled.start("--workers 2 --profile 3").end();
    said.expect_exit(0);
    plain.start("--workers 1").end().expect_exit(0);
    assert_eq!(profiled.hashes(), plain.hashes());

    let path = profiled.dir().join("profile.json");
    let sentence = format!("profile of steps 6 to 8: {}, for https://ui.perfetto.dev", path.display());
    assert!(said.stdout.contains(&sentence), "{}", said.stdout);
    let trace: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for phase in ["compute", "reduce", "update"] {
        let steps: Vec<_> = steps_of(&trace, phase).into_values().collect();
        assert_eq!(steps, [[6, 7, 8], [6, 7, 8]], "{phase}: {trace:#}");
    }
    let mut workers = names(&trace, "M", |event| &event["args"]["name"]);
    workers.sort();
    assert_eq!(workers, ["worker worker-1", "worker worker-2"]);
    let buckets = names(&trace, "i", |event| &event["name"]);
    assert_eq!(buckets.iter().filter(|name| *name == "bucket 0").count(), 2 * 3, "{buckets:?}");
    assert!(!plain.dir().join("profile.json").exists());
}

/// A run that ends before the profile is complete leaves what there is.
#[test]
fn a_profile_of_more_steps_than_there_are_has_all_that_are() {
    let folder = Folder::new();
    let text = folder.text(12_000);
    let run = folder
        .run("run", &format!("char-lstm --data {text} --steps 9 --set hidden_size=16 --set seq_len=10"));
    run.start("--workers 1 --profile 100").end().expect_exit(0);
    let trace: Value =
        serde_json::from_slice(&std::fs::read(run.dir().join("profile.json")).unwrap()).unwrap();
    assert_eq!(steps_of(&trace, "compute").into_values().collect::<Vec<_>>(), [[6, 7, 8, 9]]);
}
