//! The connections of one generation: one stream between each two workers.
//!
//! The higher rank connects to the lower one, whose data port is open for as long as its process lives. After the
//! handshake with the generation's own token the opener says who it is: rank (u32) and generation (u64),
//! little-endian. Strangers, and members of an older generation who do not know yet that it is over, fail the
//! handshake and are dropped; the mesh goes on forming. Each handshake runs on a thread of its own, so a silent
//! connection delays nobody.

use std::fmt;
use std::io::{self, ErrorKind, IoSlice};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use protocol::handshake::{HELLO_BYTES, Handshake, PROOF_BYTES, Plane, Token};
use protocol::message::{Generation, Member};
use protocol::problem::Problem;
use transport::{DataStream, Side, Tls};

/// How long a mesh may take to form, unless told otherwise.
pub const FORM_LIMIT: Duration = Duration::from_secs(30);

/// How long one handshake may take.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// How often the listener and the abort flag are looked at.
const POLL: Duration = Duration::from_millis(2);
/// Pause before a failed connection is tried again; doubles up to the second value.
const RETRY_PAUSE: [Duration; 2] = [Duration::from_millis(20), Duration::from_millis(500)];
/// Handshakes at the same time; further connections are dropped, their openers try again.
const PENDING_LIMIT: usize = 1024;

/// A worker's place in a generation, as far as connections are concerned.
#[derive(Debug, Clone)]
pub struct Place {
    /// The generation.
    pub generation: Generation,
    /// This worker's position in `members`.
    pub rank: u32,
    /// All members by rank.
    pub members: Vec<Member>,
}

/// The connections of one worker to all its peers.
#[derive(Debug)]
pub struct Mesh {
    /// Who is connected.
    pub place: Place,
    /// By rank; `None` for this worker itself.
    pub streams: Vec<Option<DataStream>>,
}

/// Why a mesh did not form.
#[derive(Debug)]
pub enum MeshError {
    /// The abort flag was set.
    Aborted,
    /// A member could not be reached, or did not come, in time.
    Missing {
        /// Its rank.
        rank: u32,
        /// What to tell the user.
        problem: Problem,
    },
    /// The data port cannot be used.
    Listener(io::Error),
}

impl fmt::Display for MeshError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Aborted => f.write_str("the generation was aborted while its workers were connecting"),
            Self::Missing { problem, .. } => write!(f, "{problem}"),
            Self::Listener(error) => write!(f, "the data port does not accept connections: {error}"),
        }
    }
}

impl std::error::Error for MeshError {}

impl Mesh {
    /// Connects this worker to all peers of its generation. The listener is switched to non-blocking mode and may
    /// be used again for the next generation.
    ///
    /// Blocks until all streams stand, `limit` has passed or `abort` is set (seen within milliseconds). Threads that
    /// are still in a handshake then end by themselves within its time limit of 5 s.
    ///
    /// # Errors
    /// A member is missing at the end of `limit`; the sentence says what was seen of it last.
    pub fn connect(
        listener: &TcpListener,
        token: &Token,
        tls: Option<Tls>,
        place: Place,
        limit: Duration,
        abort: &AtomicBool,
    ) -> Result<Self, MeshError> {
        listener.set_nonblocking(true).map_err(MeshError::Listener)?;
        let deadline = Instant::now() + limit;
        let (events, arrivals) = mpsc::channel();
        let caller = Caller {
            token: token.for_generation(place.generation),
            tls,
            generation: place.generation,
            rank: place.rank,
            world_size: place.members.len() as u32,
        };
        let mut forming = Forming::new(place);
        let over = SetOnDrop(Arc::default());
        for rank in 0..caller.rank {
            let (address, caller) = (forming.place.members[rank as usize].address.clone(), caller.clone());
            let (events, over) = (events.clone(), over.0.clone());
            spawn(move || caller.call(rank, &address, deadline, &events, &over))?;
        }
        let pending = Arc::new(());
        while forming.missing().is_some() {
            if abort.load(Ordering::Acquire) {
                return Err(MeshError::Aborted);
            }
            if Instant::now() >= deadline {
                return Err(forming.failure(limit));
            }
            while let Some(stream) = accept(listener)? {
                if Arc::strong_count(&pending) > PENDING_LIMIT {
                    break;
                }
                let (caller, events, pending) = (caller.clone(), events.clone(), pending.clone());
                spawn(move || {
                    caller.answer(stream, &events);
                    drop(pending);
                })?;
            }
            match arrivals.recv_timeout(POLL) {
                Ok(event) => forming.take(event),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
        }
        Ok(Self { place: forming.place, streams: forming.streams })
    }

    /// The mesh of a generation with one worker: no sockets.
    pub fn alone(generation: Generation, member: Member) -> Self {
        let place = Place { generation, rank: 0, members: vec![member] };
        Self { place, streams: vec![None] }
    }
}

/// What the threads report.
enum Event {
    /// A peer is connected.
    Joined { rank: u32, stream: DataStream },
    /// A call to a peer failed and will be tried again.
    CallFailed { rank: u32, problem: Problem },
    /// Someone connected who does not belong here.
    Stranger { problem: Problem },
}

/// What has been achieved so far, and the last thing that went wrong.
struct Forming {
    place: Place,
    streams: Vec<Option<DataStream>>,
    call_problems: Vec<Option<Problem>>,
    stranger: Option<Problem>,
}

impl Forming {
    fn new(place: Place) -> Self {
        let world_size = place.members.len();
        let streams = (0..world_size).map(|_| None).collect();
        Self { place, streams, call_problems: vec![None; world_size], stranger: None }
    }

