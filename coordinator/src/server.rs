//! The control port: accepts workers, checks the run token, and turns each connection into events and a queue.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use protocol::frame::{BulkHeader, Frame, codec, decode, encode_message, length_prefix};
use protocol::handshake::{HELLO_BYTES, Handshake, PROOF_BYTES, Plane, Token};
use protocol::message::{Goodbye, Hello, ToCoordinator, ToWorker, WORKER_LIMIT, WorkerId};
use protocol::problem::Problem;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufWriter};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;
use tokio_util::codec::{Framed, FramedRead};
use transport::{ControlStream, Side, Tls};

use crate::membership::RETURN_LIMIT;

/// What a connection brings.
#[derive(Debug)]
pub(crate) enum Arrival {
    /// A worker proved the token and said hello.
    Joined(WorkerId, Box<Hello>, Link),
    /// It sent a message.
    Message(WorkerId, ToCoordinator),
    /// It sent bulk data.
    Bulk(WorkerId, BulkHeader, Bytes),
    /// Its connection ended, and why.
    Left(WorkerId, String),
}

/// The way to one worker.
#[derive(Debug, Clone)]
pub(crate) struct Link {
    frames: UnboundedSender<Bytes>,
    /// The worker's address on the control connection.
    pub(crate) peer: SocketAddr,
}

impl Link {
    /// The way to the worker at `peer`, and what is sent on it.
    pub(crate) fn new(peer: SocketAddr) -> (Self, UnboundedReceiver<Bytes>) {
        let (frames, queued) = unbounded_channel();
        (Self { frames, peer }, queued)
    }

    /// Queues a message. A worker that is gone is reported by its connection, not here.
    pub(crate) fn send(&self, message: &ToWorker) {
        self.send_frame(encode_message(message));
    }

    /// Queues the contents of one frame.
    pub(crate) fn send_frame(&self, frame: Bytes) {
        let _ = self.frames.send(frame);
    }
}

/// What the control port bears.
#[derive(Debug, Clone, Copy)]
struct Limits {
    /// A stranger has this long to prove the token and to say hello.
    handshake: Duration,
    /// Connections that may be unproved at once. One more ends the oldest of them: whoever holds connections open
    /// and says nothing keeps nobody else out.
    unproved: usize,
    /// Workers that may be connected at once.
    workers: usize,
}

/// A worker of which nothing comes for this long is taken for lost: one that lives says so every second.
const SILENCE_LIMIT_SECONDS: u32 = 5;

/// Small frames to a worker are written together; longer ones go past this.
const WRITE_BUFFER_BYTES: usize = 4096;

const LIMITS: Limits = Limits { handshake: Duration::from_secs(10), unproved: 256, workers: WORKER_LIMIT };

/// Accepts connections for ever.
pub(crate) async fn accept(
    listener: TcpListener,
    token: Token,
    tls: Option<Tls>,
    arrivals: UnboundedSender<Arrival>,
) {
    accept_within(LIMITS, listener, token, tls, arrivals).await;
}

async fn accept_within(
    limits: Limits,
    listener: TcpListener,
    token: Token,
    tls: Option<Tls>,
    arrivals: UnboundedSender<Arrival>,
) {
    let next_id = Arc::new(AtomicU32::new(1));
    let places = Arc::new(Semaphore::new(limits.workers));
    let mut unproved: VecDeque<(SocketAddr, AbortHandle)> = VecDeque::new();
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, say: others are still served, and it may pass.
                tracing::warn!("cannot accept a connection: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        unproved.retain(|(_, greeting)| !greeting.is_finished());
        if unproved.len() >= limits.unproved
            && let Some((oldest, greeting)) = unproved.pop_front()
        {
            greeting.abort();
            tracing::warn!("a connection from {oldest} was closed unproved: too many others wait");
        }
        let (token, arrivals, next_id) = (token.clone(), arrivals.clone(), next_id.clone());
        let (tls, places) = (tls.clone(), places.clone());
        let greeting = tokio::spawn(async move {
            match tokio::time::timeout(limits.handshake, greet(stream, &token, tls.as_ref(), places)).await {
                Ok(Ok(Greeted { frames, hello, place })) => {
                    let id = next_id.fetch_add(1, Ordering::Relaxed);
                    // A task of its own, since this one may be ended to make room for others.
                    tokio::spawn(async move {
                        serve(id, frames, hello, peer, arrivals).await;
                        drop(place);
                    });
                }
                Ok(Err(problem)) => tracing::warn!("a connection from {peer} was refused: {problem}"),
                Err(_) => tracing::warn!("a connection from {peer} did not finish its handshake in time"),
            }
        });
        unproved.push_back((peer, greeting.abort_handle()));
    }
}

