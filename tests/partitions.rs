//! Networks that lose, hold back and slow down what the processes of a run say to each other: the run ends with the bits
//! of an undisturbed one, and says who could not be reached.

mod common;

use std::time::Duration;

use common::{Coordinator, Direction, Folder, Process, Proxy, Run, eventually, get};

/// 16 steps are an epoch.
fn job(folder: &Folder) -> String {
    let text = folder.text(12_000);
    format!("char-lstm --data {text} --set hidden_size=32 --set seq_len=10 --set keep_prob=0.8")
}

const STEPS: &str = "--steps 1500";

fn wait_for_steps(run: &Run, steps: u64) {
    eventually(format!("step {steps}"), || (run.steps_so_far() >= steps).then_some(()));
}

/// The run is done, with the state of one that nobody disturbed and each step on record once.
fn assert_undisturbed(folder: &Folder, run: &Run, mut coordinator: Coordinator) {
    coordinator.process.line_with("done: 1500 steps");
    coordinator.process.end().expect_exit(0);
    let undisturbed = folder.run("undisturbed", &job(folder)).train(&format!("{STEPS} --workers 1"));
    assert_eq!(run.hashes(), undisturbed);
    assert_eq!(run.metric_steps("step"), Vec::from_iter(1..=undisturbed.step));
}

/// A run of two workers, of which the second reaches the coordinator through a proxy only.
struct Distant {
    run: Run,
    coordinator: Coordinator,
    proxy: Proxy,
    workers: [Process; 2],
}

impl Distant {
    fn start(folder: &Folder) -> Self {
        let run = folder.run("run", &job(folder));
        let mut coordinator = Coordinator::start(&run, &format!("{STEPS} --workers 2"), None);
        let proxy = Proxy::start("127.0.0.1:0", &coordinator.control);
        let here = folder.empty("worker");
        let near = coordinator.worker(&here, "--name near");
        let far = coordinator.worker_at(&proxy.address, &here, "--name far");
        coordinator.process.line_with("generation 1: 2 workers share 8 shards");
        wait_for_steps(&run, 50);
        Self { run, coordinator, proxy, workers: [near, far] }
    }
}

#[test]
fn a_worker_cut_off_from_the_coordinator_is_named_and_gone_on_without() {
    let folder = Folder::new();
    let Distant { run, mut coordinator, proxy, workers } = Distant::start(&folder);
    proxy.cut(Direction::There);
    proxy.cut(Direction::Back);
    coordinator.process.line_with("worker far was lost: nothing came from it for 5 s");
    coordinator.process.line_with("generation 2: 1 worker has 8 shards");
    assert_undisturbed(&folder, &run, coordinator);
    drop(workers);
}

#[test]
fn a_worker_whose_words_get_lost_is_named_though_it_hears_all() {
    let folder = Folder::new();
    let Distant { run, mut coordinator, proxy, workers } = Distant::start(&folder);
    proxy.cut(Direction::There);
    coordinator.process.line_with("worker far was lost: nothing came from it for 5 s");
    coordinator.process.line_with("generation 2: 1 worker has 8 shards");
    assert_undisturbed(&folder, &run, coordinator);
    drop(workers);
}

#[test]
fn a_short_cut_is_waited_out() {
    for direction in [Direction::There, Direction::Back] {
        let folder = Folder::new();
        let Distant { run, coordinator, proxy, workers } = Distant::start(&folder);
        proxy.cut(direction);
        std::thread::sleep(Duration::from_secs(1));
        proxy.mend();
        let output = coordinator.process.output();
        assert!(!output.contains("was lost"), "{direction:?}: {output}");
        assert_undisturbed(&folder, &run, coordinator);
        drop(workers);
    }
}

#[test]
fn a_slow_link_changes_no_bit() {
    let folder = Folder::new();
    let Distant { run, coordinator, proxy, workers } = Distant::start(&folder);
    proxy.slow_down(Duration::from_millis(5), 400_000);
    assert_undisturbed(&folder, &run, coordinator);
    assert!(proxy.passed(Direction::Back) > 0);
    drop(workers);
}

#[test]
fn workers_cut_off_from_each_other_are_tried_again() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    let mut coordinator = Coordinator::start(&run, &format!("{STEPS} --workers 2"), None);
    let here = folder.empty("worker");
    // The others reach the first worker at an address of the proxy's.
    let first = coordinator.worker(&here, "--name first --advertise 127.0.0.2");
    let address = eventually("the first worker's address", || {
        let status: serde_json::Value =
            serde_json::from_str(&get(&coordinator.http, "/status.json").body).ok()?;
        let (_, worker) = status["workers"].as_object()?.iter().next()?;
        worker["address"].as_str().map(str::to_owned)
    });
    let proxy = Proxy::start(&address, &address.replace("127.0.0.2", "127.0.0.1"));
    let second = coordinator.worker(&here, "--name second");
    coordinator.process.line_with("generation 1: 2 workers share 8 shards");
    wait_for_steps(&run, 50);
    // Held back for a while, in one direction, the step is only late.
    proxy.cut(Direction::There);
    std::thread::sleep(Duration::from_secs(1));
    proxy.mend();
    wait_for_steps(&run, run.steps_so_far() + 20);
    assert!(!coordinator.process.output().contains("generation 2"));
    proxy.slow_down(Duration::from_millis(2), 0);
    wait_for_steps(&run, run.steps_so_far() + 20);
    proxy.slow_down(Duration::ZERO, 0);
    // A broken connection between two that both live: nobody is lost, and the same two go on.
    proxy.break_all();
    coordinator.process.line_with("generation 2: 2 workers share 8 shards");
    let output = coordinator.process.output();
    assert!(!output.contains("was lost"), "{output}");
    assert_undisturbed(&folder, &run, coordinator);
    drop((first, second));
}
