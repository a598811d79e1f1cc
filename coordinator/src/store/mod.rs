//! What a run leaves on disk, and how it is read back after any crash. In reading order:
//!
//! - [`run_dir`]: one directory per run, one process per directory; [`identity`]: what it is of.
//! - [`state`]: the training state as bytes, and its two hashes.
//! - [`checkpoint`]: a state and its metadata as one safetensors file.
//! - [`checkpoint_dir`]: the checkpoints of a run: writing, keeping, the newest one that is undamaged.
//! - [`torch`]: parameters alone, from and for PyTorch.
//! - [`load`]: one checkpoint to use, of a run or from a file.
//! - [`journal`]: what happened, record by record.
//! - [`metrics_log`]: the numbers of each step and epoch, for people and plots.
//! - [`inspect`]: all of the above, read and summed up.
//! - [`diff`]: two runs compared: [`record_diff`] step by step, [`state_diff`] element by element.
//! - [`files`]: atomic replacement and appended lines, used by all of them.

pub mod checkpoint;
pub mod checkpoint_dir;
pub mod diff;
pub mod files;
pub mod identity;
pub mod inspect;
pub mod journal;
pub mod load;
pub mod metrics_log;
pub mod record_diff;
pub mod run_dir;
pub mod state;
pub mod state_diff;
#[cfg(test)]
pub(crate) mod testing;
pub mod torch;
