//! NCCL, as far as a collective needs it: a communicator that moves floats between the memories of CUDA devices.
//!
//! | module | topic |
//! |---|---|
//! | this one | what is asked of the library, as two traits: tests have one of their own |
//! | `library` | with feature `cuda`: the real one |
//! | `search` | with feature `cuda`: where its file is |
//!
//! Nothing here adds: sums are the device's affair, in the tree's order.

#[cfg(feature = "cuda")]
mod library;
#[cfg(feature = "cuda")]
mod search;

use std::fmt;

#[cfg(feature = "cuda")]
pub use library::{Library, StreamCommunicator};

/// The oldest version that is used: from here on every call of a communicator can be non-blocking and be aborted.
pub const OLDEST: Version = Version { major: 2, minor: 18, patch: 1 };

/// From this version on two ranks may share a device, where `NCCL_MULTI_RANK_GPU_ENABLE` is 1.
pub const MULTI_RANK: Version = Version { major: 2, minor: 30, patch: 3 };

/// Bytes of a [`UniqueId`].
pub const UNIQUE_ID_BYTES: usize = 128;

/// Names one communicator: made by one rank, given to all.
pub type UniqueId = [u8; UNIQUE_ID_BYTES];

/// A version of the library.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Third number.
    pub patch: u32,
}

impl Version {
    /// The version that `ncclGetVersion` writes as one number: 21805 is 2.18.5, and 2804 is 2.8.4.
    pub fn from_code(code: u32) -> Self {
        let thousand = if code < 10_000 { 1000 } else { 10_000 };
        Self { major: code / thousand, minor: code % thousand / 100, patch: code % 100 }
    }

    /// The same number back.
    pub fn code(self) -> u32 {
        let thousand = if self.major == 2 && self.minor <= 8 { 1000 } else { 10_000 };
        self.major * thousand + self.minor * 100 + self.patch
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// Why NCCL cannot be used, or what one of its calls said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NcclError {
    /// No file of the library was found.
    Missing {
        /// Where it was looked for.
        looked_in: String,
    },
    /// A file was found and is not usable.
    Unusable {
        /// Its path.
        path: String,
        /// Why.
        cause: String,
    },
    /// It is older than [`OLDEST`].
    Old {
        /// Its path.
        path: String,
        /// What it is.
        version: Version,
    },
    /// A call failed.
    Call {
        /// Its name.
        name: &'static str,
        /// What the library said.
        cause: String,
    },
    /// The communicator was aborted.
    Aborted,
}

impl fmt::Display for NcclError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing { looked_in } => write!(f, "there is no libnccl.so.2 in {looked_in}"),
            Self::Unusable { path, cause } => write!(f, "{path} cannot be used: {cause}"),
            Self::Old { path, version } => write!(f, "{path} is NCCL {version}, at least {OLDEST} is needed"),
            Self::Call { name, cause } => write!(f, "{name} failed: {cause}"),
            Self::Aborted => f.write_str("the communicator was aborted"),
        }
    }
}

impl std::error::Error for NcclError {}

/// Result of a call.
pub type Result<T> = std::result::Result<T, NcclError>;

/// How a communicator is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// The last call is done or enqueued; the next one may come.
    Ready,
    /// The last call is still under way: no other call but [`Communicator::abort`] may come.
    InProgress,
    /// Something failed, here or elsewhere. Only an abort is left.
    Failed(String),
}

/// One end of a movement of floats between two ranks, or within one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transfer {
    /// Whether it leaves this rank.
    pub direction: Direction,
    /// Where the first float lies on this rank's device.
    pub address: u64,
    /// How many.
    pub floats: usize,
    /// The rank at the other end; may be this one.
    pub peer: u32,
}

/// Which end of a [`Transfer`] this rank is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// The floats are read here.
    Send,
    /// They are written here.
    Receive,
}

/// The library.
pub trait NcclLibrary: Send + Sync {
    /// What it makes.
    type Communicator: Communicator;

    /// Its version, at least [`OLDEST`].
    fn version(&self) -> Version;

    /// A name for a new communicator.
    ///
    /// # Errors
    /// The library finds no network interface, or fails otherwise.
    fn unique_id(&self) -> Result<UniqueId>;

    /// Begins to make a communicator of this rank on a CUDA device, and returns at once: it can be used when its state
    /// is [`State::Ready`], which takes all ranks.
    ///
    /// # Errors
    /// The device or the library fails. No communicator is left then.
    fn begin(&self, device: usize, id: &UniqueId, rank: u32, world_size: u32) -> Result<Self::Communicator>;
}

/// One rank's end of a communicator, with a stream of its own on which its operations run one after another.
///
/// No call waits for another rank: whether one is done is asked of [`state`](Self::state), whether its floats have moved of
/// [`is_idle`](Self::is_idle). All ranks make the same calls in the same order. A communicator that is dropped is
/// aborted.
///
/// Addresses are of the device's memory: the host never follows them. A wrong one is an error of the device.
pub trait Communicator: Send + Sync + 'static {
    /// How it is.
    fn state(&self) -> State;

    /// Enqueues some transfers that happen together. The n-th send to a peer meets its n-th receive from this rank.
    ///
    /// # Errors
    /// The library says so at once.
    fn transfer(&self, transfers: &[Transfer]) -> Result<()>;

    /// Enqueues a gather: `floats` from `source` of each rank to `destination` of all, by rank.
    ///
    /// # Errors
    /// The library says so at once.
    fn all_gather(&self, source: u64, destination: u64, floats: usize) -> Result<()>;

    /// Whether everything that was enqueued has run.
    ///
    /// # Errors
    /// The device failed.
    fn is_idle(&self) -> Result<bool>;

    /// Begins to end it in peace: [`State::Ready`] then says that [`destroy`](Self::destroy) may come.
    ///
    /// # Errors
    /// The library says so at once.
    fn finalize(&self) -> Result<()>;

    /// Frees a communicator that was ended in peace.
    fn destroy(&self);

    /// Ends whatever runs or waits on it and frees it. May be called from any thread, more than once, and may take a
    /// while. All later calls fail.
    fn abort(&self);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_both_kinds_of_numbers() {
        let cases = [
            (2804, (2, 8, 4)),
            (21003, (2, 10, 3)),
            (21805, (2, 18, 5)),
            (22304, (2, 23, 4)),
            (23003, (2, 30, 3)),
        ];
        for (code, (major, minor, patch)) in cases {
            let version = Version::from_code(code);
            assert_eq!(version, Version { major, minor, patch });
            assert_eq!(version.code(), code);
        }
        assert!(Version::from_code(21003) < OLDEST && OLDEST < MULTI_RANK);
    }

    #[test]
    fn what_is_wrong_is_a_sentence() {
        let path = "/lib/libnccl.so.2".to_owned();
        let old = NcclError::Old { path, version: Version::from_code(21003) };
        assert_eq!(old.to_string(), "/lib/libnccl.so.2 is NCCL 2.10.3, at least 2.18.1 is needed");
        let missing = NcclError::Missing { looked_in: "LD_LIBRARY_PATH, /usr/lib".into() };
        assert_eq!(missing.to_string(), "there is no libnccl.so.2 in LD_LIBRARY_PATH, /usr/lib");
    }
}
