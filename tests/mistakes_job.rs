//! A command line or a job that cannot be meant is refused in a sentence, and nothing is written.

mod common;

use std::net::TcpListener;

use common::{Folder, Process, files_below, lockstep};

/// A job of a few steps.
fn job(folder: &Folder) -> String {
    format!("char-lstm --data {} --set hidden_size=16 --set seq_len=10", folder.text(12_000))
}

#[test]
fn a_job_that_cannot_be_meant_is_refused() {
    let folder = Folder::new();
    let good = job(&folder);
    let file = |name: &str, text: &str| {
        std::fs::write(folder.path().join(name), text).unwrap();
        folder.path().join(name).display().to_string()
    };
    let (no_toml, no_section) = (file("no.toml", "seed ="), file("no-section.toml", "[jobs]\nseed = 1\n"));
    let before = files_below(folder.path());
    let cases = [
        ("char-lsmt".to_owned(), "unknown preset 'char-lsmt'", "did you mean 'char-lstm'? known presets: "),
        (format!("{good} --set hiden_size=3"), "hiden_size", "did you mean 'hidden_size'?"),
        (
            format!("{good} --set job.hiden_size=3"),
            "unknown key 'job.hiden_size'",
            "did you mean 'job.hidden_size'?",
        ),
        (format!("{good} --set hidden_size=many"), "job.hidden_size in hidden_size=many is the string", ""),
        (format!("{good} --set hidden_size"), "--set hidden_size has no '='", "write --set KEY=VALUE"),
        (format!("{good} --set hidden_size=99999999999"), "job.hidden_size is not usable: ", ""),
        (format!("{good} --set hidden_size=99999"), "hidden_size is 99999, the most supported is 16384", ""),
        (format!("{good} --set keep_prob=0"), "keep_prob is 0, it must lie in (0, 1]", ""),
        (format!("{good} --set learning_rate=nan"), "learning_rate is NaN, it must be a number above 0", ""),
        (format!("{good} --set cell=lstn"), "job.cell is not usable: unknown variant `lstn`", ""),
        (
            format!("{good} --set precision=f16"),
            "job.precision is not usable: unknown variant `f16`, expected one of `f32`, `bf16`, `tf32`",
            "",
        ),
        (
            format!("{good} --set precision=tf32 --device cpu"),
            "precision is tf32, which only GPUs have",
            "give --device cuda or wgpu, or --set precision=f32 or bf16",
        ),
        (
            format!("{good} --shards 65"),
            "shards is 65 but batch_size is 64: a shard would have no row",
            "--shards 64",
        ),
        (format!("{good} --workers 0"), "workers is 0, it must be at least 1", ""),
        (format!("{good} --workers 20000"), "workers is 20000, the most supported is 16384", ""),
        (
            format!("{good} --epochs 0"),
            "epochs and steps are both 0: there is nothing to do",
            "--epochs or --steps",
        ),
        (format!("{good} --config {no_toml}"), "the job file is not valid TOML: ", ""),
        (
            format!("{good} --config {no_section}"),
            "unknown section 'jobs' in the job file",
            "did you mean 'job'?",
        ),
        (
            format!("{good} --config /"),
            "cannot read the job file /: Is a directory",
            "--config takes a TOML file",
        ),
    ];
    for (job, sentence, hint) in cases {
        let run = folder.run("run", &job);
        run.end("").expect_refusal(2, sentence, hint);
        assert!(!run.dir().exists(), "a refused start leaves no run directory: {job}");
    }
    assert_eq!(files_below(folder.path()), before);
}

#[test]
fn what_the_parser_refuses_ends_with_the_same_code() {
    let folder = Folder::new();
    for options in ["--threads 0", "--threads 5000", "--set", "--steps -1", "--http here", "--no-such-option"]
    {
        let run = folder.run("run", &job(&folder));
        let ended = run.end(options);
        ended.expect_failure(2, &["error: "]);
        ended.expect_no_panic();
        assert!(!run.dir().exists(), "a refused start leaves no run directory: {options}");
    }
}

#[test]
fn a_port_in_use_is_refused() {
    let folder = Folder::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let run = folder.run("run", &job(&folder));
    let sentence = |what: &str| format!("cannot listen on {address} for {what}: Address already in use");
    run.end(&format!("--epochs 1 --http {address}")).expect_refusal(
        2,
        &sentence("status and metrics"),
        "choose another address with --http, or port 0 for any free one",
    );
    let mut command = lockstep();
    command.arg("coordinator").args(run.words()).args(["--http", "127.0.0.1:0", "--listen"]);
    Process::start(command.arg(address.to_string())).end().expect_refusal(
        2,
        &sentence("workers"),
        "choose another address with --listen",
    );
    assert!(!run.dir().exists(), "a refused start leaves no run directory");
}

