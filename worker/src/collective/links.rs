//! What the threads of a [`TcpCollective`](super::tcp::TcpCollective) share, and the threads: one reader and one
//! writer per peer.
//!
//! Whoever delivers the last piece of a block adds the block up and sends the sum: usually a reader, while the training
//! thread computes the next bucket; the training thread itself if its own piece came last. So there is no engine thread
//! and no hand-over to one. Readers never wait for somebody to read (see `outbox`), so two workers cannot block each
//! other. Where there is only one peer, the training thread reads itself while it begins or waits for an operation, unless
//! the stream holds back what a poll should see: TLS does.

use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use protocol::frame::BulkKind;
use transport::DataStream;

use super::mesh::{Mesh, Place};
use super::outbox::Outbox;
use super::reduce::{Plan, Refused, Sums};
use super::wire::{Address, DataPlaneBytes, FrameReader, Incoming, Landing, Outgoing, Payload, Received};
use super::{CollectiveError, Result, lock};

/// A peer may be this many operations ahead; the trainer waits for all of a step, so it is a few at most.
const TICKETS_AHEAD_LIMIT: u32 = 4096;

/// How long a collective that ends in peace waits for its last frames to leave.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// How often a reading thread looks whether the training thread still reads. While it does, nobody waits for this.
const READING_PAUSE: Duration = Duration::from_millis(1);

/// Finished values of one block that wait for the training thread to take them.
#[derive(Debug)]
pub(super) struct Piece {
    /// Whose slice or part it is.
    pub(super) rank: u32,
    pub(super) block: u32,
    /// `None` if the values lie already where they are wanted.
    pub(super) payload: Option<Payload>,
}

struct Peer {
    outbox: Outbox,
    /// Held by whoever reads what the peer sends.
    reader: Mutex<FrameReader>,
}

struct State {
    sums: Sums,
    /// By ticket, also of operations that only others have begun.
    finished: HashMap<u32, Vec<Piece>>,
    next_ticket: u32,
    is_aborted: bool,
    /// Set when this worker itself ends: what sockets say afterwards means nothing.
    is_closing: bool,
    lost: Option<(u32, String)>,
    /// By rank: who has said goodbye.
    has_left: Vec<bool>,
    /// By rank: when the last frame came.
    last_heard: Vec<Instant>,
    writers_running: usize,
}

/// The shared part of a collective.
pub(super) struct Links {
    pub(super) place: Place,
    pub(super) plan: Plan,
    timeout: Duration,
    bytes: Arc<DataPlaneBytes>,
    /// By rank; `None` for this worker.
    peers: Vec<Option<Peer>>,
    state: Mutex<State>,
    /// Notified when anything in `state` changes that the training thread may wait for.
    changed: Condvar,
    /// Buffers of blocks that nobody needs at the moment.
    spare: Mutex<Vec<Vec<f32>>>,
}

impl Peer {
    fn new(stream: DataStream) -> Self {
        Self { outbox: Outbox::new(stream), reader: Mutex::new(FrameReader::new()) }
    }
}

/// Starts the threads over the streams of a mesh.
pub(super) fn start(
    mesh: Mesh,
    timeout: Duration,
    bytes: Arc<DataPlaneBytes>,
) -> io::Result<(Arc<Links>, Vec<JoinHandle<()>>)> {
    let Mesh { place, streams } = mesh;
    let world_size = place.members.len();
    let ranges: Vec<_> = place.members.iter().map(|member| member.shards.clone()).collect();
    let state = State {
        sums: Sums::default(),
        finished: HashMap::new(),
        next_ticket: 0,
        is_aborted: false,
        is_closing: false,
        lost: None,
        has_left: vec![false; world_size],
        last_heard: vec![Instant::now(); world_size],
        writers_running: world_size - 1,
    };
    let links = Arc::new(Links {
        place,
        plan: Plan::new(&ranges),
        timeout,
        bytes,
        peers: streams.into_iter().map(|stream| stream.map(Peer::new)).collect(),
        state: Mutex::new(state),
        changed: Condvar::new(),
        spare: Mutex::default(),
    });
    let mut threads = Vec::with_capacity(2 * (world_size - 1));
    for rank in links.peers() {
        let started =
            spawn(&links, format!("to-rank-{rank}"), move |links| links.write_to(rank)).and_then(|writer| {
                threads.push(writer);
                spawn(&links, format!("from-rank-{rank}"), move |links| links.read_from(rank))
            });
        match started {
            Ok(reader) => threads.push(reader),
            Err(error) => {
                links.abort();
                return Err(error);
            }
        }
    }
    Ok((links, threads))
}

