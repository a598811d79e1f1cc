//! What decides how a run goes on: learning rates that decay, steps that are left out, runs that diverge or no longer
//! improve. Every fleet and every resumed run decides the same.

mod common;

use common::{Broken, Folder, Meddling, Run, get, train_in_process};
use protocol::job::JobFile;
use protocol::learning_rate::learning_rate;
use protocol::problem::Exit;
use rustix::process::Signal;
use serde_json::Value;

/// Steps of an epoch of [`job`].
const PER_EPOCH: u64 = 16;

fn job(folder: &Folder, settings: &str) -> String {
    let text = folder.text(12_000);
    format!("char-gru --set data={text} --set hidden_size=8 --set seq_len=10 {settings}")
}

/// The lines of this kind in `metrics.jsonl`.
fn lines(run: &Run, kind: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(run.dir().join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|line| line["kind"] == kind).collect()
}

/// What each step says that no fleet may change.
fn numbers(run: &Run) -> Vec<[Value; 4]> {
    let keys = ["train_loss", "grad_norm", "learning_rate", "skipped"];
    lines(run, "step").iter().map(|line| keys.map(|key| line[key].clone())).collect()
}

/// The third step of an epoch, an epoch's first two, an epoch's last.
const BAD_STEPS: &[u64] = &[3, 17, 18, 32];

#[test]
fn steps_that_are_left_out_leave_the_same_bits_on_any_fleet_and_over_any_stop() {
    let folder = Folder::new();
    let job = job(&folder, "--set epochs=0 --set non_finite=skip");
    let sound = folder.run("sound", &job).train("--set steps=40 --workers 1");
    for (name, broken) in [("losses", Broken::Losses(BAD_STEPS)), ("gradients", Broken::Gradients(BAD_STEPS))]
    {
        let bad = Meddling { broken, ..Meddling::HONEST };
        let train = |run: &Run, steps: u64, fleet: Vec<Meddling>| {
            assert_eq!(train_in_process(run, &format!("--set steps={steps}"), fleet), Ok(Exit::Done));
        };
        let whole = folder.run(&format!("{name}-whole"), &job);
        train(&whole, 40, vec![bad.clone()]);
        let expected = whole.hashes();
        assert_ne!(expected.parameter, sound.parameter);
        let skipped: Vec<u64> = lines(&whole, "step")
            .iter()
            .filter(|line| line["skipped"] == true)
            .map(|line| line["step"].as_u64().unwrap())
            .collect();
        assert_eq!(skipped, BAD_STEPS);
        for line in lines(&whole, "step").iter().filter(|line| line["skipped"] == true) {
            assert_eq!((line["train_loss"].is_null(), line["grad_norm"].is_null()), (name == "losses", true));
        }
        assert!(lines(&whole, "epoch").iter().all(|line| line["train_loss"].is_f64()), "{name}");
        let events = whole.inspect()["events"].to_string();
        for step in BAD_STEPS {
            assert!(
                events.contains(&format!("step {step} was left out: it is not finite (loss ")),
                "{events}"
            );
        }

        // One of three is enough to break a step for all.
        let mixed = folder.run(&format!("{name}-mixed"), &job);
        train(&mixed, 40, vec![Meddling::HONEST, bad.clone(), Meddling::HONEST]);
        assert_eq!((mixed.hashes(), numbers(&mixed)), (expected.clone(), numbers(&whole)), "{name}");
        let parts = folder.run(&format!("{name}-parts"), &job);
        for (steps, workers) in [(2, 1), (3, 3), (16, 2), (17, 1), (18, 3), (31, 1), (32, 2), (40, 3)] {
            train(&parts, steps, vec![bad.clone(); workers]);
        }
        assert_eq!((parts.hashes(), numbers(&parts)), (expected, numbers(&whole)), "{name}");
        assert!(parts.checkpoint() == whole.checkpoint(), "the checkpoint files differ");
    }
}