    fn missing(&self) -> Option<u32> {
        let is_missing = |rank: &u32| *rank != self.place.rank && self.streams[*rank as usize].is_none();
        (0..self.place.members.len() as u32).find(is_missing)
    }

    fn take(&mut self, event: Event) {
        match event {
            // A second connection of a rank replaces the first: its opener gave the first one up.
            Event::Joined { rank, stream } => self.streams[rank as usize] = Some(stream),
            Event::CallFailed { rank, problem } => {
                tracing::debug!("connecting to rank {rank}: {problem}");
                self.call_problems[rank as usize] = Some(problem);
            }
            Event::Stranger { problem } => {
                tracing::debug!("dropped a connection to the data port: {problem}");
                self.stranger = Some(problem);
            }
        }
    }

    fn failure(mut self, limit: Duration) -> MeshError {
        let rank = self.missing().expect("the mesh is not complete");
        let Member { name, address, .. } = &self.place.members[rank as usize];
        let seconds = limit.as_secs_f64();
        let (sentence, cause) = if rank < self.place.rank {
            let cause = self.call_problems[rank as usize].take();
            (format!("cannot connect to worker {name} (rank {rank}) at {address} within {seconds} s"), cause)
        } else {
            (format!("worker {name} (rank {rank}) did not connect within {seconds} s"), self.stranger.take())
        };
        let problem = match cause {
            Some(cause) => {
                let problem = Problem::failed(format!("{sentence}: {}", cause.sentence));
                Problem { hint: cause.hint, ..problem }
            }
            None => Problem::failed(sentence),
        };
        MeshError::Missing { rank, problem }
    }
}

/// One end of a handshake: who this worker is in which generation.
#[derive(Clone)]
struct Caller {
    token: Token,
    tls: Option<Tls>,
    generation: Generation,
    rank: u32,
    world_size: u32,
}

impl Caller {
    /// Connects to a lower rank, again and again until it works or the mesh is over.
    fn call(&self, rank: u32, address: &str, deadline: Instant, events: &Sender<Event>, over: &AtomicBool) {
        let [mut pause, longest_pause] = RETRY_PAUSE;
        while Instant::now() < deadline && !over.load(Ordering::Acquire) {
            let event = match self.open(address) {
                Ok(stream) => Event::Joined { rank, stream },
                Err(problem) => Event::CallFailed { rank, problem },
            };
            let is_joined = matches!(event, Event::Joined { .. });
            if events.send(event).is_err() || is_joined {
                return;
            }
            std::thread::sleep(pause);
            pause = (2 * pause).min(longest_pause);
        }
    }

