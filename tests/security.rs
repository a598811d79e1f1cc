//! Whoever is not of the run changes nothing of it, however many there are and whatever they send; see docs/security.md.
//!
//! Each test ends with workers that train to the hashes of an undisturbed run, no panic, and a coordinator that has stayed
//! small.

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{Coordinator, Folder, Hashes, Run, eventually};
use protocol::frame::{BulkHeader, BulkKind, FRAME_LIMIT_BYTES, encode_bulk, encode_message};
use protocol::handshake::{HELLO_BYTES, Handshake, PROOF_BYTES, Plane, Token};
use protocol::message::{PROTOCOL_VERSION, ToCoordinator};
use rustix::process::{Resource, Signal, getrlimit};

const TOKEN: &str = "a token that the others lack";

/// The coordinator of these tests takes 20 to 30 MB; whatever a stranger can make it hold stays far below this.
const MOST_MEMORY_BYTES: u64 = 256 << 20;

/// A run that waits for its workers, and what it must end with.
struct Besieged {
    folder: Folder,
    run: Run,
    expected: Hashes,
    coordinator: Coordinator,
}

impl Besieged {
    fn start() -> Self {
        let folder = Folder::new();
        let settings = "--set hidden_size=16 --set seq_len=10 --steps 200";
        let job = format!("char-lstm --data {} {settings}", folder.text(12_000));
        let expected = folder.run("undisturbed", &job).train("--workers 1");
        let run = folder.run("run", &job);
        let coordinator = Coordinator::start(&run, "--workers 2", Some(TOKEN));
        Self { folder, run, expected, coordinator }
    }

    fn connect(&self) -> TcpStream {
        connect(&self.coordinator)
    }

    /// Lets the workers in, and checks that nothing has changed.
    fn expect_unharmed(self) {
        let here = self.folder.empty("worker");
        let workers = [self.coordinator.worker(&here, ""), self.coordinator.worker(&here, "")];
        let mut process = self.coordinator.process;
        process.line_with("done: 200 steps");
        let ended = process.end();
        ended.expect_no_panic();
        ended.expect_exit(0);
        workers.into_iter().for_each(|worker| worker.end().expect_exit(0));
        assert_eq!(self.run.hashes(), self.expected);
    }
}

fn connect(coordinator: &Coordinator) -> TcpStream {
    let stream = TcpStream::connect(&coordinator.control).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

/// Looks at the most memory that the coordinator has held so far.
fn expect_small(coordinator: &Coordinator) {
    let status = std::fs::read_to_string(format!("/proc/{}/status", coordinator.process.pid())).unwrap();
    let most = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.strip_suffix("kB")).unwrap();
    let bytes = most.trim().parse::<u64>().unwrap() << 10;
    println!("the coordinator has held up to {} MiB", bytes >> 20);
    assert!(bytes < MOST_MEMORY_BYTES, "{bytes} bytes");
}

fn is_long() -> bool {
    std::env::var_os("LOCKSTEP_LONG").is_some()
}

/// Connections that come one after another, and of these how many stay at once: as many as this process may hold.
fn numbers() -> (usize, usize) {
    let in_sequence = if is_long() { 10_000 } else { 1_000 };
    let open_files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    (in_sequence, open_files.saturating_sub(200).min(in_sequence as u64) as usize)
}

/// Proves the token as a worker does; gives what it sent.
fn prove(stream: &mut TcpStream, token: &str) -> std::io::Result<Vec<u8>> {
    let own = Handshake::opener(Plane::Control, &Token::new(token)).unwrap();
    let (mut theirs, mut proof) = ([0; HELLO_BYTES], [0; PROOF_BYTES]);
    stream.write_all(&own.hello())?;
    stream.read_exact(&mut theirs)?;
    let proofs = own.proofs(&theirs).unwrap();
    stream.write_all(&proofs.ours)?;
    stream.read_exact(&mut proof)?;
    proofs.check(&proof).unwrap();
    Ok([&own.hello()[..], &proofs.ours].concat())
}

