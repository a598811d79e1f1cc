//! A library whose ranks are threads of one process: it moves the numbers of [`Memories`], late, and fails as it is told.
//!
//! Numbers are read and written when somebody asks whether the stream is idle, never before: what was computed too late,
//! or changed too early, shows in the result. Calls that come while another is in progress are faults of the caller.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use kernels::nccl::{
    Communicator, Direction, NcclError, NcclLibrary, Result, State, Transfer, UNIQUE_ID_BYTES, UniqueId,
    Version,
};

use super::super::lock;
use super::fake_gpu::Memories;

/// Questions that a call is in progress for.
const POLLS: u32 = 3;

/// What goes wrong, on one rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// After so many operations its communicator fails.
    Fails(u32, usize),
    /// A communicator is never made.
    NeverForms,
    /// An abort takes so long, and until it is done what is under way reads and writes.
    SlowAbort(u32, Duration),
    /// It never ends in peace.
    NeverEnds(u32),
}

/// The life of a communicator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    Begun(u32),
    Destroyed(u32),
    Aborted(u32),
}

#[derive(Clone)]
pub(super) struct FakeNccl {
    pub(super) version: Version,
    shared: Arc<Shared>,
}

struct Shared {
    memories: Memories,
    faults: Vec<Fault>,
    events: Mutex<Vec<Event>>,
    ids: Mutex<u8>,
    groups: Mutex<HashMap<UniqueId, Group>>,
}

/// All ranks of one communicator.
#[derive(Default)]
struct Group {
    joined: HashSet<u32>,
    finalized: HashSet<u32>,
    /// By sender and receiver, in order.
    mail: HashMap<(u32, u32), VecDeque<Vec<f32>>>,
}

impl FakeNccl {
    pub(super) fn new(memories: &Memories, faults: &[Fault]) -> Self {
        let shared = Shared {
            memories: memories.clone(),
            faults: faults.to_vec(),
            events: Mutex::default(),
            ids: Mutex::default(),
            groups: Mutex::default(),
        };
        Self { version: Version::from_code(22304), shared: Arc::new(shared) }
    }

    /// The same library in another version.
    pub(super) fn of_version(&self, version: Version) -> Self {
        Self { version, ..self.clone() }
    }

    pub(super) fn events(&self) -> Vec<Event> {
        lock(&self.shared.events).clone()
    }
}

impl NcclLibrary for FakeNccl {
    type Communicator = FakeCommunicator;

    fn version(&self) -> Version {
        self.version
    }

    fn unique_id(&self) -> Result<UniqueId> {
        let mut ids = lock(&self.shared.ids);
        *ids += 1;
        Ok([*ids; UNIQUE_ID_BYTES])
    }

    fn begin(&self, _: usize, id: &UniqueId, rank: u32, world_size: u32) -> Result<FakeCommunicator> {
        let mut groups = lock(&self.shared.groups);
        assert!(groups.entry(*id).or_default().joined.insert(rank), "rank {rank} joined twice");
        lock(&self.shared.events).push(Event::Begun(rank));
        let inner = Inner {
            in_progress: POLLS,
            failed: None,
            is_gone: false,
            is_finalizing: false,
            queue: VecDeque::new(),
            operations: 0,
        };
        Ok(FakeCommunicator {
            shared: self.shared.clone(),
            id: *id,
            rank,
            world_size,
            inner: Mutex::new(inner),
        })
    }
}

pub(super) struct FakeCommunicator {
    shared: Arc<Shared>,
    id: UniqueId,
    rank: u32,
    world_size: u32,
    inner: Mutex<Inner>,
}

struct Inner {
    /// Questions after which the last call is done.
    in_progress: u32,
    failed: Option<String>,
    is_gone: bool,
    is_finalizing: bool,
    queue: VecDeque<Operation>,
    operations: usize,
}

struct Operation {
    transfers: Vec<Transfer>,
    is_sent: bool,
    received: Vec<bool>,
}

impl FakeCommunicator {
    fn has(&self, fault: impl Fn(&Fault) -> bool) -> bool {
        self.shared.faults.iter().any(fault)
    }

    fn enqueue(&self, transfers: Vec<Transfer>) -> Result<()> {
        let mut inner = lock(&self.inner);
        if inner.is_gone {
            return Err(NcclError::Aborted);
        }
        assert_eq!(inner.in_progress, 0, "a call came while another was in progress");
        assert!(!inner.is_finalizing && inner.failed.is_none(), "a call came after the end");
        inner.in_progress = POLLS;
        inner.operations += 1;
        let done = inner.operations;
        if self
            .has(|fault| matches!(fault, Fault::Fails(rank, after) if *rank == self.rank && *after == done))
        {
            inner.failed = Some("unhandled cuda error".to_owned());
        }
        let received = vec![false; transfers.len()];
        inner.queue.push_back(Operation { transfers, is_sent: false, received });
        Ok(())
    }