    fn open(&self, address: &str) -> Result<DataStream, Problem> {
        let mut last = Problem::failed(format!("{address} is no address"));
        for candidate in address.to_socket_addrs().map_err(|error| Problem::failed(error.to_string()))? {
            match TcpStream::connect_timeout(&candidate, HANDSHAKE_LIMIT) {
                Ok(stream) => return self.introduce(stream),
                Err(error) => last = Problem::failed(error.to_string()),
            }
        }
        Err(last)
    }

    fn introduce(&self, stream: TcpStream) -> Result<DataStream, Problem> {
        let mut timed = Timed::open(stream, Side::Opener, self.tls.as_ref())?;
        let token = timed.stream.bind(&self.token);
        let handshake = Handshake::opener(Plane::Data, &token).map_err(no_randomness)?;
        timed.write(&handshake.hello())?;
        let proofs = handshake.proofs(&timed.read::<HELLO_BYTES>()?)?;
        timed.write(&proofs.ours)?;
        proofs.check(&timed.read::<PROOF_BYTES>()?)?;
        timed.write(&[&self.rank.to_le_bytes()[..], &self.generation.to_le_bytes()].concat())?;
        Ok(timed.stream)
    }

    /// Finds out who connected; only members of this generation with a higher rank are let in.
    fn answer(&self, stream: TcpStream, events: &Sender<Event>) {
        let event = match self.recognise(stream) {
            Ok((rank, stream)) => Event::Joined { rank, stream },
            Err(problem) => Event::Stranger { problem },
        };
        // The mesh may be over; then nobody needs the connection.
        let _ = events.send(event);
    }

    fn recognise(&self, stream: TcpStream) -> Result<(u32, DataStream), Problem> {
        let mut timed = Timed::open(stream, Side::Answerer, self.tls.as_ref())?;
        let token = timed.stream.bind(&self.token);
        let handshake = Handshake::answerer(Plane::Data, &token).map_err(no_randomness)?;
        let theirs = timed.read::<HELLO_BYTES>()?;
        timed.write(&handshake.hello())?;
        let proofs = handshake.proofs(&theirs)?;
        proofs.check(&timed.read::<PROOF_BYTES>()?)?;
        timed.write(&proofs.ours)?;
        let rank = u32::from_le_bytes(timed.read()?);
        let generation = u64::from_le_bytes(timed.read()?);
        if generation != self.generation || rank <= self.rank || rank >= self.world_size {
            return Err(Problem::failed(format!(
                "rank {rank} of generation {generation} called rank {} of generation {}",
                self.rank, self.generation
            )));
        }
        Ok((rank, timed.stream))
    }
}

/// A stream whose handshake, reads and writes together have [`HANDSHAKE_LIMIT`], however slowly the other side drips.
struct Timed {
    stream: DataStream,
    until: Instant,
}

impl Timed {
    fn open(stream: TcpStream, side: Side, tls: Option<&Tls>) -> Result<Self, Problem> {
        let until = Instant::now() + HANDSHAKE_LIMIT;
        Ok(Self { stream: DataStream::open(stream, side, tls, until).map_err(describe)?, until })
    }

    fn read<const N: usize>(&mut self) -> Result<[u8; N], Problem> {
        let (mut bytes, mut filled) = ([0; N], 0);
        while filled < N {
            match self.stream.receive(&mut bytes[filled..]).map_err(describe)? {
                Some(0) => return Err(describe(ErrorKind::UnexpectedEof.into())),
                Some(count) => filled += count,
                None => self.stream.wait_readable(Some(self.left()?)),
            }
        }
        Ok(bytes)
    }

    /// The few bytes of a handshake fit into the send buffer of a fresh connection: it takes them at once.
    fn write(&mut self, bytes: &[u8]) -> Result<(), Problem> {
        let taken = self.stream.send(&[IoSlice::new(bytes), IoSlice::new(&[])], false).map_err(describe)?;
        match taken == Some(bytes.len()) && self.stream.flush(false).map_err(describe)? {
            true => Ok(()),
            false => Err(describe(ErrorKind::TimedOut.into())),
        }
    }

