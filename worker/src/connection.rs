//! The control connection: opened, proved with the run token, then frames both ways.

use std::io::{self, ErrorKind};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use protocol::frame::{Frame, UNACKNOWLEDGED_LIMIT, codec, decode, encode_message};
use protocol::handshake::{HELLO_BYTES, Handshake, PROOF_BYTES, Plane, Token};
use protocol::message::{Goodbye, ToCoordinator, ToWorker};
use protocol::problem::Problem;
use rustix::net::sockopt::set_tcp_user_timeout;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_util::codec::{Framed, LengthDelimitedCodec};

/// How long a worker keeps trying to reach a coordinator that is not there yet.
pub(crate) const CONNECT_PATIENCE: Duration = Duration::from_secs(30);
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);

/// Pause before a coordinator that was lost is looked for again; doubles up to the second value.
const RETRY_PAUSE: [Duration; 2] = [Duration::from_millis(50), Duration::from_millis(500)];

/// A proved connection to the coordinator.
pub(crate) struct Connection {
    frames: Framed<TcpStream, LengthDelimitedCodec>,
    local: IpAddr,
}

/// Why a connection is of no use any more.
#[derive(Debug)]
pub(crate) enum Broken {
    /// It has ended, and how. A coordinator may come back.
    Lost(String),
    /// What came over it makes no sense.
    Senseless(Problem),
}

impl From<Problem> for Broken {
    fn from(problem: Problem) -> Self {
        Self::Senseless(problem)
    }
}

impl From<Broken> for Problem {
    fn from(broken: Broken) -> Self {
        match broken {
            Broken::Lost(cause) => lost(&cause),
            Broken::Senseless(problem) => problem,
        }
    }
}

impl Connection {
    /// Connects to `HOST:PORT`, patiently, and proves the token.
    pub(crate) async fn open(address: &str, token: &Token) -> Result<Self, Problem> {
        Self::prove(connect(address).await?, address, token).await
    }

    /// Looks for a coordinator that was lost, for as long as it takes. Whoever is there instead may go away again.
    pub(crate) async fn find(address: &str, token: &Token) -> Self {
        let [mut pause, longest_pause] = RETRY_PAUSE;
        loop {
            let attempt = async {
                let stream = TcpStream::connect(address).await.map_err(|e| lost(&e.to_string()))?;
                Self::prove(stream, address, token).await
            };
            match attempt.await {
                Ok(connection) => return connection,
                Err(problem) => tracing::debug!("looking for the coordinator: {problem}"),
            }
            tokio::time::sleep(pause).await;
            pause = (2 * pause).min(longest_pause);
        }
    }

    async fn prove(mut stream: TcpStream, address: &str, token: &Token) -> Result<Self, Problem> {
        let broken = |e: io::Error| lost(&e.to_string());
        let local = stream.local_addr().map_err(broken)?;
        if stream.peer_addr().is_ok_and(|peer| peer == local) {
            // Where nobody listens on a port of the range from which connections take theirs, one may meet itself.
            return Err(lost("nobody listens there"));
        }
        stream.set_nodelay(true).map_err(broken)?;
        set_tcp_user_timeout(&stream, UNACKNOWLEDGED_LIMIT.as_millis() as u32)
            .map_err(|e| broken(e.into()))?;
        tokio::time::timeout(HANDSHAKE_LIMIT, handshake(&mut stream, token)).await.map_err(|_| {
            Problem::failed(format!(
                "{address} did not answer the handshake within {} s",
                HANDSHAKE_LIMIT.as_secs()
            ))
            .hint("check that this is the coordinator's control port")
        })??;
        Ok(Self { frames: Framed::new(stream, codec()), local: local.ip() })
    }

    /// The address of this end.
    pub(crate) fn local(&self) -> IpAddr {
        self.local
    }

    /// Sends one message.
    pub(crate) async fn send(&mut self, message: &ToCoordinator) -> Result<(), Broken> {
        self.send_frame(encode_message(message)).await
    }

    /// Sends the contents of one frame.
    pub(crate) async fn send_frame(&mut self, frame: Bytes) -> Result<(), Broken> {
        self.frames.send(frame).await.map_err(|e| Broken::Lost(e.to_string()))
    }

    /// Waits for the next frame. Safe to cancel.
    pub(crate) async fn receive(&mut self) -> Result<Frame<ToWorker>, Broken> {
        match self.frames.next().await {
            None => Err(Broken::Lost("it closed the connection".to_owned())),
            Some(Ok(frame)) => decode(frame.freeze()).map_err(|e| {
                let problem = Problem::failed(format!("the coordinator sent {e}"));
                Broken::Senseless(problem.hint("build both from one commit"))
            }),
            // A length that no frame may have.
            Some(Err(error)) if error.kind() == ErrorKind::InvalidData => {
                Err(Broken::Senseless(lost(&error.to_string())))
            }
            Some(Err(error)) => Err(Broken::Lost(error.to_string())),
        }
    }

    /// The goodbye among what has arrived over a connection that is broken for writing: a coordinator that ends may be
    /// gone before this end has read it.
    pub(crate) async fn goodbye(&mut self) -> Option<Goodbye> {
        let read = async {
            loop {
                match self.receive().await {
                    Ok(Frame::Message(ToWorker::Goodbye(goodbye))) => return Some(goodbye),
                    Ok(_) => {}
                    Err(_) => return None,
                }
            }
        };
        tokio::time::timeout(RETRY_PAUSE[1], read).await.unwrap_or(None)
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
            ErrorKind::ConnectionRefused
                | ErrorKind::TimedOut
                | ErrorKind::HostUnreachable
                | ErrorKind::NetworkUnreachable
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
