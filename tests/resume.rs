//! A run that was interrupted, at any moment and any number of times, ends where an uninterrupted one ends.

mod common;

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use common::{Folder, Run, eventually};
use rustix::process::Signal;

/// A run of some seconds; 16 steps are an epoch.
fn job(folder: &Folder) -> String {
    let text = folder.text(12_000);
    format!("char-lstm --data {text} --set hidden_size=32 --set seq_len=10 --set keep_prob=0.8")
}

/// A stop after the very last step leaves nothing to do.
const TRAINS_OR_IS_DONE: [&str; 2] = ["generation", "nothing to do"];

/// Numbers that differ from one test run to the next.
struct Random(u64);

impl Random {
    fn new() -> Self {
        let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
        println!("random seed {seed}");
        Self(seed)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// Every step and every epoch has exactly one line, in order.
fn assert_complete_metrics(run: &Run, steps: u64, steps_per_epoch: u64) {
    assert_eq!(run.metric_steps("step"), Vec::from_iter(1..=steps));
    let epoch_ends: Vec<u64> = (1..=steps / steps_per_epoch).map(|epoch| epoch * steps_per_epoch).collect();
    assert_eq!(run.metric_steps("epoch"), epoch_ends);
}

#[test]
fn interrupted_runs_end_in_the_same_bits() {
    let folder = Folder::new();
    let job = job(&folder);
    let length = "--epochs 40";
    let undisturbed = folder.run("undisturbed", &job);
    let expected = undisturbed.train(&format!("{length} --workers 2"));
    assert_eq!(expected.step, 640);

    let run = folder.run("interrupted", &job);
    let mut random = Random::new();
    let mut stops = 0;
    for (workers, signal) in [
        (1, Signal::INT),
        (3, Signal::TERM),
        (2, Signal::INT),
        (8, Signal::USR1),
        (1, Signal::INT),
        (4, Signal::INT),
    ] {
        let (done, more) = (run.steps_so_far(), random.below(90));
        let mut process = run.start(&format!("{length} --workers {workers}"));
        process.line_with_any(&TRAINS_OR_IS_DONE);
        // What a stop has cut off is dropped at the next start, so wait for steps of this one.
        eventually("some steps", || (run.steps_so_far() >= (done + more).min(600)).then_some(()));
        std::thread::sleep(Duration::from_micros(random.below(3_000)));
        process.signal(signal);
        let ended = process.end();
        println!("{workers} workers, {signal:?} after step {}: {}", run.steps_so_far(), ended.status);
        if ended.code() == Some(0) {
            break;
        }
        ended.expect_exit(75);
        assert!(ended.stdout.contains("the same command goes on from there"), "{}", ended.stdout);
        assert_eq!(run.hashes().step, run.steps_so_far(), "a stop writes the state after its last step");
        stops += 1;
    }
    assert!(stops >= 3, "only {stops} interruptions hit the run");
    assert_eq!(run.train(&format!("{length} --workers 2")), expected);
    assert_complete_metrics(&run, 640, 16);
    assert_eq!(run.metric_steps("sample"), run.metric_steps("epoch"));
    assert!(run.checkpoint() == undisturbed.checkpoint(), "the checkpoint files differ");
}

#[test]
fn a_second_signal_stops_at_once_and_the_run_goes_on_from_its_checkpoint() {
    let folder = Folder::new();
    let job = job(&folder);
    let expected = folder.run("undisturbed", &job).train("--epochs 12 --workers 2");
    let run = folder.run("interrupted", &job);
    // In the end it may come while the last state is on its way to the disk.
    for after in [0, 40, 90, 180, 186, 190, 192] {
        let mut process = run.start("--epochs 12 --workers 2");
        process.line_with_any(&TRAINS_OR_IS_DONE);
        eventually("some steps", || (run.steps_so_far() >= after).then_some(()));
        process.signal(Signal::INT);
        process.signal(Signal::INT);
        let ended = process.end();
        if ended.code() == Some(0) {
            assert_eq!(run.hashes(), expected, "a run that is done has its last state on the disk");
            break;
        }
        ended.expect_exit(75);
    }
    assert_eq!(run.train("--epochs 12 --workers 3"), expected);
    assert_complete_metrics(&run, 192, 16);
}

#[test]
fn a_signal_while_the_run_starts_leaves_a_usable_directory() {
    let folder = Folder::new();
    let job = job(&folder);
    let expected = folder.run("undisturbed", &job).train("--epochs 2 --workers 2");
    let run = folder.run("interrupted", &job);
    for delay_ms in [0, 3, 6, 10, 20, 40, 80] {
        let mut process = run.start("--epochs 2 --workers 2");
        std::thread::sleep(Duration::from_millis(delay_ms));
        process.signal(Signal::INT);
        let signalled = Instant::now();
        let ended = process.end();
        println!("after {delay_ms} ms: {} within {:?}", ended.status, signalled.elapsed());
        assert!(signalled.elapsed() < Duration::from_secs(10), "{ended:?}");
        // Before the program listens for signals, the signal's own default ends it.
        let is_default = ended.signal() == Some(Signal::INT.as_raw());
        assert!(is_default || matches!(ended.code(), Some(0 | 75)), "{ended:?}");
    }
    assert_eq!(run.train("--epochs 2 --workers 2"), expected);
    assert_complete_metrics(&run, 32, 16);
}

#[test]
fn more_epochs_or_steps_go_on_where_the_run_ended() {
    let folder = Folder::new();
    let job = job(&folder);
    let whole = folder.run("whole", &job);
    let expected = whole.train("--epochs 5 --workers 2");
    // In the middle of an epoch, at the end of one, and beyond.
    let cases = [("--steps 7", "--epochs 1"), ("--epochs 1", "--epochs 3"), ("--steps 20", "--steps 50")];
    for (number, (first, second)) in cases.into_iter().enumerate() {
        let run = folder.run(&format!("parts-{number}"), &job);
        run.train(&format!("{first} --workers 3"));
        run.train(&format!("{second} --workers 1"));
        assert_eq!(run.train("--epochs 5 --workers 2"), expected, "{first}, then {second}");
        assert_complete_metrics(&run, 80, 16);
        assert!(run.checkpoint() == whole.checkpoint(), "the checkpoint files differ");
    }
}

#[test]
fn images_are_resumed_in_their_order() {
    let folder = Folder::new();
    let job =
        "mnist-gru --set hidden_size=16 --set train_samples=1500 --set num_layers=2 --set keep_prob=0.8";
    let expected = folder.run("whole", job).train("--steps 27 --workers 2");
    let run = folder.run("parts", job);
    for steps in [4, 10, 13] {
        run.train(&format!("--steps {steps} --workers {}", steps % 4 + 1));
    }
    assert_eq!(run.train("--steps 27 --workers 2"), expected);
    assert_complete_metrics(&run, 27, 10);
}

#[test]
fn a_finished_run_has_nothing_to_do() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    let expected = run.train("--epochs 1 --workers 2");
    let checkpoint = run.checkpoint();
    let ended = run.end("--epochs 1 --workers 3");
    ended.expect_exit(0);
    assert!(ended.stdout.contains("nothing to do: 16 steps are done"), "{}", ended.stdout);
    assert_eq!(run.hashes(), expected);
    assert!(run.checkpoint() == checkpoint);
    assert_complete_metrics(&run, 16, 16);
}

#[test]
fn another_job_is_refused_with_the_keys_that_differ() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    let expected = run.train("--epochs 1 --workers 2");
    let other = "--epochs 1 --workers 2 --set hidden_size=31 --set keep_prob=0.7";
    run.end(other).expect_failure(
        2,
        &[
            "is of another job",
            "hidden_size: 32 there, 31 here",
            "keep_prob: 0.8",
            "hint: give another --run-dir",
        ],
    );
    let elsewhere = folder.run("run", &job(&folder).replace("text-12000", "text-12001"));
    folder.text(12_001);
    elsewhere.end("--epochs 1 --workers 2").expect_failure(2, &["is of another job", "digest of the data"]);
    assert_eq!(run.hashes(), expected, "a refusal changes nothing");

    let fresh = run.train(&format!("{other} --fresh"));
    assert_ne!(fresh.parameter, expected.parameter);
    assert_eq!(run.inspect()["job"]["hidden_size"], 31);
    assert_complete_metrics(&run, 16, 16);
}

#[test]
fn fresh_starts_over_and_spares_strangers_files() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    run.train("--epochs 2 --workers 2");
    let stranger = run.dir().join("notes.txt");
    std::fs::write(&stranger, "mine").unwrap();
    let once = run.train("--fresh --epochs 1 --workers 2");
    assert_eq!(once.step, 16);
    assert_complete_metrics(&run, 16, 16);
    assert_eq!(std::fs::read_to_string(stranger).unwrap(), "mine");
}