fn spawn(
    links: &Arc<Links>,
    name: String,
    run: impl FnOnce(&Links) + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let links = links.clone();
    std::thread::Builder::new().name(name).spawn(move || run(&links))
}

/// What the training thread calls.
impl Links {
    /// The number of the next operation, unless no operation can succeed any more.
    pub(super) fn next_ticket(&self) -> Result<u32> {
        let mut state = lock(&self.state);
        self.failure(&state).map_or(Ok(()), Err)?;
        let ticket = state.next_ticket;
        state.next_ticket = ticket.wrapping_add(1);
        self.bytes.add_operation();
        Ok(ticket)
    }

    /// Sends values to one peer. What is sent to a peer that is gone vanishes; waiting finds that out.
    pub(super) fn send(&self, rank: u32, address: Address, payload: Payload) {
        let is_bytes = matches!(payload, Payload::Bytes(_));
        let frame = Outgoing::new(self.place.generation, address, is_bytes, payload.as_bytes());
        self.send_frame(rank, frame, payload.as_bytes(), || payload.clone());
        self.recycle_payload(payload);
    }

    /// As [`send`](Self::send), for floats that stay where they are only for now.
    pub(super) fn send_from(&self, rank: u32, address: Address, values: &[f32]) {
        let bytes = bytemuck::cast_slice(values);
        let frame = Outgoing::new(self.place.generation, address, false, bytes);
        self.send_frame(rank, frame, bytes, || self.kept(values));
    }

    /// A copy of floats that are still to be sent.
    fn kept(&self, values: &[f32]) -> Payload {
        let mut kept = self.spare();
        kept.clear();
        kept.extend_from_slice(values);
        Payload::Floats(Arc::new(kept))
    }

    /// Sends finished values of this worker's part to all peers.
    pub(super) fn send_to_all(&self, ticket: u32, block: u32, payload: &Payload) {
        let is_bytes = matches!(payload, Payload::Bytes(_));
        self.send_finished(ticket, block, is_bytes, payload.as_bytes(), || payload.clone());
    }

    /// `keep` gives the values to keep for a peer whose socket does not take all of them at once.
    fn send_finished(
        &self,
        ticket: u32,
        block: u32,
        is_bytes: bool,
        values: &[u8],
        keep: impl Fn() -> Payload,
    ) {
        if self.peers.len() == 1 {
            return; // Nobody reads the checksum.
        }
        let address = Address { kind: BulkKind::Gather, ticket, place: self.place.rank, block };
        let frame = Outgoing::new(self.place.generation, address, is_bytes, values);
        for peer in self.peers() {
            self.send_frame(peer, frame.clone(), values, &keep);
        }
    }

    fn send_frame(&self, rank: u32, frame: Outgoing, payload: &[u8], keep: impl FnOnce() -> Payload) {
        match self.peer(rank).outbox.send(frame, payload, keep) {
            Ok(sent) => self.bytes.add_sent(sent.unwrap_or(0)),
            Err(error) => self.lose(rank, describe(&error)),
        }
    }

    fn peer(&self, rank: u32) -> &Peer {
        self.peers[rank as usize].as_ref().expect("every other rank is a peer")
    }

    /// The ranks of all others, the next one first: so not all workers send to rank 0 at the same time.
    pub(super) fn peers(&self) -> impl Iterator<Item = u32> + use<> {
        let (rank, world_size) = (self.place.rank, self.place.members.len() as u32);
        (1..world_size).map(move |distance| (rank + distance) % world_size)
    }