/// Whether the other side has closed the connection, whatever it sent before.
fn is_closed(stream: &mut TcpStream) -> bool {
    let mut buffer = [0; 256];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut),
        }
    }
}

#[test]
fn wrong_tokens_replayed_handshakes_and_other_versions_are_refused() {
    let mut siege = Besieged::start();
    for token in ["", "a token that the others lacK"] {
        let mut stream = siege.connect();
        let refused = prove(&mut stream, token).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::UnexpectedEof, "the coordinator proves itself to nobody else");
        siege
            .coordinator
            .process
            .line_with("was refused: the other side of the connection has another run token");
    }

    // What a worker once sent, byte for byte: its proof is of the nonce that the coordinator drew then.
    let recorded = prove(&mut siege.connect(), TOKEN).unwrap();
    let mut replayed = siege.connect();
    replayed.write_all(&recorded).unwrap();
    let mut answer = Vec::new();
    let _ = replayed.read_to_end(&mut answer);
    assert_eq!(answer.len(), HELLO_BYTES, "only its hello answers a replay");

    // Other versions are refused before anybody proves anything: there is no older handshake to fall back to.
    for version in [0, PROTOCOL_VERSION - 1, PROTOCOL_VERSION + 1, u16::MAX] {
        let mut stream = siege.connect();
        let mut hello = Handshake::opener(Plane::Control, &Token::new(TOKEN)).unwrap().hello();
        hello[8..10].copy_from_slice(&version.to_le_bytes());
        stream.write_all(&hello).unwrap();
        assert!(is_closed(&mut stream), "version {version}");
        let sentence =
            format!("was refused: the other side speaks protocol {version}, this one {PROTOCOL_VERSION}");
        siege.coordinator.process.line_with(&sentence);
    }
    expect_small(&siege.coordinator);
    siege.expect_unharmed();
}

#[test]
fn oversized_and_malformed_frames_change_nothing_before_and_after_the_token_is_proved() {
    let siege = Besieged::start();
    let frame = |content: &[u8]| [&(content.len() as u32).to_be_bytes()[..], content].concat();
    let header = BulkHeader { kind: BulkKind::State, generation: 1, step: 1, sequence: 0, tag: 0 };
    let mut damaged = encode_bulk(&header, b"payload").to_vec();
    *damaged.last_mut().unwrap() ^= 1;
    let connected = encode_message(&ToCoordinator::Connected { generation: 1 });
    let contents: Vec<Vec<u8>> = vec![
        (FRAME_LIMIT_BYTES as u32 + 1).to_be_bytes().to_vec(),
        u32::MAX.to_be_bytes().to_vec(),
        frame(&[]),
        frame(&[9; 100]),
        frame(&[0; 3]),
        // A hello whose first text says that it has 2^63 bytes.
        frame(&[&[0; 5][..], &(1_u64 << 63).to_le_bytes()].concat()),
        frame(&[0; 65_536]),
        frame(&damaged),
        frame(&encode_bulk(&header, b"payload")),
        frame(&connected),
        frame(&[&connected[..], b"more"].concat()),
    ];
    for content in &contents {
        let mut stranger = siege.connect();
        // Longer than a hello, so that none of it is waited for.
        let _ = stranger.write_all(&[&content[..], &[0; HELLO_BYTES]].concat());
        assert!(is_closed(&mut stranger), "unproved: {:?}", &content[..content.len().min(40)]);
        let mut proved = siege.connect();
        prove(&mut proved, TOKEN).unwrap();
        let _ = proved.write_all(content);
        assert!(is_closed(&mut proved), "proved: {:?}", &content[..content.len().min(40)]);
    }
    // The longest frame that is allowed is read, and is no message.
    let mut longest = siege.connect();
    prove(&mut longest, TOKEN).unwrap();
    let _ = longest.write_all(&frame(&vec![0; FRAME_LIMIT_BYTES]));
    assert!(is_closed(&mut longest));
    expect_small(&siege.coordinator);
    siege.expect_unharmed();
}

