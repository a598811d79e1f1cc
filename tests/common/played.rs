//! A coordinator that a test plays itself, message by message, over a real socket.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use protocol::frame::{Frame, decode, encode_message, length_prefix};
use protocol::handshake::{HELLO_BYTES, Handshake, PROOF_BYTES, Plane, Token};
use protocol::message::{ToCoordinator, ToWorker};

use super::process::{Process, lockstep};

/// The token of both sides.
pub(crate) const TOKEN: &str = "a token of both sides";

/// Starts a worker whose coordinator the test plays, and waits until it connects.
pub(crate) fn worker_against_this(options: &[&str]) -> (Process, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut command = lockstep();
    command.args(["worker", "--coordinator", &listener.local_addr().unwrap().to_string()]);
    let worker = Process::start(command.args(options).env("LOCKSTEP_TOKEN", TOKEN));
    (worker, listener.accept().unwrap().0)
}

/// Proves the token as the answerer of a control connection.
pub(crate) fn answer(stream: &mut TcpStream) {
    let own = Handshake::answerer(Plane::Control, &Token::new(TOKEN)).unwrap();
    let (mut theirs, mut proof) = ([0; HELLO_BYTES], [0; PROOF_BYTES]);
    stream.read_exact(&mut theirs).unwrap();
    stream.write_all(&own.hello()).unwrap();
    let proofs = own.proofs(&theirs).unwrap();
    stream.read_exact(&mut proof).unwrap();
    proofs.check(&proof).unwrap();
    stream.write_all(&proofs.ours).unwrap();
}

/// Says these one after the other, in one piece.
pub(crate) fn say(stream: &mut TcpStream, messages: &[ToWorker]) {
    let frame = |message| {
        let frame = encode_message(message);
        [&length_prefix(&frame)[..], &frame].concat()
    };
    stream.write_all(&messages.iter().flat_map(frame).collect::<Vec<u8>>()).unwrap();
}

/// Waits for what the worker says that is wanted, and passes over everything else.
pub(crate) fn hear<T>(stream: &mut TcpStream, mut wanted: impl FnMut(ToCoordinator) -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        // Signs of life come all the time.
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        stream.set_read_timeout(Some(left)).unwrap();
        let mut length = [0; 4];
        stream.read_exact(&mut length).expect("the worker says what is waited for within 20 s");
        let mut frame = vec![0; u32::from_be_bytes(length) as usize];
        stream.read_exact(&mut frame).unwrap();
        let Frame::Message(message) = decode(frame.into()).unwrap() else { continue };
        if let Some(heard) = wanted(message) {
            return heard;
        }
    }
}