    /// Blocks until there are finished pieces of the ticket and moves them to `taken`. `missing` counts by rank the
    /// pieces that are still to come; at least one is.
    ///
    /// Where there is only one peer, there is nobody else to wait for: the training thread reads itself what the peer
    /// sends, without a hand-over, to the `landing` if there is one. It keeps the `reader` for as long as it waits for
    /// this operation.
    pub(super) fn take_finished<'a>(
        &'a self,
        ticket: u32,
        missing: &[u32],
        since: Instant,
        reader: &mut Option<MutexGuard<'a, FrameReader>>,
        mut landing: Option<Landing<'_>>,
        taken: &mut Vec<Piece>,
    ) -> Result<()> {
        let mut state = lock(&self.state);
        loop {
            if state.is_aborted {
                return Err(CollectiveError::Aborted);
            }
            if let Some(pieces) = state.finished.get_mut(&ticket)
                && !pieces.is_empty()
            {
                taken.append(pieces);
                self.bytes.wait_for(None);
                return Ok(());
            }
            let patience = self.patience(&state, ticket, missing, since)?;
            *reader = reader.take().or_else(|| self.only_reader());
            if let Some(held) = reader {
                drop(state);
                let rank = 1 - self.place.rank;
                match self.read_one(rank, held, landing.as_mut()) {
                    Reading::Taken => {}
                    Reading::NothingYet => self.peer(rank).outbox.stream.wait_readable(Some(patience)),
                    Reading::Over => *reader = None,
                }
                state = lock(&self.state);
            } else {
                state = self.changed.wait_timeout(state, patience).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }

    /// Takes what the only peer has sent meanwhile, as [`take_finished`](Self::take_finished) does: while the training
    /// thread talks to it, no other thread has to wake up.
    pub(super) fn read_arrived<'a>(&'a self, reader: &mut Option<MutexGuard<'a, FrameReader>>) {
        *reader = reader.take().or_else(|| self.only_reader());
        if let Some(held) = reader {
            while let Reading::Taken = self.read_one(1 - self.place.rank, held, None) {}
        }
    }

    /// The reader of the only peer, unless that peer's own thread is reading at this moment, or must be the only one to.
    fn only_reader(&self) -> Option<MutexGuard<'_, FrameReader>> {
        let mut peers = self.peers.iter().flatten();
        let (Some(peer), None) = (peers.next(), peers.next()) else { return None };
        if peer.outbox.stream.holds_bytes() { None } else { try_lock(&peer.reader) }
    }

    /// How much longer to wait for what is missing, or why not at all.
    ///
    /// First asked for are pieces of this worker's own slice: their senders have not entered the operation. Only a
    /// worker without a slice (the bucket is tiny) may name the owner of a slice that itself waits for another.
    fn patience(&self, state: &State, ticket: u32, missing: &[u32], since: Instant) -> Result<Duration> {
        if let Some(failure) = self.failure(state) {
            return Err(failure);
        }
        let own = self.place.rank;
        let unfinished =
            (0..).zip(missing).filter(|(rank, count)| *rank != own && **count > 0).map(|(rank, _)| rank);
        let mut culprits = state.sums.missing(&self.plan, ticket).chain(unfinished).peekable();
        let Some(&first) = culprits.peek() else {
            return Ok(self.timeout); // A reader is adding the last block at this moment.
        };
        if let Some(rank) = culprits.find(|rank| state.has_left[*rank as usize]) {
            return Err(self.peer_lost(rank, "it ended its part of the generation"));
        }
        self.bytes.wait_for(Some(first));
        let silence = since.max(state.last_heard[first as usize]).elapsed();
        if silence >= self.timeout {
            let name = self.place.members[first as usize].name.clone();
            return Err(CollectiveError::Timeout { rank: first, name, seconds: self.timeout.as_secs() });
        }
        Ok(self.timeout - silence)
    }

    /// Forgets an operation whose pieces were all taken.
    pub(super) fn forget(&self, ticket: u32) {
        lock(&self.state).finished.remove(&ticket);
    }

    /// Makes all waiting end with [`CollectiveError::Aborted`] and closes the connections.
    pub(super) fn abort(&self) {
        lock(&self.state).is_aborted = true;
        self.changed.notify_all();
        self.close();
    }

    /// Ends this worker's part: in peace if nothing failed, so that peers get the frames that are still queued.
    pub(super) fn end(&self) {
        let mut state = lock(&self.state);
        let in_peace = self.failure(&state).is_none();
        state.is_closing = true;
        if in_peace {
            drop(state);
            for peer in self.peers() {
                self.send(peer, Address::GOODBYE, Payload::Bytes(Arc::default()));
                self.peer(peer).outbox.close();
            }
            let drained = self
                .changed
                .wait_timeout_while(lock(&self.state), DRAIN_LIMIT, |state| state.writers_running > 0);
            drop(drained);
        } else {
            drop(state);
        }
        self.close();
    }

    fn close(&self) {
        for Peer { outbox, .. } in self.peers.iter().flatten() {
            outbox.close();
            outbox.stream.shutdown();
        }
    }

    /// Whether an operation can still succeed.
    pub(super) fn check(&self) -> Result<()> {
        self.failure(&lock(&self.state)).map_or(Ok(()), Err)
    }

    fn failure(&self, state: &State) -> Option<CollectiveError> {
        if state.is_aborted {
            return Some(CollectiveError::Aborted);
        }
        state.lost.as_ref().map(|(rank, cause)| self.peer_lost(*rank, cause))
    }

    /// The error that names a peer.
    pub(super) fn peer_lost(&self, rank: u32, cause: &str) -> CollectiveError {
        let name = self.place.members[rank as usize].name.clone();
        CollectiveError::PeerLost { rank, name, cause: cause.into() }
    }
}