#[test]
fn a_run_ends_for_good_when_as_many_steps_were_left_out_as_the_job_allows() {
    let folder = Folder::new();
    // The first update makes the parameters infinite, or so large that nothing finite comes after it.
    let blows_up = "--set learning_rate=3e38 --set clip=none --set non_finite=skip";
    let run = folder.run("run", &job(&folder, &format!("{blows_up} --set skip_limit=5")));
    let sentence = "error: 5 steps were left out because they were not finite, as many as skip_limit allows";
    let ended = run.end("--epochs 9 --workers 3");
    ended.expect_failure(93, &[sentence, "hint: a new run may do better"]);
    assert!(ended.stdout.contains("was left out: it is not finite (loss "), "{}", ended.stdout);
    let (hashes, checkpoint) = (run.hashes(), run.checkpoint());
    assert_eq!(hashes.step, run.steps_so_far(), "the state after the last step is on the disk");
    assert_eq!(lines(&run, "step").iter().filter(|line| line["skipped"] == true).count(), 5);
    assert!(run.inspect()["events"].to_string().contains(&sentence["error: ".len()..]));

    let again = run.end("--epochs 20 --workers 1");
    again.expect_failure(93, &[sentence]);
    assert!(!again.stdout.contains("generation"), "{}", again.stdout);
    assert!(run.checkpoint() == checkpoint, "it trains no more");
    let alone = folder.run("alone", &job(&folder, &format!("{blows_up} --set skip_limit=5")));
    alone.end("--epochs 9 --workers 1").expect_exit(93);
    assert_eq!(alone.hashes(), hashes);
}

#[test]
fn the_metric_counts_the_steps_that_were_left_out_before_a_resume_too() {
    let folder = Folder::new();
    let settings = "--set learning_rate=3e38 --set clip=none --set non_finite=skip --set skip_limit=1000";
    let run = folder.run("run", &job(&folder, settings));
    run.end("--steps 9 --workers 1").expect_exit(0);
    let mut process = run.start("--steps 12 --workers 2 --linger 600");
    let line = process.line_with("http://");
    let address = line.split("http://").nth(1).unwrap().split('/').next().unwrap().to_owned();
    process.line_with("done: 12 steps");
    let skipped = lines(&run, "step").iter().filter(|line| line["skipped"] == true).count();
    assert!(skipped > 3, "some of them are from before the resume");
    let metrics = get(&address, "/metrics").body;
    assert!(metrics.contains(&format!("\nlockstep_skipped_updates_total {skipped}\n")), "{metrics}");
    assert!(metrics.contains("\nlockstep_steps_total 3\n"), "{metrics}");
    process.signal(Signal::TERM);
    process.end().expect_exit(0);
}

#[test]
fn a_run_that_diverges_ends_for_good_after_the_same_step_on_any_fleet() {
    let folder = Folder::new();
    // 67 steps are an epoch: it is looked at before its end.
    let settings = "--set batch_size=16 --set clip=none --set optimizer=sgd --set learning_rate=0.05";
    let blow_up = "--epochs 4 --change-learning-rate 1000";
    let mut expected = None;
    for workers in [1, 3] {
        let run = folder.run(&format!("run-{workers}"), &job(&folder, settings));
        run.train(&format!("--epochs 1 --workers {workers}"));
        let first_loss = lines(&run, "epoch")[0]["train_loss"].as_f64().unwrap();
        let ended = run.end(&format!("{blow_up} --workers {workers}"));
        let sentence = "error: the run has diverged: the mean loss of epoch 2 is ";
        let measure = format!("more than 3 times the first epoch's {first_loss:.4}");
        ended.expect_failure(93, &[sentence, &measure, "hint: ", "--set divergence_factor=0"]);
        let hashes = run.hashes();
        assert_eq!(hashes.step, 67 + 50, "it is looked at from its 50th step on");
        assert_eq!(*expected.get_or_insert_with(|| hashes.clone()), hashes);
        assert!(run.inspect()["events"].to_string().contains("the run has diverged"));

        let checkpoint = run.checkpoint();
        let again = run.end("--epochs 9 --workers 2");
        again.expect_failure(93, &[sentence, &measure]);
        assert!(!again.stdout.contains("generation"), "{}", again.stdout);
        assert!(run.checkpoint() == checkpoint, "it trains no more");
    }
    let unguarded = folder.run("unguarded", &job(&folder, &format!("{settings} --set divergence_factor=0")));
    unguarded.train("--epochs 1 --workers 1");
    assert_eq!(unguarded.train(&format!("{blow_up} --workers 1")).step, 4 * 67);
}