    /// Runs what can run at the front of the stream. Gives whether nothing is left.
    fn progress(&self, inner: &mut Inner) -> bool {
        let mut groups = lock(&self.shared.groups);
        let group = groups.get_mut(&self.id).expect("it was joined");
        while let Some(Operation { transfers, is_sent, received }) = inner.queue.front_mut() {
            for Transfer { direction, address, floats, peer } in transfers.iter().copied() {
                if direction == Direction::Send && !*is_sent {
                    let values = self.shared.memories.at(address, floats, |values| values.to_vec());
                    let values =
                        values.unwrap_or_else(|| panic!("{floats} floats at {address:#x} are of no buffer"));
                    group.mail.entry((self.rank, peer)).or_default().push_back(values);
                }
            }
            *is_sent = true;
            let mut blocked = HashSet::new();
            for (Transfer { direction, address, floats, peer }, received) in
                transfers.iter().copied().zip(received.iter_mut())
            {
                if direction == Direction::Send || *received || blocked.contains(&peer) {
                    continue;
                }
                let Some(values) = group.mail.get_mut(&(peer, self.rank)).and_then(VecDeque::pop_front)
                else {
                    blocked.insert(peer);
                    continue;
                };
                assert_eq!(values.len(), floats, "rank {peer} sent another number of floats");
                let written = self.shared.memories.at(address, floats, |to| to.copy_from_slice(&values));
                assert!(written.is_some(), "{floats} floats at {address:#x} are of no buffer");
                *received = true;
            }
            if !blocked.is_empty() {
                return false;
            }
            inner.queue.pop_front();
        }
        true
    }

    fn leave(&self, event: Event) {
        let mut inner = lock(&self.inner);
        if !inner.is_gone {
            inner.is_gone = true;
            lock(&self.shared.events).push(event);
        }
    }
}

impl Communicator for FakeCommunicator {
    fn state(&self) -> State {
        let mut inner = lock(&self.inner);
        if inner.is_gone {
            return State::Failed("the communicator was aborted".to_owned());
        }
        let groups = lock(&self.shared.groups);
        let group = &groups[&self.id];
        if group.joined.len() < self.world_size as usize || self.has(|fault| *fault == Fault::NeverForms) {
            return State::InProgress;
        }
        if inner.is_finalizing && group.finalized.len() < self.world_size as usize {
            return State::InProgress;
        }
        inner.in_progress = inner.in_progress.saturating_sub(1);
        match &inner.failed {
            _ if inner.in_progress > 0 => State::InProgress,
            Some(cause) => State::Failed(cause.clone()),
            None => State::Ready,
        }
    }

    fn transfer(&self, transfers: &[Transfer]) -> Result<()> {
        self.enqueue(transfers.to_vec())
    }

    fn all_gather(&self, source: u64, destination: u64, floats: usize) -> Result<()> {
        let both = |peer: u32| {
            let to = destination + 4 * floats as u64 * u64::from(peer);
            [(Direction::Send, source), (Direction::Receive, to)].map(|(direction, address)| Transfer {
                direction,
                address,
                floats,
                peer,
            })
        };
        self.enqueue((0..self.world_size).flat_map(both).collect())
    }

    fn is_idle(&self) -> Result<bool> {
        let mut inner = lock(&self.inner);
        if inner.is_gone {
            return Err(NcclError::Aborted);
        }
        Ok(self.progress(&mut inner))
    }

    fn finalize(&self) -> Result<()> {
        let mut inner = lock(&self.inner);
        if inner.is_gone {
            return Err(NcclError::Aborted);
        }
        inner.is_finalizing = true;
        inner.in_progress = POLLS;
        if !self.has(|fault| *fault == Fault::NeverEnds(self.rank)) {
            lock(&self.shared.groups).get_mut(&self.id).expect("it was joined").finalized.insert(self.rank);
        }
        Ok(())
    }

    fn destroy(&self) {
        self.leave(Event::Destroyed(self.rank));
    }

    fn abort(&self) {
        for fault in &self.shared.faults {
            if let Fault::SlowAbort(rank, pause) = fault
                && *rank == self.rank
                && !lock(&self.inner).is_gone
            {
                thread::sleep(*pause);
                self.progress(&mut lock(&self.inner));
            }
        }
        self.leave(Event::Aborted(self.rank));
    }
}

impl Drop for FakeCommunicator {
    fn drop(&mut self) {
        self.abort();
    }
}