/// Sends home the workers of a run that is over: up to so many, who were left without a goodbye and come in time.
pub(crate) async fn send_home(workers: usize, goodbye: Goodbye, mut arrivals: UnboundedReceiver<Arrival>) {
    let goodbye = ToWorker::Goodbye(goodbye);
    let mut left = 0;
    let all = async {
        while left < workers
            && let Some(arrival) = arrivals.recv().await
        {
            match arrival {
                Arrival::Joined(_, _, link) => link.send(&goodbye),
                Arrival::Left(..) => left += 1,
                Arrival::Message(..) | Arrival::Bulk(..) => {}
            }
        }
    };
    let _ = tokio::time::timeout(RETURN_LIMIT, all).await;
}

type Frames = Framed<ControlStream, tokio_util::codec::LengthDelimitedCodec>;

/// A worker that has proved the token and said hello.
struct Greeted {
    frames: Frames,
    hello: Hello,
    /// Its place among the workers that may be connected.
    place: OwnedSemaphorePermit,
}

/// The handshake and the hello.
async fn greet(
    stream: TcpStream,
    token: &Token,
    tls: Option<&Tls>,
    places: Arc<Semaphore>,
) -> Result<Greeted, Problem> {
    let broken = |e: std::io::Error| {
        e.downcast::<Problem>()
            .unwrap_or_else(|e| Problem::failed(format!("the connection broke during the handshake: {e}")))
    };
    let mut stream = ControlStream::open(stream, Side::Answerer, tls).await.map_err(broken)?;
    let own = Handshake::answerer(Plane::Control, &stream.bind(token))
        .map_err(|e| Problem::failed(format!("the system has no randomness for the handshake: {e}")))?;
    let (mut theirs, mut proof) = ([0; HELLO_BYTES], [0; PROOF_BYTES]);
    stream.read_exact(&mut theirs).await.map_err(broken)?;
    // Also sent to a side that will be refused, so that it can say why.
    stream.write_all(&own.hello()).await.map_err(broken)?;
    let proofs = own.proofs(&theirs)?;
    stream.read_exact(&mut proof).await.map_err(broken)?;
    proofs.check(&proof)?;
    stream.write_all(&proofs.ours).await.map_err(broken)?;

    let mut frames = Framed::new(stream, codec());
    let first =
        frames.next().await.ok_or_else(|| Problem::failed("it closed the connection after the handshake"))?;
    let hello = match decode(first.map_err(broken)?.freeze()) {
        Ok(Frame::Message(ToCoordinator::Hello(hello))) => hello,
        Ok(_) => return Err(Problem::failed("its first message was not a hello")),
        Err(error) => return Err(Problem::failed(format!("it sent {error}"))),
    };
    match admit(&hello, places) {
        Ok(place) => Ok(Greeted { frames, hello, place }),
        Err(problem) => {
            let goodbye = ToWorker::Goodbye(Goodbye::Failed(problem.sentence.clone()));
            frames.send(encode_message(&goodbye)).await.map_err(broken)?;
            Err(problem)
        }
    }
}

/// Gives a worker its place, if what it says of itself is fit to be passed on and there is one.
fn admit(hello: &Hello, places: Arc<Semaphore>) -> Result<OwnedSemaphorePermit, Problem> {
    hello.check()?;
    places.try_acquire_owned().map_err(|_| Problem::failed("there is no place for one more worker"))
}

/// What comes next, if it comes within so many seconds. They are counted one by one: when this process itself was stopped
/// for a while, that is one of them.
async fn next_within<S: futures_util::Stream + Unpin>(
    seconds: u32,
    stream: &mut S,
) -> Option<Option<S::Item>> {
    for _ in 0..seconds {
        if let Ok(next) = tokio::time::timeout(Duration::from_secs(1), stream.next()).await {
            return Some(next);
        }
    }
    None
}

