//! What a run leaves on disk, and how it is read back after any crash. In reading order:
//!
//! - [`run_dir`]: one directory per run, one process per directory.
//! - [`state`]: the training state as bytes, and its two hashes.
//! - [`checkpoint`]: a state and its metadata as one safetensors file.
//! - [`checkpoint_dir`]: the checkpoints of a run: writing, keeping, the newest one that is undamaged.
//! - [`torch`]: parameters alone, from and for PyTorch.
//! - [`load`]: one checkpoint to use, of a run or from a file.
//! - [`journal`]: what happened, record by record.
//! - [`metrics_log`]: the numbers of each step and epoch, for people and plots.
//! - [`inspect`]: all of the above, read and summed up.
//! - [`files`]: atomic replacement and appended lines, used by all of them.

pub mod checkpoint;
pub mod checkpoint_dir;
pub mod files;
pub mod inspect;
pub mod journal;
pub mod load;
pub mod metrics_log;
pub mod run_dir;
pub mod state;
#[cfg(test)]
mod testing;
pub mod torch;
