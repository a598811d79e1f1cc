//! Whoever is at the other end of a connection by mistake, or with bad intent, is named and changes nothing.

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use common::played::{TOKEN, answer, worker_against_this};
use common::{Coordinator, Ended, Folder, Process, lockstep};
use protocol::frame::FRAME_LIMIT_BYTES;
use protocol::handshake::{HELLO_BYTES, Handshake, PROOF_BYTES, Plane, Token};
use protocol::message::PROTOCOL_VERSION;

/// The first message of a side that speaks another version.
fn hello_of_version(version: u16, plane: u8) -> Vec<u8> {
    [&b"LOCKSTEP"[..], &version.to_le_bytes(), &[plane], &[7; 32]].concat()
}

/// Proves the token as the opener of a control connection.
fn prove(stream: &mut TcpStream) {
    let own = Handshake::opener(Plane::Control, &Token::new(TOKEN)).unwrap();
    let (mut theirs, mut proof) = ([0; HELLO_BYTES], [0; PROOF_BYTES]);
    stream.write_all(&own.hello()).unwrap();
    stream.read_exact(&mut theirs).unwrap();
    let proofs = own.proofs(&theirs).unwrap();
    stream.write_all(&proofs.ours).unwrap();
    stream.read_exact(&mut proof).unwrap();
    proofs.check(&proof).unwrap();
}

/// A frame of which nothing comes but a length over the limit.
fn too_long() -> [u8; 4] {
    (FRAME_LIMIT_BYTES as u32 + 1).to_be_bytes()
}

/// How a real worker ends whose coordinator is played by `coordinator`.
fn worker_against(coordinator: impl FnOnce(&mut TcpStream)) -> Ended {
    let (worker, mut stream) = worker_against_this(&[]);
    coordinator(&mut stream);
    // Held open, so that the worker's end is its own decision.
    let ended = worker.end();
    drop(stream);
    ended
}

/// What a worker finds in its coordinator's place.
type Played = fn(&mut TcpStream);

#[test]
fn a_worker_names_what_answers_in_the_coordinators_place() {
    let hint_of_token = "give every process of the run the same token";
    let cases: [(Played, String, &str); 5] = [
        (
            |stream| stream.write_all(&hello_of_version(9, 0)).unwrap(),
            format!("the other side speaks protocol 9, this one {PROTOCOL_VERSION}"),
            "build both from one commit",
        ),
        (
            |stream| stream.write_all(&b"HTTP/1.1 400 Bad Request\r\n".repeat(3)).unwrap(),
            "the other side of the connection is not Lockstep".to_owned(),
            "check the host and the port",
        ),
        (
            |stream| {
                stream.write_all(&hello_of_version(PROTOCOL_VERSION, 0)).unwrap();
                stream.write_all(&[3; PROOF_BYTES]).unwrap();
            },
            "the other side of the connection has another run token".to_owned(),
            hint_of_token,
        ),
        (
            |stream| {
                answer(stream);
                stream.write_all(&too_long()).unwrap();
            },
            "lost the connection to the coordinator: frame size too big".to_owned(),
            "the coordinator's own output says why it ended",
        ),
        (
            |stream| {
                answer(stream);
                stream.write_all(&[0, 0, 0, 3, 0, 77, 77]).unwrap();
            },
            "the coordinator sent a frame that is not a message: ".to_owned(),
            "build both from one commit",
        ),
    ];
    for (coordinator, sentence, hint) in cases {
        worker_against(coordinator).expect_refusal(1, &sentence, hint);
    }
}

#[test]
fn a_worker_with_another_token_tries_no_longer_than_that_can_be_an_accident() {
    let folder = Folder::new();
    let run = folder.run("run", &format!("char-lstm --data {}", folder.text(12_000)));
    let mut coordinator = Coordinator::start(&run, "--workers 1", Some("a token that is not the worker's"));
    let mut command = lockstep();
    command.args(["worker", "--coordinator", &coordinator.control]);
    let worker = Process::start(command.env("LOCKSTEP_TOKEN", TOKEN));
    for _ in 0..4 {
        coordinator.process.line_with("was refused: the other side of the connection has another run token");
    }
    worker.end().expect_refusal(
        1,
        "the coordinator closed the connection during the handshake",
        "give every process of the run the same token",
    );
}