#[test]
fn a_run_that_no_longer_improves_is_done() {
    let folder = Folder::new();
    // After two epochs the rate is too small to change a bit of any parameter, so the loss stays what it is.
    let settings = "--set patience=2 --set decay=step --set decay_epochs=2 --set decay_factor=1e-30";
    let run = folder.run("run", &job(&folder, settings));
    let ended = run.end("--epochs 10 --workers 2");
    ended.expect_exit(0);
    let best = lines(&run, "epoch")[1]["val_loss"].as_f64().unwrap();
    let why = format!(
        "the validation loss has not become lower for 2 epochs, the best was {best:.4} nats after epoch 2"
    );
    assert!(ended.stdout.contains("done: 64 of 160 steps in "), "{}", ended.stdout);
    assert!(ended.stdout.contains(&why), "{}", ended.stdout);
    assert_eq!(run.metric_steps("epoch"), [16, 32, 48, 64]);
    assert!(run.inspect()["events"].to_string().contains(&why));

    let (hashes, checkpoint) = (run.hashes(), run.checkpoint());
    let again = run.end("--epochs 20 --workers 1");
    again.expect_exit(0);
    assert!(again.stdout.contains(&format!("nothing to do: {why} (")), "{}", again.stdout);
    assert!(!again.stdout.contains("generation"), "{}", again.stdout);
    assert!(run.checkpoint() == checkpoint, "it trains no more");

    let parts = folder.run("parts", &job(&folder, settings));
    for (length, workers) in [("--steps 20", 1), ("--epochs 3", 3), ("--steps 50", 2), ("--epochs 10", 1)] {
        parts.train(&format!("{length} --workers {workers}"));
    }
    assert_eq!(parts.hashes(), hashes);
}

#[test]
fn patience_needs_validation_data() {
    let folder = Folder::new();
    // A hundredth of the text has not one window for each row of the batch.
    let settings = "--set patience=1 --set batch_size=500 --set validation_fraction=0.01";
    let run = folder.run("run", &job(&folder, settings));
    run.end("--epochs 1").expect_failure(
        2,
        &[
            "error: patience is 1, but the validation part is shorter than one batch",
            "hint: choose a smaller batch_size",
        ],
    );
    assert!(!run.dir().exists());
}

#[test]
fn a_learning_rate_decays_by_steps_done_whatever_stops_come_between() {
    let folder = Folder::new();
    for (decay, optimizer) in [
        ("constant", "optimizer=adam"),
        ("step", "momentum=0.5 --set optimizer=sgd"),
        ("cosine", "optimizer=adam"),
    ] {
        let settings = format!(
            "--set {optimizer} --set decay={decay} --set decay_epochs=2 --set decay_factor=0.3 --set learning_rate=0.07"
        );
        let whole = folder.run(&format!("{decay}-whole"), &job(&folder, &settings));
        let expected = whole.train("--epochs 5 --workers 1");
        let parts = folder.run(&format!("{decay}-parts"), &job(&folder, &settings));
        for (length, workers) in [("--steps 7", 3), ("--epochs 2", 1), ("--steps 33", 2), ("--epochs 5", 3)] {
            parts.train(&format!("{length} --workers {workers}"));
        }
        assert_eq!((parts.hashes(), numbers(&parts)), (expected, numbers(&whole)), "{decay}");

        let keys =
            [("decay", decay), ("learning_rate", "0.07"), ("decay_epochs", "2"), ("decay_factor", "0.3")];
        let keys = keys.map(|(key, value)| (key.to_owned(), value.to_owned()));
        let spec = JobFile::resolve("char-gru", None, &keys).unwrap().job;
        let rates: Vec<f64> = (0..5 * PER_EPOCH).map(|done| learning_rate(&spec, done, PER_EPOCH)).collect();
        let reported: Vec<f64> =
            lines(&parts, "step").iter().map(|line| line["learning_rate"].as_f64().unwrap()).collect();
        assert_eq!(reported, rates, "{decay}");

        // Another rate is one to decay from.
        let ended = parts.end("--epochs 6 --change-learning-rate 0.035");
        ended.expect_exit(0);
        let which =
            if decay == "constant" { "the learning rate is" } else { "the learning rate that decays is" };
        assert!(
            ended.stdout.contains(&format!("{which} 0.035 from here on, it was 0.07")),
            "{}",
            ended.stdout
        );
        let last = lines(&parts, "step").last().unwrap()["learning_rate"].as_f64().unwrap();
        assert_eq!(last, learning_rate(&spec, 6 * PER_EPOCH - 1, PER_EPOCH) * 0.5, "{decay}");
    }
}
