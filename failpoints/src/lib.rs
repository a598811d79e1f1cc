//! Failpoints: places in coordinator and worker at which a test stops, kills or hinders a process exactly there.
//!
//! A build without the feature `enabled` (`failpoints` of the program) has none: [`reach`] is then a constant. With it,
//! a process obeys `LOCKSTEP_FAIL`, a list of `[WHO/]POINT@STEP:ACTION` with semicolons between them:
//!
//! - `WHO` is `worker`, `coordinator`, or the name of one process; without it any process is meant.
//! - `POINT` is the name of a [`Point`], `STEP` a number of steps done. The action is taken the first time that a process
//!   reaches the point in that step or a later one.
//! - `ACTION`: `kill` (SIGKILL), `stop` (SIGSTOP), `term` (SIGTERM), each to itself; `exit` (code 1 at once); `hang` (this
//!   thread sleeps for ever, the others live); `hold` (this thread waits until the test lets it go, or 60 s);
//!   `delay:MILLISECONDS`; `error` (what is done there fails); `flip` (one bit of the replica's moments is turned).
//!
//! Before it acts, the process writes a file into the folder `LOCKSTEP_FAIL_EVENTS`, named `NAME.POINT@STEP:ACTION`, with
//! its process id and the step: so a test knows that it was there. A file that is there already says that the action was
//! taken, perhaps by a process of this name that has died of it, and it is not taken again. A thread that holds goes on once
//! there is a file `NAME.POINT@STEP:ACTION.go`.
#![forbid(unsafe_code)]

#[cfg(feature = "enabled")]
mod plan;

/// A place in the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// A worker is about to open its device.
    Open,
    /// A worker has the batch of a step and has not begun to compute.
    Compute,
    /// A worker has its gradient and has not yet entered the exchange of sums.
    Reduce,
    /// A worker has applied a step and has not reported it.
    Update,
    /// A worker takes part in a transfer of the state between members, or the coordinator sends one from the disk.
    StateTransfer,
    /// A worker is about to wait for a batch; the coordinator is about to send one.
    Feed,
    /// A worker has computed a batch of an evaluation.
    Evaluation,
    /// A worker is about to write the text of an epoch's end.
    Sampling,
    /// A worker has streamed half of its state for a checkpoint; the coordinator has received one.
    Checkpoint,
    /// The coordinator is about to write the bytes of a checkpoint to its temporary file.
    CheckpointWrite,
    /// The bytes are written and not yet durable.
    CheckpointFsync,
    /// They are durable, and the file has not yet its name.
    CheckpointRename,
    /// Members are asked to pause for a worker that is to be admitted: the coordinator before it asks, a worker when it is
    /// asked.
    Admission,
    /// An epoch has ended: a worker has updated its control state and has not said so, the coordinator has not yet
    /// recorded it.
    EpochEnd,
    /// A generation forms: a worker is about to connect to its peers, the coordinator has not yet told anybody.
    Recovery,
}

impl Point {
    /// All of them.
    pub const ALL: [Self; 15] = [
        Self::Open,
        Self::Compute,
        Self::Reduce,
        Self::Update,
        Self::StateTransfer,
        Self::Feed,
        Self::Evaluation,
        Self::Sampling,
        Self::Checkpoint,
        Self::CheckpointWrite,
        Self::CheckpointFsync,
        Self::CheckpointRename,
        Self::Admission,
        Self::EpochEnd,
        Self::Recovery,
    ];

    /// Its name in `LOCKSTEP_FAIL`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Compute => "compute",
            Self::Reduce => "reduce",
            Self::Update => "update",
            Self::StateTransfer => "state-transfer",
            Self::Feed => "feed",
            Self::Evaluation => "evaluation",
            Self::Sampling => "sampling",
            Self::Checkpoint => "checkpoint",
            Self::CheckpointWrite => "checkpoint-write",
            Self::CheckpointFsync => "checkpoint-fsync",
            Self::CheckpointRename => "checkpoint-rename",
            Self::Admission => "admission",
            Self::EpochEnd => "epoch-end",
            Self::Recovery => "recovery",
        }
    }
}

/// What the code at a point is to do itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Injected {
    /// Fail, where it can.
    Error,
    /// Turn one bit of the replica's moments.
    Flip,
}

/// Makes this process obey `LOCKSTEP_FAIL` from now on, as a `role` (`worker`, `coordinator`) of this name.
///
/// # Errors
/// What cannot be read in `LOCKSTEP_FAIL`.
#[cfg(not(feature = "enabled"))]
pub fn obey(_role: &str, _name: &str) -> Result<(), String> {
    Ok(())
}

/// Says that this thread is at a point, `step` steps being done. Does what was planned for it, and gives what is left to
/// the caller.
#[cfg(not(feature = "enabled"))]
#[inline(always)]
pub fn reach(_point: Point, _step: u64) -> Option<Injected> {
    None
}

#[cfg(feature = "enabled")]
pub use plan::{obey, reach};
