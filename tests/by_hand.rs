//! A coordinator and workers that are started one by one, as on a cluster, do what `lockstep train` does.

mod common;

use std::fs::Permissions;
use std::io::Write;
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;

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
fn a_coordinator_makes_the_token_file_that_its_workers_read() {
    let folder = Folder::new();
    let job = format!("char-lstm --data {} {SETTINGS}", folder.text(12_000));
    let token = folder.path().join("token");
    let option = format!("--token-file {}", token.display());
    let run = folder.run("by-hand", &job);
    let coordinator = Coordinator::start(&run, &format!("--workers 2 {option}"), None);
    let mode = std::fs::metadata(&token).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let text = std::fs::read_to_string(&token).unwrap();
    let here = folder.empty("worker");
    let workers =
        [coordinator.worker(&here, &option), coordinator.worker_with_token(&here, "", Some(text.trim()))];
    let mut said = String::new();
    for process in workers.into_iter().chain([coordinator.process]) {
        let ended = process.end();
        ended.expect_exit(0);
        said += &ended.stderr;
    }
    assert!(said.contains(&format!("made a run token: give every worker {option}")), "{said}");
    assert_eq!(run.hashes().step, 30);

    std::fs::set_permissions(&token, Permissions::from_mode(0o644)).unwrap();
    let mut command = lockstep();
    command.arg("worker").args(["--coordinator", "127.0.0.1:9"]).args(option.split_whitespace());
    Process::start(&mut command).end().expect_refusal(
        2,
        &format!("the token file {} is open to others than its owner (mode 0644)", token.display()),
        &format!("chmod 600 {}", token.display()),
    );
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
