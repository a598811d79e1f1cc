//! A trained network writes text and is evaluated, from the command line and while it is trained.

mod common;

use std::io::Read;
use std::process::Stdio;

use common::{Ended, Folder, Process, Run, lockstep};
use serde_json::Value;

/// A run of a second; 16 steps are an epoch.
fn job(folder: &Folder) -> String {
    format!("char-lstm --data {} --set hidden_size=16 --set seq_len=10", folder.text(12_000))
}

fn command(name: &str, words: &[&str]) -> Ended {
    Process::start(lockstep().arg(name).args(words)).end()
}

/// What `lockstep sample` writes.
#[track_caller]
fn sample(words: &[&str]) -> String {
    let ended = command("sample", words);
    ended.expect_exit(0);
    assert_eq!(ended.stderr, "", "only the text");
    ended.stdout
}

/// The number of a key as it is written: reading JSON may round it.
fn number(json: &str, key: &str) -> f64 {
    let after = json.split(&format!("\"{key}\":")).nth(1).unwrap_or_else(|| panic!("no {key} in {json}"));
    after.split([',', '}']).next().unwrap().parse().unwrap()
}

/// The lines of a kind in `metrics.jsonl`.
fn lines(run: &Run, kind: &str) -> Vec<String> {
    let text = std::fs::read_to_string(run.dir().join("metrics.jsonl")).unwrap();
    let start = format!("{{\"kind\":\"{kind}\"");
    text.lines().filter(|line| line.starts_with(&start)).map(str::to_owned).collect()
}

#[test]
fn a_sample_is_a_function_of_its_options() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    run.train("--epochs 4");
    let dir = run.dir().to_str().unwrap();

    let text = sample(&[dir]);
    assert!((1000..=1001).contains(&text.chars().count()) && text.ends_with('\n'), "{text:?}");
    assert_eq!(sample(&[dir, "--simd", "portable"]), text, "instructions change nothing");
    assert_eq!(sample(&[dir, "--seed", "1", "--temperature", "0.7", "--length", "1000"]), text);
    assert_ne!(sample(&[dir, "--seed", "2"]), text);
    let checkpoint = run.dir().join("latest");
    assert_eq!(sample(&[checkpoint.to_str().unwrap()]), text, "a file does as well as its run");

    let greedy = sample(&[dir, "--greedy", "--length", "50"]);
    assert_eq!(sample(&[dir, "--top-n", "1", "--seed", "9", "--length", "50"]), greedy);
    assert_eq!(sample(&[dir, "--temperature", "1e-9", "--length", "50"]), greedy);

    // The prime is shown, characters of two bytes stay whole, and another prime is another text.
    let primed = sample(&[dir, "--prime", "naïve tree", "--length", "30"]);
    assert!(primed.starts_with("naïve tree") && (40..=41).contains(&primed.chars().count()), "{primed:?}");
    let prime = folder.path().join("prime.txt");
    std::fs::write(&prime, "naïve tree").unwrap();
    assert_eq!(sample(&[dir, "--prime-file", prime.to_str().unwrap(), "--length", "30"]), primed);
    assert_eq!(sample(&[dir, "--prime", "tree", "--length", "0"]), "tree\n");
}

#[test]
fn a_reader_that_has_seen_enough_ends_a_sample_quietly() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    run.train("--steps 2");
    let mut child = lockstep()
        .args(["sample", "--length", "100000000"])
        .arg(run.dir())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut start = [0; 100];
    child.stdout.take().unwrap().read_exact(&mut start).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(0), ""));
}

#[test]
fn what_cannot_be_sampled_is_told() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    run.train("--steps 2");
    let dir = run.dir().to_str().unwrap();
    let images = folder.run("images", "mnist-rnn --set hidden_size=4 --set train_samples=300 --workers 1");
    images.train("--steps 1");
    assert_eq!(lines(&images, "sample"), [""; 0]);
    let images = images.dir().to_str().unwrap();
    let fields = folder.run("fields", "classify-text --set hidden_size=4 --workers 1");
    fields.train("--steps 1");
    assert_eq!(lines(&fields, "sample"), [""; 0]);
    let fields = fields.dir().to_str().unwrap();
    let missing = folder.path().join("missing.txt");

    let cases: [(&[&str], &[&str]); 9] = [
        (
            &[dir, "--prime", "tree\u{1b}"],
            &["the prime has '\\u{1b}', which the network has never seen", "'ï'"],
        ),
        (&[dir, "--temperature", "0"], &["the temperature is 0, it must be a number above 0", "--greedy"]),
        (&[dir, "--temperature", "-2"], &["the temperature is -2"]),
        (&[dir, "--top-n", "0"], &["top_n is 0"]),
        (&[dir, "--greedy", "--temperature", "0.5"], &["cannot be used with"]),
        (&[dir, "--prime", "a", "--prime-file", "b"], &["cannot be used with"]),
        (&[dir, "--prime-file", missing.to_str().unwrap()], &["cannot read the prime from", "hint: "]),
        (&[images], &["reads images: there is no text to sample", "hint: "]),
        (&[fields], &["names the class of a text: there is no text to sample", "hint: "]),
    ];
    for (words, parts) in cases {
        let ended = command("sample", words);
        ended.expect_failure(2, parts);
        assert_eq!(ended.stdout, "", "{words:?}");
    }
    command("eval", &[images, "--data", "embedded"]).expect_exit(0);
}