    fn left(&self) -> Result<Duration, Problem> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(describe(ErrorKind::TimedOut.into())) } else { Ok(left) }
    }
}

fn describe(error: io::Error) -> Problem {
    let error = match error.downcast::<Problem>() {
        Ok(problem) => return problem,
        Err(error) => error,
    };
    match error.kind() {
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
            Problem::failed("the other side closed the connection during the handshake")
                .hint("give every process of the run the same token in LOCKSTEP_TOKEN or with --token-file")
        }
        ErrorKind::WouldBlock | ErrorKind::TimedOut => Problem::failed(format!(
            "the other side did not answer the handshake within {} s",
            HANDSHAKE_LIMIT.as_secs()
        )),
        _ => Problem::failed(error.to_string()),
    }
}

fn no_randomness(error: impl fmt::Display) -> Problem {
    Problem::failed(format!("the operating system gives no random bytes: {error}"))
}

fn accept(listener: &TcpListener) -> Result<Option<TcpStream>, MeshError> {
    match listener.accept() {
        Ok((stream, _)) => {
            stream.set_nonblocking(false).map_err(MeshError::Listener)?;
            Ok(Some(stream))
        }
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
        // What is wrong with one connection, or a lack of descriptors that may pass, is not the mesh's end.
        Err(error) => {
            tracing::debug!("accepting a connection to the data port: {error}");
            Ok(None)
        }
    }
}

fn spawn(run: impl FnOnce() + Send + 'static) -> Result<(), MeshError> {
    let thread = std::thread::Builder::new().name("mesh".into());
    thread.spawn(run).map(drop).map_err(MeshError::Listener)
}

/// Tells the calling threads that nobody waits for them any more, however the mesh ended.
struct SetOnDrop(Arc<AtomicBool>);

