//! States of replicas that have parted, for whoever looks for the cause: `diverged/` in the run directory. Each file is what
//! a checkpoint file is, and `diff` compares two of them; but none is a checkpoint, and no run goes on from one.

use std::path::{Path, PathBuf};

use protocol::message::WorkerId;
use protocol::problem::Problem;

use super::checkpoint::Checkpoint;
use super::files::{create_dir, names_in, remove_if_there, write_atomic};

/// Name of the folder inside the run directory.
pub(crate) const FOLDER: &str = "diverged";

/// Writes the state of one worker; gives the file.
pub(crate) fn write(
    run_dir: &Path,
    checkpoint: &Checkpoint,
    (id, name): (WorkerId, &str),
) -> Result<PathBuf, Problem> {
    let folder = run_dir.join(FOLDER);
    create_dir(&folder)?;
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' };
    let name: String = name.chars().map(plain).take(64).collect();
    let path = folder.join(format!("step-{:08}-{id}-{name}.safetensors", checkpoint.image.progress().step));
    write_atomic(&path, &checkpoint.to_bytes())?;
    Ok(path)
}

/// Deletes what [`write`] has written, and nothing else.
pub(super) fn delete(run_dir: &Path) -> Result<(), Problem> {
    let folder = run_dir.join(FOLDER);
    let is_ours = |name: &&String| name.starts_with("step-") && name.ends_with(".safetensors");
    for name in names_in(&folder)?.iter().filter(is_ours) {
        remove_if_there(&folder.join(name))?;
    }
    let _ = std::fs::remove_dir(&folder);
    Ok(())
}