#[test]
fn a_coordinator_that_says_nothing_is_given_up() {
    worker_against(|_| {}).expect_refusal(
        1,
        "did not answer the handshake within 10 s",
        "check that this is the coordinator's control port",
    );
}

#[test]
fn a_worker_that_cannot_be_passed_on_is_refused_before_it_connects_further() {
    let name = "x".repeat(300);
    for (name, sentence) in [
        (name.as_str(), "the worker's name has 300 bytes, the most supported is 256"),
        ("\u{1b}[2Jcleared", "the worker's name \"\\u{1b}[2Jcleared\" has control characters"),
    ] {
        let (worker, mut stream) = worker_against_this(&["--name", name]);
        answer(&mut stream);
        worker.end().expect_refusal(2, sentence, "");
    }
}

#[test]
fn whoever_is_no_worker_of_the_run_is_refused_and_changes_nothing() {
    let folder = Folder::new();
    let settings = "--set hidden_size=16 --set seq_len=10 --steps 20";
    let job = format!("char-lstm --data {} {settings}", folder.text(12_000));
    let expected = folder.run("undisturbed", &job).train("--workers 2");
    let run = folder.run("run", &job);
    let mut coordinator = Coordinator::start(&run, "--workers 2", Some(TOKEN));
    let here = folder.empty("worker");

    let connect = || TcpStream::connect(&coordinator.control).unwrap();
    // More than may be unproved at once, and each says a little of what a worker would.
    let mut slow: Vec<TcpStream> = (0..300).map(|_| connect()).collect();
    slow.iter_mut().for_each(|stream| drop(stream.write_all(b"LOCKST")));

    let mut other_version = connect();
    other_version.write_all(&hello_of_version(9, 1)).unwrap();
    let mut theirs = [0; HELLO_BYTES];
    other_version.read_exact(&mut theirs).unwrap();
    assert_eq!(theirs[..11], *hello_of_version(PROTOCOL_VERSION, 0).first_chunk::<11>().unwrap());
    connect().write_all(&hello_of_version(PROTOCOL_VERSION, 2)).unwrap();
    connect().write_all(&b"GET / HTTP/1.1\r\n\r\n".repeat(3)).unwrap();
    let mut proved = connect();
    prove(&mut proved);
    proved.write_all(&too_long()).unwrap();
    let mut no_hello = connect();
    prove(&mut no_hello);
    no_hello.write_all(&[0, 0, 0, 13, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]).unwrap();

    for sentence in [
        &format!("was refused: the other side speaks protocol 9, this one {PROTOCOL_VERSION}"),
        "was refused: a connection for plane 2 came to the port for plane 1",
        "was refused: the other side of the connection is not Lockstep",
        "was refused: the connection broke during the handshake: frame size too big",
        "was refused: its first message was not a hello",
        "was closed unproved: too many others wait",
    ] {
        coordinator.process.line_with(sentence);
    }
    for stream in [&mut other_version, &mut proved, &mut no_hello] {
        assert!(is_closed(stream), "a refused connection is still open");
    }

    let workers = [coordinator.worker(&here, ""), coordinator.worker(&here, "")];
    for process in workers.into_iter().chain([coordinator.process]) {
        let ended = process.end();
        ended.expect_exit(0);
        ended.expect_no_panic();
    }
    assert_eq!(run.hashes(), expected);
}

fn is_closed(stream: &mut TcpStream) -> bool {
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    match stream.read(&mut [0; 64]) {
        Ok(count) => count == 0,
        Err(error) => !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut),
    }
}