#[test]
fn an_option_of_a_coordinator_that_cannot_be_meant_is_refused() {
    let folder = Folder::new();
    let here = folder.path().display();
    let cases = [
        ("--ready-file /".to_owned(), "/ cannot be the ready file: it is a folder", "--ready-file takes"),
        (
            format!("--ready-file {here}/.."),
            "/.. cannot be the ready file: it is a folder",
            "--ready-file takes",
        ),
        (
            format!("--ready-file {here}/no/such"),
            "/no/such cannot be the ready file: its folder does not exist",
            "--ready-file takes",
        ),
        ("--token-file /".to_owned(), "cannot read the token file /: Is a directory", ""),
        (
            format!("--token-file {here}/no/such"),
            "/no/such: No such file or directory",
            "choose a place that can be written with --token-file",
        ),
        (
            "--listen 0.0.0.0:0".to_owned(),
            "0.0.0.0:0 can be reached from other machines and there is no run token: anybody could join the run",
            "give every process the same --token-file",
        ),
    ];
    for (options, sentence, hint) in cases {
        let run = folder.run("run", &job(&folder));
        let mut command = lockstep();
        command.arg("coordinator").args(run.words()).args([
            "--listen",
            "127.0.0.1:0",
            "--http",
            "127.0.0.1:0",
        ]);
        // A later --listen would be given twice; the parser refuses that, so this one stands alone.
        if options.starts_with("--listen") {
            command = lockstep();
            command.arg("coordinator").args(run.words()).args(["--http", "127.0.0.1:0"]);
        }
        Process::start(command.args(options.split_whitespace())).end().expect_refusal(2, sentence, hint);
        assert!(!run.dir().exists(), "a refused start leaves no run directory: {options}");
    }
}

#[test]
fn a_short_token_protects_no_open_port() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    let mut command = lockstep();
    command.arg("coordinator").args(run.words()).args(["--listen", "0.0.0.0:0", "--http", "127.0.0.1:0"]);
    Process::start(command.env("LOCKSTEP_TOKEN", "fifteen letters")).end().expect_refusal(
        2,
        "0.0.0.0:0 can be reached from other machines and the run token has less than 16 characters",
        "--token-file",
    );
    assert!(!run.dir().exists(), "a refused start leaves no run directory");
}

#[test]
fn a_loss_that_is_not_finite_ends_the_run_before_the_update() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    let ended = run.end("--set learning_rate=3e38 --set clip=none --epochs 10 --workers 2");
    ended.expect_refusal(
        93,
        "its update was not applied",
        "start over with --fresh and a smaller learning_rate or another init",
    );
    assert!(ended.stderr.contains("is not finite (loss "), "{}", ended.stderr);
    // The state before it is kept, for whoever wants to look.
    assert_eq!(run.hashes().step, run.steps_so_far());
    assert!(run.inspect()["step"].as_u64().unwrap() >= 1);
}

/// One that is there is another matter: these are not.
#[test]
fn a_device_that_is_not_there_is_refused_before_anything_starts() {
    let folder = Folder::new();
    let (job, before) = (job(&folder), files_below(folder.path()));
    let refused = |words: &str, sentence: &str| {
        let ended =
            Process::start(lockstep().current_dir(folder.path()).args(words.split_whitespace())).end();
        ended.expect_failure(2, &[sentence]);
    };
    for device in ["gpu", "cpu:0", "cuda:", "cuda:x"] {
        for command in [format!("train {job}"), "worker --coordinator 127.0.0.1:1".to_owned()] {
            refused(
                &format!("{command} --device {device}"),
                &format!(
                    "--device: unknown device '{device}', expected auto, cpu, cuda, cuda:N, wgpu or wgpu:N"
                ),
            );
        }
    }
    for device in ["cuda:4096", "wgpu:4096"] {
        refused(&format!("train {job} --device {device}"), &format!("--device {device}: "));
    }
    assert_eq!(files_below(folder.path()), before);
}

#[cfg(not(feature = "tls"))]
#[test]
fn a_build_without_tls_says_so_whoever_asks_for_it() {
    let folder = Folder::new();
    let job = job(&folder);
    for words in [format!("train {job} --tls no.pem"), format!("coordinator {job} --tls no.pem")]
        .into_iter()
        .chain(["worker --coordinator 127.0.0.1:1 --tls no.pem".to_owned(), "cert".to_owned()])
    {
        let ended =
            Process::start(lockstep().current_dir(folder.path()).args(words.split_whitespace())).end();
        ended.expect_refusal(2, "this build has no TLS", "cargo build --release --features tls");
    }
}