/// Moves frames both ways until the connection ends.
async fn serve(
    id: WorkerId,
    frames: Frames,
    hello: Hello,
    peer: SocketAddr,
    arrivals: UnboundedSender<Arrival>,
) {
    // A buffer that all frames pass through would keep the size of the longest, for each worker.
    let parts = frames.into_parts();
    let (reading, writing) = tokio::io::split(parts.io);
    let mut stream = FramedRead::new(reading, parts.codec);
    *stream.read_buffer_mut() = parts.read_buf;
    let mut sink = BufWriter::with_capacity(WRITE_BUFFER_BYTES, writing);
    let (link, mut queued) = Link::new(peer);
    if arrivals.send(Arrival::Joined(id, Box::new(hello), link)).is_err() {
        return;
    }
    let writer = async {
        while let Some(frame) = queued.recv().await {
            let written = async {
                sink.write_all(&length_prefix(&frame)).await?;
                sink.write_all(&frame).await?;
                if queued.is_empty() { sink.flush().await } else { Ok(()) }
            };
            if let Err(error) = written.await {
                return format!("writing to it failed: {error}");
            }
        }
        let _ = sink.shutdown().await;
        "the coordinator let it go".to_owned()
    };
    let reader = async {
        loop {
            let Some(next) = next_within(SILENCE_LIMIT_SECONDS, &mut stream).await else {
                return format!("nothing came from it for {SILENCE_LIMIT_SECONDS} s");
            };
            let frame = match next {
                None => return "its connection closed; the process has probably ended".to_owned(),
                Some(Err(error)) => return format!("reading from it failed: {error}"),
                Some(Ok(frame)) => frame,
            };
            let arrival = match decode(frame.freeze()) {
                Ok(Frame::Message(message)) => Arrival::Message(id, message),
                Ok(Frame::Bulk(header, payload)) => Arrival::Bulk(id, header, payload),
                Err(error) => return format!("it sent {error}"),
            };
            if arrivals.send(arrival).is_err() {
                return "the coordinator ended".to_owned();
            }
        }
    };
    let cause = tokio::select! { cause = writer => cause, cause = reader => cause };
    let _ = arrivals.send(Arrival::Left(id, cause));
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::timeout;

    /// Longer than anything here takes.
    const SOON: Duration = Duration::from_secs(20);

    /// A control port with these limits and the token `secret`.
    async fn port(limits: Limits) -> (SocketAddr, UnboundedReceiver<Arrival>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (arrivals, arrived) = unbounded_channel();
        tokio::spawn(accept_within(limits, listener, Token::new("secret"), None, arrivals));
        (address, arrived)
    }

    fn hello(name: &str) -> Hello {
        Hello {
            name: name.to_owned(),
            build: String::new(),
            device: String::new(),
            bits: String::new(),
            threads: 1,
            data_port: 1,
            advertise: None,
            metrics: None,
            incarnation: 0,
            held: None,
        }
    }

    /// What a worker does up to its hello.
    async fn join(address: SocketAddr, hello: Hello) -> Frames {
        let stream = TcpStream::connect(address).await.unwrap();
        let mut stream = ControlStream::open(stream, Side::Opener, None).await.unwrap();
        let own = Handshake::opener(Plane::Control, &Token::new("secret")).unwrap();
        let (mut theirs, mut proof) = ([0; HELLO_BYTES], [0; PROOF_BYTES]);
        stream.write_all(&own.hello()).await.unwrap();
        stream.read_exact(&mut theirs).await.unwrap();
        let proofs = own.proofs(&theirs).unwrap();
        stream.write_all(&proofs.ours).await.unwrap();
        stream.read_exact(&mut proof).await.unwrap();
        proofs.check(&proof).unwrap();
        let mut frames = Framed::new(stream, codec());
        frames.send(encode_message(&ToCoordinator::Hello(hello))).await.unwrap();
        frames
    }

    /// The name of a worker that joins, and the way to it: whoever drops that lets the worker go.
    async fn joined(arrived: &mut UnboundedReceiver<Arrival>) -> (String, Link) {
        match timeout(SOON, arrived.recv()).await {
            Ok(Some(Arrival::Joined(_, hello, link))) => (hello.name, link),
            other => panic!("nobody joined: {other:?}"),
        }
    }

    /// The sentence that a worker is sent away with.
    async fn goodbye(frames: &mut Frames) -> String {
        let frame = timeout(SOON, frames.next()).await.unwrap().unwrap().unwrap();
        match decode(frame.freeze()) {
            Ok(Frame::Message(ToWorker::Goodbye(Goodbye::Failed(sentence)))) => sentence,
            other => panic!("no goodbye: {other:?}"),
        }
    }

    #[tokio::test]
    async fn whoever_says_nothing_keeps_nobody_out() {
        let (address, mut arrived) = port(Limits { unproved: 4, ..LIMITS }).await;
        let mut silent = Vec::new();
        for _ in 0..12 {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        let _worker = join(address, hello("worker")).await;
        assert_eq!(joined(&mut arrived).await.0, "worker");
        // The first ones made room for the later ones; nothing was decoded of any.
        let ended = timeout(SOON, silent[0].read(&mut [0; 1])).await.expect("the oldest is closed");
        assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
        let held = timeout(Duration::from_millis(100), silent[11].read(&mut [0; 1])).await;
        assert!(held.is_err(), "the newest still has time: {held:?}");
    }

    #[tokio::test]
    async fn a_worker_outlives_the_greeting_that_let_it_in() {
        let (address, mut arrived) = port(Limits { unproved: 1, ..LIMITS }).await;
        let (mut workers, mut links) = (Vec::new(), Vec::new());
        for number in 0..3 {
            workers.push(join(address, hello(&format!("worker-{number}"))).await);
            links.push(joined(&mut arrived).await);
            assert_eq!(links[number].0, format!("worker-{number}"));
        }
        workers[0].send(encode_message(&ToCoordinator::Connected { generation: 1 })).await.unwrap();
        let next = timeout(SOON, arrived.recv()).await.unwrap();
        assert!(matches!(next, Some(Arrival::Message(1, _))), "{next:?}");
    }

    #[tokio::test]
    async fn a_handshake_has_a_time_limit() {
        let (address, _arrived) = port(Limits { handshake: Duration::from_millis(50), ..LIMITS }).await;
        let mut slow = TcpStream::connect(address).await.unwrap();
        slow.write_all(b"LOCKST").await.unwrap();
        let ended = timeout(SOON, slow.read(&mut [0; 1])).await.expect("it is closed");
        assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
    }

    #[tokio::test]
    async fn one_worker_too_many_is_sent_away_until_there_is_a_place() {
        let (address, mut arrived) = port(Limits { workers: 1, ..LIMITS }).await;
        let first = join(address, hello("first")).await;
        let link = joined(&mut arrived).await.1;
        let mut second = join(address, hello("second")).await;
        assert_eq!(goodbye(&mut second).await, "there is no place for one more worker");
        drop((first, link));
        assert!(matches!(timeout(SOON, arrived.recv()).await, Ok(Some(Arrival::Left(1, _)))));
        // The place is given back just after the word that the first one left.
        for _ in 0..100 {
            let _third = join(address, hello("third")).await;
            if let Ok(Some(Arrival::Joined(..))) = timeout(Duration::from_millis(100), arrived.recv()).await {
                return;
            }
        }
        panic!("the place of the first worker was not given back");
    }

    #[tokio::test]
    async fn texts_that_must_not_be_passed_on_are_refused() {
        let (address, _arrived) = port(LIMITS).await;
        let mut long = join(address, hello(&"x".repeat(257))).await;
        assert_eq!(goodbye(&mut long).await, "the worker's name has 257 bytes, the most supported is 256");
        let mut escape = join(address, hello("\u{1b}[2J")).await;
        let sentence = goodbye(&mut escape).await;
        assert!(sentence.ends_with("has control characters") && !sentence.contains('\u{1b}'), "{sentence}");
    }

    #[tokio::test]
    async fn a_frame_over_the_limit_is_refused_by_its_length_alone() {
        let (address, mut arrived) = port(LIMITS).await;
        let frames = join(address, hello("worker")).await;
        let _link = joined(&mut arrived).await;
        let mut stream = frames.into_inner();
        // Only the length: nothing that it promises ever comes.
        stream.write_all(&((protocol::frame::FRAME_LIMIT_BYTES as u32) + 1).to_be_bytes()).await.unwrap();
        match timeout(SOON, arrived.recv()).await {
            Ok(Some(Arrival::Left(1, cause))) => {
                assert_eq!(cause, "reading from it failed: frame size too big");
            }
            other => panic!("it was not refused: {other:?}"),
        }
    }
}
