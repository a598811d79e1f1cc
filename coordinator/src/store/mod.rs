//! What a run leaves on disk, and how it is read back after any crash. In reading order:
//!
//! - [`run_dir`]: one directory per run, one process per directory; [`identity`]: what it is of.
//! - [`state`]: the training state as bytes, and its two hashes.
//! - [`checkpoint`]: a state and its metadata as one safetensors file.
//! - [`checkpoint_dir`]: the checkpoints of a run: writing, keeping, the newest one that is undamaged.
//! - `diverged`: states of replicas that have parted, which are no checkpoints.
//! - [`torch`]: parameters alone, for PyTorch; [`weights`]: parameters alone, from anywhere; [`tensorflow`]: what
//!   TensorFlow calls them, in NumPy's files (`npz`); [`gate_order`]: in which order others have the gates.
//! - [`load`]: one checkpoint to use, of a run or from a file.
//! - [`journal`]: what happened, record by record.
//! - [`metrics_log`]: the numbers of each step and epoch, for people and plots.
//! - [`inspect`]: all of the above, read and summed up.
//! - [`diff`]: two runs compared: [`record_diff`] step by step, [`state_diff`] element by element.
//! - [`files`]: atomic replacement and appended lines, used by all of them.

pub mod checkpoint;
pub mod checkpoint_dir;
pub mod diff;
pub(crate) mod diverged;
pub mod files;
pub mod gate_order;
pub mod identity;
pub mod inspect;
pub mod journal;
pub mod load;
pub mod metrics_log;
mod npz;
pub mod record_diff;
pub mod run_dir;
pub mod state;
pub mod state_diff;
pub mod tensorflow;
#[cfg(test)]
pub(crate) mod testing;
pub mod torch;
pub mod weights;
