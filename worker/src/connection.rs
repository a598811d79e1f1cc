//! The control connection: opened, proved with the run token, then frames both ways.

use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use protocol::frame::{Frame, UNACKNOWLEDGED_LIMIT, codec, decode, encode_message};
use protocol::handshake::{HELLO_BYTES, Handshake, PROOF_BYTES, Plane, Token};
use protocol::message::{ToCoordinator, ToWorker};
use protocol::problem::Problem;
use rustix::net::sockopt::set_tcp_user_timeout;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_util::codec::{Framed, LengthDelimitedCodec};

/// How long a worker keeps trying to reach a coordinator that is not there yet.
const CONNECT_PATIENCE: Duration = Duration::from_secs(30);
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);

/// A proved connection to the coordinator.
pub(crate) struct Connection {
    frames: Framed<TcpStream, LengthDelimitedCodec>,
    local: std::net::IpAddr,
}

impl Connection {
    /// Connects to `HOST:PORT`, patiently, and proves the token.
    pub(crate) async fn open(address: &str, token: &Token) -> Result<Self, Problem> {
        let mut stream = connect(address).await?;
        let local = stream.local_addr().map_err(|e| lost(&e.to_string()))?.ip();
        stream.set_nodelay(true).map_err(|e| lost(&e.to_string()))?;
        set_tcp_user_timeout(&stream, UNACKNOWLEDGED_LIMIT.as_millis() as u32)
            .map_err(|e| lost(&e.to_string()))?;
        tokio::time::timeout(HANDSHAKE_LIMIT, handshake(&mut stream, token)).await.map_err(|_| {
            Problem::failed(format!(
                "{address} did not answer the handshake within {} s",
                HANDSHAKE_LIMIT.as_secs()
            ))
            .hint("check that this is the coordinator's control port")
        })??;
        Ok(Self { frames: Framed::new(stream, codec()), local })
    }

    /// The address of this end.
    pub(crate) fn local(&self) -> std::net::IpAddr {
        self.local
    }

    /// Sends one message.
    pub(crate) async fn send(&mut self, message: &ToCoordinator) -> Result<(), Problem> {
        self.send_frame(encode_message(message)).await
    }

    /// Sends the contents of one frame.
    pub(crate) async fn send_frame(&mut self, frame: Bytes) -> Result<(), Problem> {
        self.frames.send(frame).await.map_err(|e| lost(&e.to_string()))
    }

    /// Waits for the next frame; `None` when the coordinator closed the connection. Safe to cancel.
    pub(crate) async fn receive(&mut self) -> Option<Result<Frame<ToWorker>, Problem>> {
        let frame = self.frames.next().await?;
        Some(match frame {
            Ok(frame) => decode(frame.freeze()).map_err(|e| {
                Problem::failed(format!("the coordinator sent {e}")).hint("build both from one commit")
            }),
            Err(error) => Err(lost(&error.to_string())),
        })
    }
}

async fn connect(address: &str) -> Result<TcpStream, Problem> {
    let deadline = Instant::now() + CONNECT_PATIENCE;
    loop {
        let error = match TcpStream::connect(address).await {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        // A name that does not resolve or an address that cannot be parsed will not mend itself.
        let may_mend = matches!(
            error.kind(),
            std::io::ErrorKind::ConnectionRefused
                | std::io::ErrorKind::TimedOut
                | std::io::ErrorKind::HostUnreachable
                | std::io::ErrorKind::NetworkUnreachable
        );
        if !may_mend || Instant::now() > deadline {
            return Err(Problem::failed(format!("cannot reach the coordinator at {address}: {error}"))
                .hint("start `lockstep coordinator` first; it prints the address that workers need"));
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn handshake(stream: &mut TcpStream, token: &Token) -> Result<(), Problem> {
    let closed = |_| {
        Problem::failed("the coordinator closed the connection during the handshake")
            .hint("give every process of the run the same token in LOCKSTEP_TOKEN or with --token-file")
    };
    let own = Handshake::opener(Plane::Control, token)
        .map_err(|e| Problem::failed(format!("the system has no randomness for the handshake: {e}")))?;
    stream.write_all(&own.hello()).await.map_err(closed)?;
    let mut theirs = [0; HELLO_BYTES];
    stream.read_exact(&mut theirs).await.map_err(closed)?;
    let proofs = own.proofs(&theirs)?;
    stream.write_all(&proofs.ours).await.map_err(closed)?;
    let mut proof = [0; PROOF_BYTES];
    stream.read_exact(&mut proof).await.map_err(closed)?;
    proofs.check(&proof)
}

pub(crate) fn lost(cause: &str) -> Problem {
    Problem::failed(format!("lost the connection to the coordinator: {cause}"))
        .hint("the coordinator's own output says why it ended; its run directory can be resumed")
}
