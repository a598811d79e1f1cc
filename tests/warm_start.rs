//! Runs that start from weights, and runs that go on with another learning rate: what they start from decides their
//! bits, the fleet does not.

mod common;

use common::{Folder, Hashes, Process, Run, eventually, lockstep};
use rustix::process::Signal;

/// 12 steps are an epoch.
fn job(folder: &Folder) -> String {
    let text = folder.text(12_000);
    format!("char-gru --data {text} --set hidden_size=18 --set seq_len=14 --set keep_prob=0.8")
}

/// A run whose parameters others start from.
fn source(folder: &Folder) -> (Run, Hashes) {
    let source = folder.run("source", &job(folder));
    let hashes = source.train("--epochs 2 --workers 1");
    (source, hashes)
}

fn init_from(run: &Run) -> String {
    format!("--init-from {}", run.dir().display())
}

#[test]
fn a_run_that_starts_from_weights_has_the_same_bits_on_any_fleet() {
    let folder = Folder::new();
    let (source, weights) = source(&folder);
    let from = init_from(&source);
    let cold = folder.run("cold", &job(&folder)).train("--epochs 2");
    let run = folder.run("warm", &job(&folder));
    let mut expected = None;
    for fleet in ["--workers 1", "--workers 2", "--workers 3 --threads 2"] {
        let ended = run.end(&format!("--fresh --epochs 2 {from} {fleet}"));
        ended.expect_exit(0);
        assert!(ended.stdout.contains("starting from the parameters of "), "{}", ended.stdout);
        let reached = (run.hashes(), run.checkpoint());
        assert_ne!(reached.0, cold);
        assert_eq!(*expected.get_or_insert_with(|| reached.clone()), reached, "{fleet}");
    }
    assert_eq!(run.inspect()["job"]["init_from"], weights.parameter);

    // The same parameters by another way: the exported file.
    let file = folder.path().join("w.safetensors");
    let exported = Process::start(lockstep().arg("export").arg(source.dir()).arg("--out").arg(&file)).end();
    exported.expect_exit(0);
    let other = folder.run("from-a-file", &job(&folder));
    let reached = other.train(&format!("--epochs 2 --init-from {}", file.display()));
    assert_eq!(reached, expected.unwrap().0);

    let again = Process::start(lockstep().arg("export").arg(source.dir()).arg("--out").arg(&file)).end();
    again.expect_failure(2, &["w.safetensors is there already", "--force"]);
}

#[test]
fn a_warm_run_that_is_killed_goes_on_without_being_told_its_start_again() {
    let folder = Folder::new();
    let (source, weights) = source(&folder);
    let from = init_from(&source);
    let expected = folder.run("undisturbed", &job(&folder)).train(&format!("--epochs 3 {from}"));

    let run = folder.run("killed", &job(&folder));
    let mut process = run.start(&format!("--epochs 3 {from}"));
    process.line_with_any(&["generation"]);
    process.signal(Signal::KILL);
    process.end();
    // The coordinator sees that its supervisor is gone, and lets go of the directory.
    let ended = eventually("a free run directory", || {
        let ended = run.end("--epochs 3");
        (!ended.stderr.contains("is in use by")).then_some(ended)
    });
    ended.expect_exit(0);
    assert_eq!(run.hashes(), expected);
    run.end(&format!("--epochs 3 {from}")).expect_exit(0);

    let other = folder.run("other", &job(&folder));
    let other_weights = other.train("--epochs 1 --set seed=2");
    let refused = run.end(&format!("--epochs 3 {}", init_from(&other)));
    let [there, here] = [&weights.parameter, &other_weights.parameter];
    refused.expect_failure(2, &[&format!("init_from: \"{there}\" there, \"{here}\" here"), "--fresh"]);
    assert_eq!(run.hashes(), expected);
    run.train(&format!("--fresh --epochs 1 {}", init_from(&other)));
    assert_eq!(run.inspect()["job"]["init_from"], other_weights.parameter);
}