#[test]
fn connections_that_drip_or_come_by_the_thousand_keep_no_worker_out() {
    let siege = Besieged::start();
    let (in_sequence, at_once) = numbers();
    let control = siege.coordinator.control.clone();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // However this ends: a thread that drips for ever would be waited for.
        let _end = SetOnDrop(&over);
        // 100 connections that begin a hello and send a byte now and then; whoever was closed connects again.
        scope.spawn(|| {
            let hello = Handshake::opener(Plane::Control, &Token::new("")).unwrap().hello();
            let mut dripping: Vec<(Option<TcpStream>, usize)> = (0..100).map(|_| (None, 0)).collect();
            while !over.load(Ordering::Relaxed) {
                for (stream, sent) in &mut dripping {
                    let byte = hello[*sent % HELLO_BYTES];
                    let is_sent = stream.as_mut().is_some_and(|stream| stream.write_all(&[byte]).is_ok());
                    if is_sent {
                        *sent = (*sent + 1).min(HELLO_BYTES - 2);
                    } else {
                        (*stream, *sent) = (TcpStream::connect(&control).ok(), 0);
                    }
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        for number in 0..in_sequence {
            let mut stream = siege.connect();
            let _ = stream.write_all(&number.to_le_bytes());
        }
        let held: Vec<TcpStream> = (0..at_once).map(|_| siege.connect()).collect();
        println!("{in_sequence} connections in sequence, {} at once", held.len());
        expect_small(&siege.coordinator);
        // Both the dripping ones and those that say nothing are there while the workers come and train.
        siege.expect_unharmed();
        drop(held);
    });
}

#[test]
fn workers_that_train_notice_nothing_of_connections_by_the_thousand() {
    let folder = Folder::new();
    let job = format!("char-lstm --data {} --set hidden_size=16 --set seq_len=10", folder.text(12_000));
    let run = folder.run("run", &job);
    let mut coordinator = Coordinator::start(&run, "--workers 2 --epochs 1000000", Some(TOKEN));
    let here = folder.empty("worker");
    let workers = [coordinator.worker(&here, ""), coordinator.worker(&here, "")];
    let wait_for =
        |step: u64| eventually(format!("step {step}"), || (run.steps_so_far() >= step).then_some(()));
    wait_for(20);
    let (in_sequence, at_once) = numbers();
    let (before, began) = (run.steps_so_far(), Instant::now());
    for number in 0..in_sequence {
        let _ = connect(&coordinator).write_all(&number.to_le_bytes());
    }
    let held: Vec<TcpStream> = (0..at_once).map(|_| connect(&coordinator)).collect();
    let (steps, seconds) = (run.steps_so_far() - before, began.elapsed().as_secs_f64());
    println!(
        "{in_sequence} connections in sequence, {} at once, {steps} steps in {seconds:.1} s",
        held.len()
    );
    expect_small(&coordinator);
    wait_for(run.steps_so_far() + 20);
    drop(held);
    coordinator.process.signal(Signal::TERM);
    coordinator.process.end().expect_exit(75);
    workers.into_iter().for_each(|worker| worker.end().expect_exit(75));
    // Nobody was lost, nobody was sent away; a machine with much else to do may let one miss its 5 s.
    let journal = std::fs::read_to_string(run.dir().join("journal")).unwrap();
    let generations = journal.matches(r#""kind":"generation""#).count();
    println!("{generations} generations");
    assert!(generations == 1 || !is_long(), "{journal}");
    let length = format!("--steps {} --workers 1", run.hashes().step + 20);
    assert_eq!(run.train(&length), folder.run("undisturbed", &job).train(&length));
}

struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
