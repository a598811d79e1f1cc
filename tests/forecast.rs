//! What is said about a run before it starts is near what it takes.

mod common;

use common::{Folder, Process, children_of, lockstep};
use serde_json::Value;

/// An estimate and what was measured may differ by this factor.
const FACTOR: f64 = 1.5;

/// Estimated megabytes per worker, from the job's facts.
fn estimated_megabytes(facts: &Value) -> f64 {
    let row = facts["memory"].as_str().unwrap();
    let number = row.strip_prefix("about ").and_then(|row| row.split(" MB per worker").next());
    number.unwrap_or_else(|| panic!("{row}")).replace(',', "").parse().unwrap()
}

/// The most megabytes that a process has held so far.
fn peak_megabytes(pid: u32) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<f64>().ok()? * 1024.0 / 1e6)
}

#[test]
fn a_worker_holds_about_as_much_as_was_said() {
    let folder = Folder::new();
    let cases = [
        "char-lstm --workers 1 --steps 12",
        "char-lstm --workers 2 --steps 12 --set keep_prob=0.8",
        "char-gru --workers 1 --threads 2 --steps 12",
        "char-lstm --workers 2 --steps 6 --set hidden_size=384 --set seq_len=60",
        "mnist-rnn --workers 1 --steps 30",
        "mnist-lstm --workers 2 --steps 20",
        "mnist-gru --workers 1 --steps 20 --set hidden_size=300 --set batch_size=300 --shards 3",
    ];
    for job in cases {
        let dir = folder.path().join("run");
        let mut command = lockstep();
        command.arg("train").args(job.split_whitespace()).args(["--fresh", "--json", "--run-dir"]).arg(&dir);
        let mut process = Process::start(&mut command);
        let mut peaks = std::collections::BTreeMap::<u32, f64>::new();
        while !process.has_ended() {
            for (pid, words) in children_of(process.pid()) {
                if words.contains(" worker ")
                    && let Some(peak) = peak_megabytes(pid)
                {
                    peaks.insert(pid, peak);
                }
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let ended = process.end();
        ended.expect_exit(0);
        let first: Value = serde_json::from_str(ended.stdout.lines().next().unwrap()).unwrap();
        let estimated = estimated_megabytes(&first["facts"]);
        assert!(first["facts"]["time"].is_string() && !peaks.is_empty(), "{first}");
        let measured = peaks.values().fold(0.0_f64, |most, peak| most.max(*peak));
        println!("{job}: {estimated} MB estimated, {measured:.0} MB measured: {:.2}", estimated / measured);
        if measured > 20.0 {
            let ratio = estimated / measured;
            assert!((1.0 / FACTOR..=FACTOR).contains(&ratio), "{job}: {ratio:.2}");
        }
    }
}

#[test]
fn a_run_that_does_not_fit_is_refused_before_anything_is_started() {
    let folder = Folder::new();
    for settings in
        ["--set hidden_size=16384 --set num_layers=8", "--set hidden_size=16384 --set batch_size=4000"]
    {
        let run = folder.run("run", &format!("char-lstm {settings}"));
        let parts =
            ["this run would take about ", " MB are available", "fewer workers, or a smaller batch_size"];
        run.end("--workers 2").expect_failure(2, &parts);
        assert!(!run.dir().exists(), "{settings}");
    }
}
