//! The control connection: opened, proved with the run token, then frames both ways.

use std::io::{self, ErrorKind};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use protocol::frame::{Frame, codec, decode, encode_message};
use protocol::handshake::{HELLO_BYTES, Handshake, PROOF_BYTES, Plane, TLS_ALERT_BYTES, Token, check_plain};
use protocol::message::{Goodbye, ToCoordinator, ToWorker};
use protocol::problem::Problem;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_util::codec::{Framed, LengthDelimitedCodec};
use transport::{ControlStream, Side, Tls};

/// How long a worker keeps trying to reach a coordinator that is not there yet.
pub(crate) const CONNECT_PATIENCE: Duration = Duration::from_secs(30);
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);

/// So often a coordinator is taken at its word that closes the connection when it has seen this side's proof: one with
/// another token does so each time.
const REFUSALS_LIMIT: u32 = 4;

/// Pause before the coordinator is tried again; doubles up to the second value.
const RETRY_PAUSE: [Duration; 2] = [Duration::from_millis(50), Duration::from_millis(500)];

/// A proved connection to the coordinator.
pub(crate) struct Connection {
    frames: Framed<ControlStream, LengthDelimitedCodec>,
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

/// Why a connection was not proved.
enum Unproved {
    /// The other side ended it before it had answered. A coordinator bears so many connections that have proved nothing,
    /// and closes the oldest to make room.
    Dropped(Problem),
    /// It ended it when it could have seen this side's proof: most likely its token is another one.
    Refused(Problem),
    /// It said what it will say again.
    Useless(Problem),
}

impl Unproved {
    fn into_problem(self) -> Problem {
        let (Self::Dropped(problem) | Self::Refused(problem) | Self::Useless(problem)) = self;
        problem
    }
}

impl From<Problem> for Unproved {
    fn from(problem: Problem) -> Self {
        Self::Useless(problem)
    }
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
    pub(crate) async fn open(address: &str, token: &Token, tls: Option<&Tls>) -> Result<Self, Problem> {
        Self::open_within(CONNECT_PATIENCE, address, token, tls).await
    }

    async fn open_within(
        patience: Duration,
        address: &str,
        token: &Token,
        tls: Option<&Tls>,
    ) -> Result<Self, Problem> {
        let deadline = Instant::now() + patience;
        let [mut pause, longest_pause] = RETRY_PAUSE;
        let mut refusals = 0;
        loop {
            let stream = connect(address, deadline).await?;
            let unproved = match Self::prove(stream, address, token, tls).await {
                Ok(connection) => return Ok(connection),
                Err(unproved) => unproved,
            };
            refusals += u32::from(matches!(unproved, Unproved::Refused(_)));
            let is_useless = matches!(unproved, Unproved::Useless(_)) || refusals == REFUSALS_LIMIT;
            let problem = unproved.into_problem();
            if is_useless || Instant::now() > deadline {
                return Err(problem);
            }
            tracing::debug!("trying the coordinator again: {problem}");
            tokio::time::sleep(pause).await;
            pause = (2 * pause).min(longest_pause);
        }
    }

    /// Looks for a coordinator that was lost, for as long as it takes. Whoever is there instead may go away again.
    pub(crate) async fn find(address: &str, token: &Token, tls: Option<&Tls>) -> Self {
        let [mut pause, longest_pause] = RETRY_PAUSE;
        loop {
            let attempt = async {
                let stream = TcpStream::connect(address).await.map_err(|e| lost(&e.to_string()))?;
                Self::prove(stream, address, token, tls).await.map_err(Unproved::into_problem)
            };
            match attempt.await {
                Ok(connection) => return connection,
                Err(problem) => tracing::debug!("looking for the coordinator: {problem}"),
            }
            tokio::time::sleep(pause).await;
            pause = (2 * pause).min(longest_pause);
        }
    }