/// What all threads call.
impl Links {
    /// A buffer for a block; its length and values are those of its last use.
    pub(super) fn spare(&self) -> Vec<f32> {
        lock(&self.spare).pop().unwrap_or_default()
    }

    fn recycle(&self, values: Vec<f32>) {
        lock(&self.spare).push(values);
    }

    /// Keeps a payload's buffer for later use if this was its last holder.
    pub(super) fn recycle_payload(&self, payload: Payload) {
        if let Payload::Floats(values) = payload
            && let Some(values) = Arc::into_inner(values)
        {
            self.recycle(values);
        }
    }

    /// Takes one node's values of one block of this worker's slice. The last piece of a block finishes it: it is
    /// added up here and sent to all.
    pub(super) fn deliver(
        &self,
        ticket: u32,
        block: u32,
        sender: (u32, u32),
        values: Vec<f32>,
    ) -> std::result::Result<(), Refused> {
        let complete = lock(&self.state).sums.deliver(&self.plan, (ticket, block), sender, values)?;
        let Some(pieces) = complete else { return Ok(()) };
        let sum = self.plan.sum(pieces, |values| self.recycle(values));
        let payload = Payload::Floats(Arc::new(sum));
        self.send_to_all(ticket, block, &payload);
        self.finish(ticket, Piece { rank: self.place.rank, block, payload: Some(payload) });
        Ok(())
    }

    /// As [`deliver`](Self::deliver) for all of this worker's own nodes, from where they lie to where the sum is wanted, if
    /// they are the last ones. Gives whether they are.
    pub(super) fn finish_own(
        &self,
        ticket: u32,
        block: u32,
        own: &[&[f32]],
        sum: &mut [f32],
    ) -> std::result::Result<bool, Refused> {
        let complete = lock(&self.state).sums.complete(&self.plan, (ticket, block), own, sum.len())?;
        let Some(pieces) = complete else { return Ok(false) };
        self.plan.sum_to(sum, pieces, |values| self.recycle(values));
        self.send_finished(ticket, block, false, bytemuck::cast_slice(sum), || self.kept(sum));
        self.finish(ticket, Piece { rank: self.place.rank, block, payload: None });
        Ok(true)
    }

