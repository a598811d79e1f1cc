//! Commands with file systems of their own: a disk that is small, or cannot be written.

use std::path::Path;
use std::process::{Command, Stdio};

use super::process::{Process, lockstep};

/// Runs a shell script that may mount what it likes: its mounts are seen by nobody else and end with it. `$LOCKSTEP`
/// is the program, `$DIR` an empty folder. `None` where this machine does not allow it.
pub(crate) fn with_own_mounts(script: &str, dir: &Path) -> Option<Process> {
    let mut unshare = Command::new("unshare");
    unshare.args(["--user", "--map-root-user", "--mount"]);
    let mut probe = Command::new("unshare");
    probe.args(["--user", "--map-root-user", "--mount", "true"]).stderr(Stdio::null());
    if !probe.status().is_ok_and(|status| status.success()) {
        return None;
    }
    unshare.args(["sh", "-c", script]).env("LOCKSTEP", lockstep().get_program()).env("DIR", dir);
    for variable in ["LOCKSTEP_TOKEN", "LOCKSTEP_TLS", "LOCKSTEP_COORDINATOR", "LOCKSTEP_LOG"] {
        unshare.env_remove(variable);
    }
    Some(Process::start(&mut unshare))
}
