//! What a worker's training thread is doing, and what it did last: so that one which hangs is told from those that wait for
//! it. And what it did in the steps of a profile, for people.

use bincode::{Decode, Encode};

use crate::message::Generation;

/// What the training thread of a worker is busy with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Encode, Decode)]
pub enum Phase {
    /// Nothing: no generation runs, or it has stopped.
    Idle,
    /// Connecting to its peers.
    Connect,
    /// Sending or getting the state.
    Transfer,
    /// Waiting for a batch.
    Data,
    /// Forward, backward, adding own shards.
    Compute,
    /// Waiting for the collective.
    Reduce,
    /// Clipping and the optimizer.
    Update,
    /// Digesting the state, or copying it for a checkpoint.
    Snapshot,
    /// A batch of an evaluation.
    Evaluate,
    /// The text of an epoch's end.
    Sample,
}

impl Phase {
    /// All of them, each at the place of its number.
    pub const ALL: [Self; 10] = [
        Self::Idle,
        Self::Connect,
        Self::Transfer,
        Self::Data,
        Self::Compute,
        Self::Reduce,
        Self::Update,
        Self::Snapshot,
        Self::Evaluate,
        Self::Sample,
    ];

    /// A word for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Connect => "connect",
            Self::Transfer => "transfer",
            Self::Data => "data",
            Self::Compute => "compute",
            Self::Reduce => "reduce",
            Self::Update => "update",
            Self::Snapshot => "snapshot",
            Self::Evaluate => "evaluate",
            Self::Sample => "sample",
        }
    }
}

/// Where the training thread is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Position {
    /// The generation.
    pub generation: Generation,
    /// What it is busy with.
    pub phase: Phase,
    /// Steps done.
    pub step: u64,
    /// It can do nothing until others do something: peers, or the coordinator that has batches for it.
    pub waits: bool,
    /// Milliseconds that it has been in this phase so far.
    pub for_ms: u32,
    /// The longest that this worker was in such a phase before; none if it has never finished one.
    pub longest_ms: Option<u32>,
    /// Collective operations that it has entered in this generation.
    pub operations: u32,
    /// Bytes that went to and came from its peers since it started.
    pub bytes: u64,
    /// The rank of the peer that it waits for, where it is known.
    pub waits_for: Option<u32>,
}

/// The thread entered a phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct TraceEvent {
    /// Milliseconds since the worker started.
    pub at_ms: u64,
    /// The generation.
    pub generation: Generation,
    /// The phase.
    pub phase: Phase,
    /// Steps done.
    pub step: u64,
    /// Collective operations that it had entered in this generation.
    pub operations: u32,
    /// Bytes that had gone to and come from its peers.
    pub bytes: u64,
}

/// The last events of a worker, and where it is.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Trace {
    /// Milliseconds since the worker started.
    pub at_ms: u64,
    /// Where the training thread is now.
    pub position: Position,
    /// The last phases that it entered, the newest last; at most [`TRACE_EVENTS`].
    pub events: Vec<TraceEvent>,
}

/// Events that a worker remembers.
pub const TRACE_EVENTS: usize = 64;

/// What a worker did in the steps of a profile, or a part of that.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Profile {
    /// Microseconds since the worker started, when it sent this.
    pub now_us: u64,
    /// In order.
    pub events: Vec<ProfileEvent>,
    /// It has done all steps of the profile.
    pub is_complete: bool,
}

/// The training thread went on to something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct ProfileEvent {
    /// Microseconds since the worker started.
    pub at_us: u64,
    /// Steps done.
    pub step: u64,
    /// To what.
    pub activity: Activity,
    /// Bytes that had gone to and come from its peers.
    pub bytes: u64,
}

/// What a profile tells of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum Activity {
    /// It entered a phase.
    Phase(Phase),
    /// It handed a bucket of the gradient to the collective, by number, and goes on with its phase.
    Bucket(u32),
}
