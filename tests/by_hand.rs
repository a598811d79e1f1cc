//! A coordinator and workers that are started one by one, as on a cluster, do what `lockstep train` does.

mod common;

use std::io::Write;
use std::net::TcpStream;

use common::{Coordinator, Folder, Process, lockstep};

const SETTINGS: &str = "--set hidden_size=16 --set seq_len=10 --set keep_prob=0.8 --steps 30";

#[test]
fn three_workers_without_disk_or_data_do_what_train_does() {
    let folder = Folder::new();
    let job = format!("char-lstm --data {} {SETTINGS}", folder.text(12_000));
    let expected = folder.run("train", &job).train("--workers 3");

    let run = folder.run("by-hand", &job);
    let coordinator = Coordinator::start(&run, "--workers 3", None);
    let places = [1, 2, 3].map(|number| folder.empty(&format!("worker-{number}")));
    let workers = places.each_ref().map(|place| coordinator.worker(place, ""));
    for process in workers.into_iter().chain([coordinator.process]) {
        process.end().expect_exit(0);
    }
    assert_eq!(run.hashes(), expected);
    for place in places {
        assert_eq!(std::fs::read_dir(place).unwrap().count(), 0, "a worker has written a file");
    }
}

#[test]
fn strangers_are_refused_and_change_nothing() {
    let folder = Folder::new();
    let job = format!("char-lstm --data {} {SETTINGS}", folder.text(12_000));
    let expected = folder.run("train", &job).train("--workers 2");

    let run = folder.run("by-hand", &job);
    let mut coordinator = Coordinator::start(&run, "--workers 2", Some("the right token"));
    let here = folder.empty("worker");
    let first = coordinator.worker(&here, "");
    for token in [Some("the wrong token"), None] {
        let ended = coordinator.worker_with_token(&here, "", token).end();
        ended.expect_failure(1, &["error: ", "hint: ", "token", "LOCKSTEP_TOKEN"]);
        assert_eq!(ended.stderr.lines().count(), 2, "{}", ended.stderr);
    }
    // Somebody who takes the control port for a web server, and somebody who says nothing at all.
    let mut web = TcpStream::connect(&coordinator.control).unwrap();
    web.write_all(b"GET / HTTP/1.1\r\nHost: lockstep\r\n\r\n").unwrap();
    let _silent = TcpStream::connect(&coordinator.control).unwrap();
    let warning = coordinator.process.line_with("was refused");
    assert!(warning.contains("127.0.0.1"), "{warning}");

    let second = coordinator.worker(&here, "");
    for process in [first, second, coordinator.process] {
        process.end().expect_exit(0);
    }
    assert_eq!(run.hashes(), expected);
}

#[test]
fn the_token_may_come_from_a_file() {
    let folder = Folder::new();
    let job = format!("char-lstm --data {} {SETTINGS}", folder.text(12_000));
    let token = folder.path().join("token");
    std::fs::write(&token, "from a file\n").unwrap();
    let option = format!("--token-file {}", token.display());
    let run = folder.run("by-hand", &job);
    let coordinator = Coordinator::start(&run, &format!("--workers 2 {option}"), None);
    let here = folder.empty("worker");
    let workers =
        [coordinator.worker(&here, &option), coordinator.worker_with_token(&here, "", Some("from a file"))];
    for process in workers.into_iter().chain([coordinator.process]) {
        process.end().expect_exit(0);
    }
    assert_eq!(run.hashes().step, 30);
}

#[test]
fn an_open_address_without_a_token_is_refused() {
    let folder = Folder::new();
    let run = folder.run("run", &format!("char-lstm --data {} {SETTINGS}", folder.text(12_000)));
    let mut command = lockstep();
    command.arg("coordinator").args(run.words()).args(["--listen", "0.0.0.0:0", "--http", "127.0.0.1:0"]);
    Process::start(&mut command).end().expect_failure(
        2,
        &[
            "error: 0.0.0.0:0 can be reached from other machines",
            "hint: make a token with `openssl rand -hex 16`",
        ],
    );
    assert!(!run.dir().exists(), "a refused start leaves no run directory");
}

#[test]
fn a_worker_may_come_before_its_coordinator() {
    let folder = Folder::new();
    let job = format!("char-lstm --data {} {SETTINGS}", folder.text(12_000));
    // A port that was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("127.0.0.1:{port}");
    let worker = Process::start(lockstep().args(["worker", "--coordinator", &address]));
    std::thread::sleep(std::time::Duration::from_millis(300));
    let run = folder.run("run", &job);
    let mut command = lockstep();
    command.arg("coordinator").args(run.words()).args(["--workers", "1", "--http", "127.0.0.1:0"]);
    let coordinator = Process::start(command.args(["--listen", &address]));
    worker.end().expect_exit(0);
    coordinator.end().expect_exit(0);
    assert_eq!(run.hashes().step, 30);
}