    fn finish(&self, ticket: u32, piece: Piece) {
        lock(&self.state).finished.entry(ticket).or_default().push(piece);
        self.changed.notify_all();
    }

    /// Notes that a peer is gone, unless it has said so itself: then it is a loss only for somebody who needs it.
    fn lose(&self, rank: u32, cause: String) {
        let mut state = lock(&self.state);
        if !state.is_closing && !state.has_left[rank as usize] && state.lost.is_none() {
            state.lost = Some((rank, cause));
        }
        drop(state);
        self.changed.notify_all();
    }

    fn write_to(&self, rank: u32) {
        let done = |sent, payload| {
            self.bytes.add_sent(sent);
            self.recycle_payload(payload);
        };
        if let Err(error) = self.peer(rank).outbox.write_queued(done) {
            self.lose(rank, describe(&error));
        }
        lock(&self.state).writers_running -= 1;
        self.changed.notify_all();
    }

    /// A peer's reading thread. While the training thread reads, it keeps out of the way.
    fn read_from(&self, rank: u32) {
        let Peer { outbox, reader } = self.peer(rank);
        loop {
            match try_lock(reader).map(|mut reader| self.read_one(rank, &mut reader, None)) {
                Some(Reading::Taken) => {}
                Some(Reading::NothingYet) => outbox.stream.wait_readable(None),
                Some(Reading::Over) => return,
                None => std::thread::sleep(READING_PAUSE),
            }
        }
    }

    /// Takes one frame of a peer, if a whole one is there. Whoever calls it holds the reader until the frame is added
    /// or finished: nothing of this peer happens meanwhile.
    fn read_one(&self, rank: u32, reader: &mut FrameReader, landing: Option<&mut Landing<'_>>) -> Reading {
        let stream = &self.peer(rank).outbox.stream;
        let frame = match reader.read(stream, &self.bytes, landing, || self.spare()) {
            Ok(Some(frame)) => frame,
            Ok(None) => return Reading::NothingYet,
            Err(error) => {
                self.lose(rank, describe(&error));
                return Reading::Over;
            }
        };
        if frame.generation != self.place.generation {
            return Reading::Taken;
        }
        if frame.address == Address::GOODBYE {
            lock(&self.state).has_left[rank as usize] = true;
            self.changed.notify_all();
            return Reading::Over;
        }
        if let Err(cause) = self.take(rank, frame) {
            self.lose(rank, cause);
            return Reading::Over;
        }
        Reading::Taken
    }

    fn take(&self, rank: u32, frame: Incoming) -> std::result::Result<(), String> {
        let Address { kind, ticket, place, block } = frame.address;
        {
            let mut state = lock(&self.state);
            state.last_heard[rank as usize] = Instant::now();
            let ahead = ticket.wrapping_sub(state.next_ticket) as i32;
            if ahead > TICKETS_AHEAD_LIMIT as i32 {
                return Err(format!("it is {ahead} operations ahead"));
            }
        }
        match (kind, frame.payload) {
            (BulkKind::Reduce, Received::Floats(values)) => {
                let delivered = self.deliver(ticket, block, (rank, place), values);
                delivered.map_err(|refused| refused.to_string())
            }
            (BulkKind::Gather, payload) if place == rank => {
                let payload = match payload {
                    Received::Floats(values) => Some(Payload::Floats(Arc::new(values))),
                    Received::Bytes(bytes) => Some(Payload::Bytes(Arc::new(bytes))),
                    Received::Landed(_) => None,
                };
                self.finish(ticket, Piece { rank, block, payload });
                Ok(())
            }
            _ => Err(format!("it sent a {kind:?} frame for place {place}")),
        }
    }
}

/// What came of an attempt to read a frame.
enum Reading {
    Taken,
    NothingYet,
    /// Nothing more will come: the peer said goodbye or is lost.
    Over,
}

fn try_lock<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    match mutex.try_lock() {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(error)) => Some(error.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

fn describe(error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::UnexpectedEof => "it closed the connection".into(),
        _ => error.to_string(),
    }
}