impl Drop for SetOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::thread;

    fn listeners(count: usize) -> (Vec<TcpListener>, Vec<Member>) {
        let listeners: Vec<_> = (0..count).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let member = |(rank, listener): (usize, &TcpListener)| Member {
            worker_id: rank as u32,
            name: format!("w{rank}"),
            address: listener.local_addr().unwrap().to_string(),
            shards: rank as u32..rank as u32 + 1,
        };
        let members = listeners.iter().enumerate().map(member).collect();
        (listeners, members)
    }

    /// Forms a mesh of all listeners, a thread each; `token` and `limit` by rank.
    fn form(
        listeners: &[TcpListener],
        members: &[Member],
        generation: u64,
        token: impl Fn(u32) -> Token + Sync,
        limit: Duration,
    ) -> Vec<Result<Mesh, MeshError>> {
        let connect = |rank: u32| {
            let place = Place { generation, rank, members: members.to_vec() };
            Mesh::connect(
                &listeners[rank as usize],
                &token(rank),
                None,
                place,
                limit,
                &AtomicBool::new(false),
            )
        };
        let connect = &connect;
        thread::scope(|scope| {
            let start = |rank| scope.spawn(move || connect(rank));
            let threads: Vec<_> = (0..members.len() as u32).map(start).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    fn assert_connected(meshes: &mut [Mesh]) {
        for a in 0..meshes.len() {
            for b in 0..meshes.len() {
                if a != b {
                    let sent = [a as u8, b as u8];
                    meshes[a].streams[b].as_ref().unwrap().tcp().write_all(&sent).unwrap();
                    let mut got = [0; 2];
                    meshes[b].streams[a].as_ref().unwrap().tcp().read_exact(&mut got).unwrap();
                    assert_eq!(got, sent, "the stream between {a} and {b}");
                }
            }
            assert!(meshes[a].streams[a].is_none());
        }
    }

    #[test]
    fn each_two_workers_are_connected_and_the_ports_serve_again() {
        let (listeners, members) = listeners(5);
        for generation in 1..4 {
            let meshes = form(&listeners, &members, generation, |_| Token::new("secret"), FORM_LIMIT);
            let mut meshes: Vec<Mesh> = meshes.into_iter().map(Result::unwrap).collect();
            assert_connected(&mut meshes);
        }
    }

    #[test]
    fn strangers_and_old_generations_are_ignored() {
        let (listeners, members) = listeners(3);
        let started = Instant::now();
        let mut strangers = Vec::new();
        for member in &members {
            // One says nothing, one speaks something else, one hangs up.
            strangers.push(TcpStream::connect(&member.address).unwrap());
            let mut browser = TcpStream::connect(&member.address).unwrap();
            browser.write_all(&b"GET / HTTP/1.1\r\nHost: worker\r\n\r\n".repeat(4)).unwrap();
            strangers.push(browser);
            drop(TcpStream::connect(&member.address).unwrap());
        }
        // A member of generation 6 that has not heard of its end calls rank 0 all the while.
        let (abort, token) = (Arc::new(AtomicBool::new(false)), Token::new("secret"));
        let old = {
            let (abort, token, mut members) = (abort.clone(), token.clone(), members.clone());
            let own = TcpListener::bind("127.0.0.1:0").unwrap();
            members[1].address = own.local_addr().unwrap().to_string();
            thread::spawn(move || {
                let place = Place { generation: 6, rank: 1, members };
                Mesh::connect(&own, &token, None, place, FORM_LIMIT, &abort)
            })
        };
        thread::sleep(Duration::from_millis(50));
        let meshes = form(&listeners, &members, 7, |_| token.clone(), FORM_LIMIT);
        let mut meshes: Vec<Mesh> = meshes.into_iter().map(Result::unwrap).collect();
        assert_connected(&mut meshes);
        assert!(started.elapsed() < HANDSHAKE_LIMIT, "a silent stranger held the mesh up");
        abort.store(true, Ordering::Release);
        assert!(matches!(old.join().unwrap(), Err(MeshError::Aborted)));
    }

    #[test]
    fn a_wrong_token_is_named_on_both_sides() {
        let (listeners, members) = listeners(2);
        let token = |rank| Token::new(if rank == 0 { "secret" } else { "other" });
        let errors = form(&listeners, &members, 1, token, Duration::from_millis(300));
        let [
            Err(MeshError::Missing { rank: 1, problem: lower }),
            Err(MeshError::Missing { rank: 0, problem: upper }),
        ] = &errors[..]
        else {
            panic!("both sides miss each other: {errors:?}")
        };
        assert_eq!(
            lower.sentence,
            "worker w1 (rank 1) did not connect within 0.3 s: the other side of the connection has another run token"
        );
        assert_eq!(
            upper.sentence,
            format!(
                "cannot connect to worker w0 (rank 0) at {} within 0.3 s: the other side closed the connection \
                 during the handshake",
                members[0].address
            )
        );
        assert!(lower.hint.as_ref().unwrap().contains("LOCKSTEP_TOKEN"));
        assert_eq!(lower.hint, upper.hint);
    }

    #[test]
    fn a_late_worker_is_awaited_and_an_absent_one_named() {
        let (mut listeners, members) = listeners(2);
        let absent = listeners.remove(0);
        drop(absent);
        let place = Place { generation: 1, rank: 1, members: members.clone() };
        let never = AtomicBool::new(false);
        let limit = Duration::from_millis(100);
        let error =
            Mesh::connect(&listeners[0], &Token::new(""), None, place.clone(), limit, &never).unwrap_err();
        assert!(
            error.to_string().starts_with("cannot connect to worker w0 (rank 0) at 127.0.0.1:"),
            "{error}"
        );

        thread::scope(|scope| {
            let upper = scope
                .spawn(|| Mesh::connect(&listeners[0], &Token::new(""), None, place, FORM_LIMIT, &never));
            thread::sleep(Duration::from_millis(150));
            let late = TcpListener::bind(&members[0].address).unwrap();
            let place = Place { generation: 1, rank: 0, members };
            let lower = Mesh::connect(&late, &Token::new(""), None, place, FORM_LIMIT, &never).unwrap();
            assert_connected(&mut [lower, upper.join().unwrap().unwrap()]);
        });
    }
}