#[test]
fn weights_of_a_text_with_other_characters_are_carried_over_by_character() {
    let folder = Folder::new();
    let (source, _) = source(&folder);
    let text = std::fs::read_to_string(folder.text(12_000)).unwrap().replace('s', "z").replace('x', "q");
    let path = folder.path().join("other.txt");
    std::fs::write(&path, text).unwrap();
    let words = job(&folder).replace("text-12000.txt", "other.txt");
    let run = folder.run("other", &words);
    let ended = run.end(&format!("--epochs 1 {}", init_from(&source)));
    ended.expect_exit(0);
    assert!(ended.stdout.contains(" characters carried over, the others begin as"), "{}", ended.stdout);
    let hashes = run.hashes();
    assert_eq!(run.train(&format!("--fresh --epochs 1 --workers 3 {}", init_from(&source))), hashes);
}

#[test]
fn weights_that_cannot_be_started_from_leave_no_directory() {
    let folder = Folder::new();
    let (source, _) = source(&folder);
    let from = init_from(&source);
    let run = folder.run("run", &job(&folder));
    let hash = "ab".repeat(32);
    let cases = [
        (format!("{from} --set hidden_size=20"), "tensor rnn.weight_ih_l0 is [54, ", "--set hidden_size=18"),
        (format!("{from} --set cell=lstm"), "tensor rnn.weight_ih_l0 is [54, ", "--set cell=gru"),
        (format!("{from} --set num_layers=1"), "has the tensor rnn.bias_hh_l1", "--set num_layers=2"),
        (format!("{from} --set num_layers=3"), "has no tensor rnn.weight_ih_l2", "--set num_layers=2"),
        ("--init-from nowhere".to_owned(), "cannot read nowhere: ", ""),
        (format!("--init-from {}", folder.text(12_000)), "is not a safetensors file", "checkpoint"),
        (format!("--set init_from={hash}"), "init_from is set, but there are no parameters", "--init-from"),
        (
            format!("{from} --set init_from={hash}"),
            "but the parameters of --init-from have",
            "leave init_from",
        ),
    ];
    for (options, sentence, hint) in cases {
        run.end(&options).expect_failure(2, &[sentence, hint]);
        assert!(!run.dir().exists(), "{options}");
    }
}

#[test]
fn an_imported_run_is_the_one_that_init_from_starts() {
    let folder = Folder::new();
    let (source, weights) = source(&folder);
    let file = folder.path().join("w.safetensors");
    Process::start(lockstep().arg("export").arg(source.dir()).arg("--out").arg(&file)).end().expect_exit(0);
    let run = folder.run("imported", &job(&folder));
    let import = |run: &Run, options: &str| {
        let options = options.split_whitespace();
        Process::start(lockstep().arg("import").arg(&file).args(run.words()).args(options)).end()
    };
    import(&run, "").expect_exit(0);
    let hashes = run.hashes();
    assert_eq!((hashes.step, hashes.parameter), (0, weights.parameter));
    import(&run, "").expect_failure(2, &["imported is already a run", "--fresh"]);
    import(&run, "--fresh").expect_exit(0);
    let expected = folder.run("warm", &job(&folder)).train(&format!("--epochs 2 {}", init_from(&source)));
    assert_eq!(run.train("--epochs 2 --workers 3"), expected);

    let images = folder.run("images", "mnist-gru");
    import(&images, "").expect_failure(2, &["tensor rnn.weight_ih_l0 is [54, ", "[450, 28] in this job"]);
    assert!(!images.dir().exists());
}