#[test]
fn an_evaluation_has_the_bits_that_training_recorded() {
    let folder = Folder::new();
    let text = job(&folder);
    // The digits are drawn, two workers share the shards; the last image batch is not full.
    let images = "mnist-gru --set hidden_size=8 --set train_samples=450 --shards 7 --workers 2";
    let held_out =
        "mnist-gru --set hidden_size=8 --set train_samples=450 --set validation_samples=130 --workers 2";
    let lines_job = format!("{text} --set mode=lines --set batch_size=30 --set pad=pre");
    let fields = "classify-text --set hidden_size=8 --set validation_fraction=0.7 --shards 7 --workers 2";
    let cases = [
        ("text", text.as_str(), 3),
        ("images", images, 1),
        ("held out images", held_out, 2),
        ("lines", &lines_job, 2),
        ("fields", fields, 2),
    ];
    for (name, job, epochs) in cases {
        let run = folder.run(name, job);
        run.train(&format!("--epochs {epochs}"));
        let epoch = lines(&run, "epoch").pop().unwrap();
        for options in [&[][..], &["--threads", "1", "--simd", "portable"], &["--threads", "3"]] {
            let ended = command("eval", &[&[run.dir().to_str().unwrap(), "--json"], options].concat());
            ended.expect_exit(0);
            let loss = number(&ended.stdout, "loss");
            assert_eq!(loss.to_bits(), number(&epoch, "val_loss").to_bits(), "{name} {options:?}");
            assert_eq!(number(&ended.stdout, "accuracy"), number(&epoch, "val_accuracy"), "{name}");
            let json: Value = serde_json::from_str(&ended.stdout).unwrap();
            assert_eq!(json["step"], run.inspect()["step"]);
            assert_eq!(json["is_data_of_run"], true);
            assert_eq!(json["bits_per_char"].is_null(), !["text", "lines"].contains(&name));
            assert!(json["targets"].as_u64().unwrap() > 0);
        }
    }
}

#[test]
fn other_data_is_named_and_must_have_the_same_characters() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    run.train("--epochs 1");
    let dir = run.dir().to_str().unwrap();
    let longer = folder.text(20_000);
    let ended = command("eval", &[dir, "--data", &longer]);
    ended.expect_exit(0);
    assert!(ended.stdout.contains("20,000 characters") && ended.stdout.contains("not the data of the run"));

    let other = folder.path().join("other.txt");
    let text = std::fs::read_to_string(&longer).unwrap().replace('ï', "Q");
    std::fs::write(&other, text).unwrap();
    let parts = ["does not fit the network: the network has never seen 'Q'; the data lacks 'ï'", "hint: "];
    command("eval", &[dir, "--data", other.to_str().unwrap()]).expect_failure(2, &parts);
    let short = folder.text(9_000);
    command("eval", &[dir, "--data", &short]).expect_exit(0);
    let parts = ["the validation part of", "is shorter than one batch"];
    command("eval", &[dir, "--data", &folder.text(6_000)]).expect_failure(2, &parts);

    let copy = folder.path().join("copy.safetensors");
    std::fs::copy(run.dir().join("latest"), &copy).unwrap();
    let copy = copy.to_str().unwrap();
    command("eval", &[copy]).expect_failure(2, &["lies in no run directory", "--data"]);
    command("eval", &[copy, "--data", &longer]).expect_exit(0);
    sample(&[copy]);
}

#[test]
fn each_epoch_ends_with_a_text_that_changes_nothing() {
    let folder = Folder::new();
    let job = job(&folder);
    let silent = folder.run("silent", &job);
    let hashes = silent.train("--epochs 3 --set sample_chars=0");
    assert_eq!(lines(&silent, "sample"), [""; 0]);

    let run = folder.run("run", &job);
    let ended = run.end("--epochs 2 --set sample_chars=80");
    ended.expect_exit(0);
    // A resume goes on with the texts, each once; another fleet writes the same.
    run.train("--epochs 3 --set sample_chars=80 --workers 1");
    assert_eq!(run.hashes(), hashes, "texts change no bit of the state");
    assert_eq!(run.metric_steps("sample"), [16, 32, 48]);
    let whole = folder.run("whole", &job);
    let shown = whole.end("--epochs 3 --set sample_chars=80 --json");
    shown.expect_exit(0);
    assert_eq!(lines(&whole, "sample"), lines(&run, "sample"));

    let texts: Vec<String> = lines(&run, "sample")
        .iter()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["text"].as_str().unwrap().to_owned())
        .collect();
    assert!(texts.iter().all(|text| text.chars().count() == 80), "{texts:?}");
    assert_ne!(texts[0], texts[2], "the network has learnt");
    // It is the text that the command writes.
    let options = ["--length", "80", "--seed", "1", "--temperature", "0.7"];
    let written = sample(&[&[run.dir().to_str().unwrap()], &options[..]].concat());
    assert_eq!(written.trim_end_matches('\n'), texts[2].trim_end_matches('\n'));

    // On the screen it stands below its epoch's line.
    let screen: Vec<&str> = ended.stdout.lines().collect();
    let epoch = screen.iter().position(|line| line.starts_with("epoch   1  train")).unwrap();
    let first_line = texts[0].trim_matches('\n').lines().next().unwrap();
    assert_eq!(screen[epoch + 1], format!("  │ {first_line}").trim_end());
    let json = shown.stdout.lines().filter(|line| line.contains("\"kind\":\"sample\"")).count();
    assert_eq!(json, 3, "{}", shown.stdout);
}