    async fn prove(
        stream: TcpStream,
        address: &str,
        token: &Token,
        tls: Option<&Tls>,
    ) -> Result<Self, Unproved> {
        let broken = |e: io::Error| Unproved::Dropped(lost(&e.to_string()));
        let local = stream.local_addr().map_err(broken)?;
        if stream.peer_addr().is_ok_and(|peer| peer == local) {
            // Where nobody listens on a port of the range from which connections take theirs, one may meet itself.
            return Err(Unproved::Dropped(lost("nobody listens there")));
        }
        let proved = tokio::time::timeout(HANDSHAKE_LIMIT, handshake(stream, token, tls));
        let stream = proved.await.map_err(|_| {
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

async fn connect(address: &str, deadline: Instant) -> Result<TcpStream, Problem> {
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

async fn handshake(stream: TcpStream, token: &Token, tls: Option<&Tls>) -> Result<ControlStream, Unproved> {
    let closed = || {
        Problem::failed("the coordinator closed the connection during the handshake")
            .hint("give every process of the run the same token in LOCKSTEP_TOKEN or with --token-file")
    };
    // What TLS has to say is said in its own words.
    let dropped =
        |error: io::Error| error.downcast().map_or_else(|_| Unproved::Dropped(closed()), Unproved::Useless);
    let refused =
        |error: io::Error| error.downcast().map_or_else(|_| Unproved::Refused(closed()), Unproved::Useless);
    let mut stream = ControlStream::open(stream, Side::Opener, tls).await.map_err(dropped)?;
    let own = Handshake::opener(Plane::Control, &stream.bind(token))
        .map_err(|e| Problem::failed(format!("the system has no randomness for the handshake: {e}")))?;
    stream.write_all(&own.hello()).await.map_err(dropped)?;
    let mut theirs = [0; HELLO_BYTES];
    let (start, rest) = theirs.split_at_mut(TLS_ALERT_BYTES);
    stream.read_exact(start).await.map_err(dropped)?;
    check_plain(start)?;
    stream.read_exact(rest).await.map_err(dropped)?;
    let proofs = own.proofs(&theirs)?;
    stream.write_all(&proofs.ours).await.map_err(refused)?;
    let mut proof = [0; PROOF_BYTES];
    stream.read_exact(&mut proof).await.map_err(refused)?;
    proofs.check(&proof)?;
    Ok(stream)
}

pub(crate) fn lost(cause: &str) -> Problem {
    Problem::failed(format!("lost the connection to the coordinator: {cause}"))
        .hint("the coordinator's own output says why it ended; its run directory can be resumed")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::net::TcpListener;

    /// How a coordinator treats a connection.
    #[derive(Clone, Copy)]
    enum Treats {
        Drops,
        ClosesAfterItsHello,
        LetsIn,
    }

    /// A coordinator that treats the first connections like this and all others as the last one; and how many came.
    async fn coordinator(treats: &'static [Treats]) -> (String, Arc<AtomicUsize>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let count = Arc::new(AtomicUsize::new(0));
        let came = count.clone();
        tokio::spawn(async move {
            let mut held = Vec::new();
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let number = came.fetch_add(1, Ordering::Relaxed).min(treats.len() - 1);
                if let Treats::Drops = treats[number] {
                    continue;
                }
                let own = Handshake::answerer(Plane::Control, &Token::new("secret")).unwrap();
                let (mut theirs, mut proof) = ([0; HELLO_BYTES], [0; PROOF_BYTES]);
                stream.read_exact(&mut theirs).await.unwrap();
                stream.write_all(&own.hello()).await.unwrap();
                if let Treats::ClosesAfterItsHello = treats[number] {
                    continue;
                }
                stream.read_exact(&mut proof).await.unwrap();
                stream.write_all(&own.proofs(&theirs).unwrap().ours).await.unwrap();
                held.push(stream);
            }
        });
        (address, count)
    }

    /// What a worker with this patience ends with, and how many connections it made.
    async fn open(treats: &'static [Treats], patience: Duration) -> (Result<(), String>, usize) {
        let (address, count) = coordinator(treats).await;
        let opened = Connection::open_within(patience, &address, &Token::new("secret"), None).await;
        (opened.map(drop).map_err(|problem| problem.sentence), count.load(Ordering::Relaxed))
    }

    const CLOSED: &str = "the coordinator closed the connection during the handshake";

    #[tokio::test]
    async fn a_coordinator_that_had_to_make_room_is_tried_again() {
        use Treats::{ClosesAfterItsHello, Drops, LetsIn};
        let treats = &[Drops, ClosesAfterItsHello, Drops, ClosesAfterItsHello, Drops, Drops, LetsIn];
        assert_eq!(open(treats, CONNECT_PATIENCE).await, (Ok(()), 7));
    }

    #[tokio::test]
    async fn one_that_refuses_the_proof_again_and_again_has_another_token() {
        let (opened, count) = open(&[Treats::ClosesAfterItsHello], CONNECT_PATIENCE).await;
        assert_eq!((opened, count), (Err(CLOSED.to_owned()), REFUSALS_LIMIT as usize));
    }

    #[tokio::test]
    async fn one_that_answers_nobody_is_given_up_in_time() {
        let (opened, count) = open(&[Treats::Drops], Duration::from_millis(200)).await;
        println!("{count} connections");
        assert!(opened.is_err());
    }
}