#[test]
fn a_changed_learning_rate_is_part_of_the_state_on_any_fleet() {
    let folder = Folder::new();
    let job = job(&folder);
    let unchanged = folder.run("unchanged", &job).train("--epochs 3");
    let run = folder.run("changed", &job);
    let mut expected = None;
    for [first, second, third] in [["1", "2", "1"], ["3", "1", "2"]] {
        run.train(&format!("--fresh --epochs 1 --workers {first}"));
        let change = "--change-learning-rate 0.00025";
        let ended = run.end(&format!("--epochs 2 --workers {second} {change}"));
        ended.expect_exit(0);
        let notice = "the learning rate is 0.00025 from here on, it was 0.002";
        assert!(ended.stdout.contains(notice), "{}", ended.stdout);
        // Saying it once more changes nothing, and so does not saying it.
        let option = if first == "1" { change } else { "" };
        let hashes = run.train(&format!("--epochs 3 --workers {third} {option}"));
        assert_ne!(hashes.parameter, unchanged.parameter);
        assert_eq!(*expected.get_or_insert_with(|| hashes.clone()), hashes);

        let inspection = run.inspect();
        let events: Vec<_> = inspection["events"].as_array().unwrap().iter().collect();
        let rates = events.iter().filter(|event| event["text"] == "learning rate 0.00025");
        assert_eq!(rates.map(|event| event["step"].as_u64().unwrap()).collect::<Vec<_>>(), [12]);
        let lengths = events.iter().filter(|event| event["text"].as_str().unwrap().starts_with("epochs: "));
        assert_eq!(lengths.count(), 2, "{events:?}");
    }
}

#[test]
fn a_changed_learning_rate_is_on_the_disk_before_the_next_step() {
    let folder = Folder::new();
    let job = job(&folder);
    let run = folder.run("run", &job);
    let before = run.train("--epochs 1");
    // Nothing is left to do: the run ends without a worker.
    run.end("--epochs 1 --change-learning-rate 0.01").expect_exit(0);
    let after = run.hashes();
    assert_eq!((after.step, &after.parameter), (before.step, &before.parameter));
    assert_ne!(after.state, before.state);
    let gone_on = run.train("--epochs 2");
    let other = folder.run("other", &job);
    other.train("--epochs 1");
    assert_eq!(other.train("--epochs 2 --change-learning-rate 0.01"), gone_on);

    let refused = run.end("--epochs 2 --set learning_rate=0.02");
    refused.expect_failure(2, &["learning_rate: 0.002 there, 0.02 here", "--change-learning-rate 0.02"]);
}

#[test]
fn a_learning_rate_is_changed_only_where_there_is_a_state_to_go_on_from() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    for fresh in ["", "--fresh"] {
        let refused = run.end(&format!("--change-learning-rate 0.1 {fresh}"));
        refused.expect_failure(2, &["has no checkpoint to go on from", "--set learning_rate=0.1"]);
    }
    // The job has 0.002: the factor to 1e308 is none.
    for rate in ["0", "-1", "inf", "nan", "1e308"] {
        let refused = run.end(&format!("--change-learning-rate={rate}"));
        refused.expect_failure(2, &["it must be a number above 0"]);
    }
    assert!(!run.dir().exists());
}

#[test]
fn a_run_that_was_cut_off_before_its_first_state_asks_for_the_weights_again() {
    let folder = Folder::new();
    let (source, _) = source(&folder);
    let from = init_from(&source);
    let run = folder.run("run", &job(&folder));
    let expected = run.train(&format!("--epochs 1 {from}"));
    std::fs::remove_dir_all(run.dir().join("checkpoints")).unwrap();
    run.end("--epochs 1")
        .expect_failure(2, &["starts from the parameters ", "give --init-from RUN|FILE with"]);
    assert_eq!(run.train(&format!("--epochs 1 {from}")), expected);
}

#[test]
fn going_back_to_before_a_change_of_the_learning_rate_is_said() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    run.train("--epochs 1");
    let expected = run.train("--epochs 2");
    run.end("--epochs 2 --change-learning-rate 0.5").expect_exit(0);
    std::fs::write(run.dir().join("latest"), "damaged").unwrap();
    let ended = run.end("--epochs 2");
    ended.expect_exit(0);
    let notice = "the change of the learning rate to 0.5 came after step 24 and is undone";
    assert!(ended.stdout.contains(notice), "{}", ended.stdout);
    assert_eq!(run.hashes(), expected);
    let events = run.inspect()["events"].to_string();
    assert!(!events.contains("learning rate 0.5"), "{events}");
}
