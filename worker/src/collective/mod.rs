//! Sums and gathers across the workers of one generation: the seam behind which TCP and NCCL are exchangeable.
//!
//! One algorithm for all: each worker sends the values of the tree nodes that cover its shards, cut into one slice
//! per rank; each rank adds the nodes of its slice in tree order; the finished slices are gathered by all. The
//! order of additions is the tree's, so the result has the same bits for any number of workers.
//!
//! In reading order: [`reduce`] (the pure part), [`mesh`] (who is connected), `wire` (one frame), `outbox` (what
//! is on its way to a peer), `links` (the threads), [`tcp`] (the trait over all of these), [`nccl`] (the trait over NCCL,
//! beside a TCP mesh), `choice` (which of the two).

mod choice;
#[cfg(test)]
mod host_device;
mod links;
pub mod mesh;
pub mod nccl;
mod outbox;
pub mod reduce;
pub mod tcp;
#[cfg(test)]
mod tests;
mod wire;

pub use choice::Choice;
pub(crate) use choice::choose;

use std::fmt;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use model::device::{Device, DeviceError};
use protocol::tree::TreeNode;

/// An operation that was begun and must be waited for, once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(pub u32);

/// Why an operation did not finish. The partial step must be dropped.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CollectiveError {
    /// Another thread called [`AbortHandle::abort`].
    #[error("the step was aborted")]
    Aborted,
    /// A peer's connection broke.
    #[error("lost the connection to worker {name} (rank {rank}): {cause}")]
    PeerLost {
        /// Its rank.
        rank: u32,
        /// Its name.
        name: String,
        /// What the socket said.
        cause: String,
    },
    /// A peer sent nothing for too long.
    #[error("nothing arrived from worker {name} (rank {rank}) for {seconds} s")]
    Timeout {
        /// Its rank.
        rank: u32,
        /// Its name.
        name: String,
        /// How long.
        seconds: u64,
    },
    /// NCCL failed, or did nothing for too long.
    #[error("NCCL: {0}")]
    Nccl(String),
    /// The device could not hand out or take in values.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// Result of a collective call.
pub type Result<T> = std::result::Result<T, CollectiveError>;

/// Ends all waiting of a collective, from any thread, at any time; more than once is harmless.
#[derive(Clone)]
pub struct AbortHandle(std::sync::Arc<dyn Fn() + Send + Sync>);

impl AbortHandle {
    /// A handle that calls `abort`.
    pub fn new(abort: impl Fn() + Send + Sync + 'static) -> Self {
        Self(std::sync::Arc::new(abort))
    }

    /// Makes every present and future [`Collective::wait`] return [`CollectiveError::Aborted`] at once.
    pub fn abort(&self) {
        (self.0)();
    }
}

impl fmt::Debug for AbortHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AbortHandle")
    }
}

/// The workers of one generation as one worker sees them. All workers make the same calls in the same order.
pub trait Collective<D: Device>: Send {
    /// Members of the generation.
    fn world_size(&self) -> u32;

    /// Begins to sum one bucket over all shards. `nodes` are the tree nodes that cover this worker's shards, each
    /// with a buffer whose `bucket` range holds its value, which must not change until the operation was waited for. The
    /// sum goes to `into`, of which the `bucket` range is not specified until then.
    fn begin_reduce(
        &mut self,
        device: &D,
        bucket: Range<usize>,
        nodes: &[(TreeNode, &D::Buffer)],
        into: &mut D::Buffer,
    ) -> Result<Ticket>;

    /// Begins to gather a buffer of which rank `r` holds `parts[r]`. This worker's part must not change until the
    /// operation was waited for, with the same buffer, and the others' are not specified until then.
    fn begin_gather(&mut self, device: &D, buffer: &D::Buffer, parts: Vec<Range<usize>>) -> Result<Ticket>;

    /// Waits until an operation is finished and its result is in `into`: the whole bucket of a reduction, which began with
    /// this buffer, or the other ranks' parts of a gather.
    fn wait(&mut self, device: &D, ticket: Ticket, into: &mut D::Buffer) -> Result<()>;

    /// Sends a few bytes to every worker and returns everybody's, by rank.
    fn exchange(&mut self, own: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// The handle that ends all waiting.
    fn abort_handle(&self) -> AbortHandle;
}

/// A lock whose holder cannot leave its value half-changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
