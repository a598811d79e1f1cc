//! The control port: accepts workers, checks the run token, and turns each connection into events and a queue.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use protocol::frame::{BulkHeader, Frame, codec, decode, encode_message};
use protocol::handshake::{HELLO_BYTES, Handshake, PROOF_BYTES, Plane, Token};
use protocol::message::{Hello, ToCoordinator, ToWorker, WorkerId};
use protocol::problem::Problem;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio_util::codec::Framed;

/// A stranger has this long to prove the token.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Connections that may be unproved at once; more wait in the listener's queue.
const UNPROVED_LIMIT: usize = 256;

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
    /// Queues a message. A worker that is gone is reported by its connection, not here.
    pub(crate) fn send(&self, message: &ToWorker) {
        self.send_frame(encode_message(message));
    }

    /// Queues the contents of one frame.
    pub(crate) fn send_frame(&self, frame: Bytes) {
        let _ = self.frames.send(frame);
    }
}

/// Accepts connections for ever.
pub(crate) async fn accept(listener: TcpListener, token: Token, arrivals: UnboundedSender<Arrival>) {
    let next_id = Arc::new(AtomicU32::new(1));
    let unproved = Arc::new(Semaphore::new(UNPROVED_LIMIT));
    loop {
        let permit = unproved.clone().acquire_owned().await.expect("the semaphore is never closed");
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, say: others are still served, and it may pass.
                tracing::warn!("cannot accept a connection: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (token, arrivals, next_id) = (token.clone(), arrivals.clone(), next_id.clone());
        tokio::spawn(async move {
            match tokio::time::timeout(HANDSHAKE_LIMIT, greet(stream, &token)).await {
                Ok(Ok((frames, hello))) => {
                    drop(permit);
                    let id = next_id.fetch_add(1, Ordering::Relaxed);
                    serve(id, frames, hello, peer, arrivals).await;
                }
                Ok(Err(problem)) => tracing::warn!("a connection from {peer} was refused: {problem}"),
                Err(_) => tracing::warn!("a connection from {peer} did not finish its handshake in time"),
            }
        });
    }
}

type Frames = Framed<TcpStream, tokio_util::codec::LengthDelimitedCodec>;

/// The handshake and the hello.
async fn greet(mut stream: TcpStream, token: &Token) -> Result<(Frames, Hello), Problem> {
    let broken =
        |e: std::io::Error| Problem::failed(format!("the connection broke during the handshake: {e}"));
    stream.set_nodelay(true).map_err(broken)?;
    let own = Handshake::answerer(Plane::Control, token)
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
    match decode(first.map_err(broken)?.freeze()) {
        Ok(Frame::Message(ToCoordinator::Hello(hello))) => Ok((frames, hello)),
        Ok(_) => Err(Problem::failed("its first message was not a hello")),
        Err(error) => Err(Problem::failed(format!("it sent {error}"))),
    }
}

/// Moves frames both ways until the connection ends.
async fn serve(
    id: WorkerId,
    frames: Frames,
    hello: Hello,
    peer: SocketAddr,
    arrivals: UnboundedSender<Arrival>,
) {
    let (mut sink, mut stream) = frames.split();
    let (queue, mut queued) = unbounded_channel::<Bytes>();
    if arrivals.send(Arrival::Joined(id, Box::new(hello), Link { frames: queue, peer })).is_err() {
        return;
    }
    let writer = async {
        while let Some(frame) = queued.recv().await {
            if let Err(error) = sink.send(frame).await {
                return format!("writing to it failed: {error}");
            }
        }
        let _ = sink.close().await;
        "the coordinator let it go".to_owned()
    };
    let reader = async {
        loop {
            let frame = match stream.next().await {
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
