//! What is served over HTTP: metrics that Prometheus accepts, health, status, and where the workers' metrics are.

mod common;

use std::io::Write;
use std::process::{Command, Stdio};

use common::{Coordinator, Folder, get, skipped};
use rustix::process::Signal;
use serde_json::Value;

const B: u64 = 50;
const STEPS: u64 = 200;

fn job(folder: &Folder) -> String {
    let text = folder.text(12_000);
    format!("char-lstm --data {text} --set hidden_size=16 --set seq_len=10 --set batch_size={B}")
}

/// The value of the series that is written like this, labels included.
fn sample(text: &str, series: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {series} in\n{text}")).parse().unwrap()
}

/// Has promtool check an exposition, if it is installed.
fn check_with_promtool(test: &str, text: &str) {
    let mut command = Command::new("promtool");
    command.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let Ok(mut promtool) = command.spawn() else {
        return skipped(test, "promtool is not installed");
    };
    promtool.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.is_empty(), "{}: {said}\n{text}", output.status);
}

#[test]
fn a_finished_run_lingers_for_the_last_scrape() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    let mut process = run.start(&format!("--steps {STEPS} --workers 2 --linger 600"));
    let line = process.line_with("http://");
    let address = line.split("http://").nth(1).unwrap().split('/').next().unwrap().to_owned();
    process.line_with(&format!("done: {STEPS} steps"));

    let metrics = get(&address, "/metrics");
    assert_eq!(metrics.code, 200);
    assert!(metrics.content_type.starts_with("text/plain; version=0.0.4"), "{}", metrics.content_type);
    for (series, value) in [
        ("lockstep_samples_total", STEPS * B),
        ("lockstep_targets_total", STEPS * B * 10),
        ("lockstep_steps_total", STEPS),
        ("lockstep_step", STEPS),
        ("lockstep_checkpoint_step", STEPS),
        ("lockstep_step_duration_seconds_count", STEPS),
        ("lockstep_generations_total", 1),
        ("lockstep_checkpoints_total{outcome=\"failed\"}", 0),
    ] {
        assert_eq!(sample(&metrics.body, series), value as f64, "{series}");
    }
    check_with_promtool("metrics::a_finished_run_lingers_for_the_last_scrape", &metrics.body);

    assert_eq!((get(&address, "/healthz").code, get(&address, "/healthz").body.trim()), (200, "ok"));
    assert_eq!(get(&address, "/readyz").code, 503, "a run that has ended takes no more work");
    let status: Value = serde_json::from_str(&get(&address, "/status.json").body).unwrap();
    assert_eq!((status["step"].as_u64(), status["total_steps"].as_u64()), (Some(STEPS), Some(STEPS)));
    assert_eq!(status["checkpoint_step"].as_u64(), Some(STEPS));
    assert!(status["train_loss"].is_f64() && status["val_loss"].is_f64(), "{status}");

    // The lingering is over when somebody says so, and the run is done all the same.
    process.signal(Signal::TERM);
    process.end().expect_exit(0);
}

#[test]
fn a_running_fleet_shows_itself_and_where_its_workers_metrics_are() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    let mut coordinator = Coordinator::start(&run, "--epochs 1000000 --workers 2", None);
    let ready = get(&coordinator.http, "/readyz");
    assert_eq!((ready.code, ready.body.trim()), (503, "gathering"));
    let series = "lockstep_workers{role=\"member\"}";
    assert_eq!(sample(&get(&coordinator.http, "/metrics").body, series), 0.0);

    let here = folder.empty("worker");
    let workers = [
        coordinator.worker(&here, "--name seen --metrics 127.0.0.1:0"),
        coordinator.worker(&here, "--name unseen"),
    ];
    coordinator.process.line_with("generation 1");
    let ready = get(&coordinator.http, "/readyz");
    assert_eq!((ready.code, ready.body.trim()), (200, "training"));
    let own = get(&coordinator.http, "/metrics");
    assert_eq!(sample(&own.body, series), 2.0);
    check_with_promtool("metrics::a_running_fleet_shows_itself: coordinator", &own.body);

    let discovery = get(&coordinator.http, "/sd");
    assert_eq!(discovery.content_type, "application/json");
    let groups: Value = serde_json::from_str(&discovery.body).unwrap();
    assert_eq!(groups.as_array().map(Vec::len), Some(1), "{groups}");
    assert_eq!(groups[0]["labels"]["worker"], "seen");
    let address = groups[0]["targets"][0].as_str().unwrap();
    let status: Value = serde_json::from_str(&get(&coordinator.http, "/status.json").body).unwrap();
    let listed = status["workers"].as_object().unwrap();
    assert_eq!(listed.len(), 2, "{status}");
    let metrics_of = |name: &str| &listed.values().find(|worker| worker["name"] == name).unwrap()["metrics"];
    assert_eq!((metrics_of("seen").as_str(), metrics_of("unseen").as_str()), (Some(address), None));

    let worker = common::eventually("a step in the worker's own metrics", || {
        let answer = get(address, "/metrics");
        (sample(&answer.body, "lockstep_worker_steps_total") > 0.0).then_some(answer)
    });
    assert_eq!(sample(&worker.body, "lockstep_worker_shards"), 4.0);
    assert!(sample(&worker.body, "lockstep_worker_sent_bytes_total") > 0.0);
    check_with_promtool("metrics::a_running_fleet_shows_itself: worker", &worker.body);

    let page = get(&coordinator.http, "/");
    assert!(page.code == 200 && page.content_type.starts_with("text/html"), "{page:?}");
    assert_eq!(get(&coordinator.http, "/nowhere").code, 404);
    assert_eq!(get(&coordinator.http, "/healthz").code, 200);

    coordinator.process.signal(Signal::TERM);
    coordinator.process.end().expect_exit(75);
    // Whatever started a worker is to start it again, too.
    for worker in workers {
        worker.end().expect_exit(75);
    }
}
