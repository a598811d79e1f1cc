//! What the processes of a run say to each other with `--tls`: the same bits, nothing to read on the wire, and a sentence
//! for everybody who does not belong.

mod common;

use std::os::unix::fs::PermissionsExt;

use common::{Coordinator, Direction, Ended, Folder, Process, Proxy, Run, eventually, get, lockstep};

const TOKEN: &str = "a token of this test";

/// What the hello of every connection and the names of workers look like without TLS.
const MAGIC: &[u8] = b"LOCKSTEP";
const NAME: &[u8] = b"a-worker-by-name";

/// 16 steps are an epoch.
fn job(folder: &Folder) -> String {
    let text = folder.text(12_000);
    format!("char-lstm --data {text} --set hidden_size=32 --set seq_len=10 --set keep_prob=0.8")
}

/// A new certificate file in the folder.
fn certificate(folder: &Folder, name: &str) -> String {
    let path = folder.path().join(name).to_str().unwrap().to_owned();
    cert(&path).expect_exit(0);
    path
}

fn cert(path: &str) -> Ended {
    Process::start(lockstep().args(["cert", path])).end()
}

/// The word "shards" as a batch has it: the text's characters are tokens in their own order, of two bytes each.
fn training_text(folder: &Folder) -> Vec<u8> {
    let mut characters: Vec<char> = std::fs::read_to_string(folder.text(12_000)).unwrap().chars().collect();
    characters.sort_unstable();
    characters.dedup();
    let token = |char| characters.iter().position(|known| *known == char).unwrap() as u16;
    "shards".chars().flat_map(|char| token(char).to_le_bytes()).collect()
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

/// Trains with two workers on whose connections somebody listens, and gives the run and what was heard, of the control
/// plane and of the data plane.
fn overheard(folder: &Folder, name: &str, options: &str) -> (Run, [Vec<u8>; 2]) {
    let run = folder.run(name, &job(folder));
    let mut coordinator = Coordinator::start(&run, &format!("--steps 40 --workers 2 {options}"), Some(TOKEN));
    let control = Proxy::start("127.0.0.1:0", &coordinator.control);
    control.record();
    let here = folder.empty(&format!("worker of {name}"));
    // The other reaches the first worker at an address of a proxy's.
    let first = coordinator.worker(&here, &format!("--name first --advertise 127.0.0.2 {options}"));
    let address = eventually("the first worker's address", || {
        let status: serde_json::Value =
            serde_json::from_str(&get(&coordinator.http, "/status.json").body).ok()?;
        let (_, worker) = status["workers"].as_object()?.iter().next()?;
        worker["address"].as_str().map(str::to_owned)
    });
    let data = Proxy::start(&address, &address.replace("127.0.0.2", "127.0.0.1"));
    data.record();
    let name = std::str::from_utf8(NAME).unwrap();
    let second = coordinator.worker_at(&control.address, &here, &format!("--name {name} {options}"));
    coordinator.process.line_with("done: 40 steps");
    for process in [coordinator.process, first, second] {
        process.end().expect_exit(0);
    }
    for proxy in [&control, &data] {
        assert!(proxy.passed(Direction::There) > 1000 && proxy.passed(Direction::Back) > 1000);
    }
    (run, [control.heard(), data.heard()])
}

#[test]
fn nobody_can_read_what_travels_and_the_bits_are_the_same() {
    let folder = Folder::new();
    let file = certificate(&folder, "run.pem");
    let (plain, [control, data]) = overheard(&folder, "plain", "");
    let text = training_text(&folder);
    // What a listener finds without TLS.
    for part in [MAGIC, NAME, &text] {
        assert!(contains(&control, part), "{part:?} is not where it is looked for");
    }
    assert!(contains(&data, MAGIC));
    let (secret, [control, data]) = overheard(&folder, "secret", &format!("--tls {file}"));
    for heard in [control, data] {
        for part in [MAGIC, NAME, &text, TOKEN.as_bytes()] {
            assert!(!contains(&heard, part), "{part:?} can be read");
        }
    }
    assert_eq!(secret.hashes(), plain.hashes());
}

#[test]
fn train_passes_the_certificate_on() {
    let folder = Folder::new();
    let file = certificate(&folder, "run.pem");
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let trained = folder.run("run", &job(&folder)).train(&format!("--steps 20 --workers 3 --tls {file}"));
    assert_eq!(trained, folder.run("plain", &job(&folder)).train("--steps 20 --workers 1"));
    // As a variable, for processes that a scheduler starts.
    let run = folder.run("variable", &job(&folder));
    let mut command = lockstep();
    command.arg("train").args(run.words()).args(["--steps", "20", "--workers", "2"]);
    Process::start(command.env("LOCKSTEP_TLS", &file)).end().expect_exit(0);
    assert_eq!(run.hashes(), trained);
}

/// What a worker ends with, and what the coordinator says of it. Both have the same token.
fn refused(coordinator_options: &str, worker_options: &str) -> (Ended, String) {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    let mut coordinator =
        Coordinator::start(&run, &format!("--workers 1 {coordinator_options}"), Some(TOKEN));
    let worker = coordinator.worker(&folder.empty("worker"), worker_options).end();
    let line = coordinator.process.line_with("was refused: ");
    (worker, line.split_once("was refused: ").unwrap().1.trim_end().to_owned())
}

const HINT: &str = "give every process of the run the same --tls FILE, or none of them";

#[test]
fn who_has_another_certificate_is_refused() {
    let folder = Folder::new();
    let (one, other) = (certificate(&folder, "one.pem"), certificate(&folder, "other.pem"));
    let (worker, coordinator) = refused(&format!("--tls {one}"), &format!("--tls {other}"));
    let sentence = "the other side of the connection has another certificate";
    worker.expect_refusal(1, sentence, HINT);
    assert_eq!(coordinator, sentence);
}

#[test]
fn who_speaks_without_tls_is_told_on_both_sides() {
    let folder = Folder::new();
    let option = format!("--tls {}", certificate(&folder, "run.pem"));
    let (worker, coordinator) = refused(&option, "");
    worker.expect_refusal(1, "the other side of the connection speaks TLS, this one does not", HINT);
    assert_eq!(coordinator, "what the other side of the connection sent is not TLS");
    let (worker, coordinator) = refused("", &option);
    worker.expect_refusal(1, "what the other side of the connection sent is not TLS", HINT);
    assert_eq!(coordinator, "the other side of the connection speaks TLS, this one does not");
}

#[test]
fn a_certificate_does_not_replace_the_token() {
    let folder = Folder::new();
    let option = format!("--tls {}", certificate(&folder, "run.pem"));
    let run = folder.run("run", &job(&folder));
    let mut coordinator = Coordinator::start(&run, &format!("--workers 1 {option}"), Some(TOKEN));
    let here = folder.empty("worker");
    let worker = coordinator.worker_with_token(&here, &option, Some("another token"));
    worker.end().expect_failure(1, &["the coordinator closed the connection during the handshake"]);
    coordinator.process.line_with("the other side of the connection has another run token");
}

#[test]
fn files_that_cannot_be_used_are_refused_before_anything_starts() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    let with = |options: &str| run.end(&format!("--steps 1 {options}"));
    let file = certificate(&folder, "run.pem");
    cert(&file).expect_refusal(2, "run.pem exists already", "choose another name, or delete it first");
    with("--tls nowhere.pem").expect_refusal(
        2,
        "cannot read the certificate file nowhere.pem",
        "lockstep cert FILE",
    );
    with(&format!("--collective nccl --tls {file}")).expect_refusal(
        2,
        "--collective nccl encrypts nothing, and --tls asks for it",
        "with --tls gradients travel by tcp",
    );

    let text = std::fs::read_to_string(&file).unwrap();
    let key_at = text.find("-----BEGIN PRIVATE KEY").unwrap();
    let other = std::fs::read_to_string(certificate(&folder, "other.pem")).unwrap();
    let others_key = &other[other.find("-----BEGIN PRIVATE KEY").unwrap()..];
    for content in ["", &text[..key_at], &text[key_at..], &[&text[..key_at], others_key].concat()] {
        std::fs::write(&file, content).unwrap();
        with(&format!("--tls {file}")).expect_refusal(
            2,
            "run.pem holds no certificate with its key",
            "lockstep cert FILE",
        );
    }
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
    with(&format!("--tls {file}")).expect_refusal(
        2,
        "is open to others than its owner (mode 0644)",
        "chmod 600",
    );
    assert!(!run.dir().exists());
}
