//! Ports, disk and data.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

use coordinator::data::locate::{Places, place_of};
use protocol::job::Task;
use rustix::fs::{Access, access, statvfs};

use super::{Check, bytes};
use crate::args::{DEFAULT_HTTP, DEFAULT_LISTEN};

/// Three checkpoints of the largest preset, and as much again.
const LITTLE_SPACE_BYTES: u64 = 1 << 30;

pub(super) fn checks() -> Vec<Check> {
    let mut checks = vec![loopback()];
    checks.extend([DEFAULT_LISTEN, DEFAULT_HTTP].map(default_port));
    checks.push(run_directories(Path::new("runs")));
    checks.push(temporary_files(&std::env::temp_dir()));
    checks.extend(data(&Places::of_process(None)));
    checks
}

fn loopback() -> Check {
    match TcpListener::bind("127.0.0.1:0") {
        Ok(_) => Check::ok("loopback", "ports of 127.0.0.1 can be bound"),
        Err(error) => Check::problem("loopback", format!("no port of 127.0.0.1 can be bound: {error}"))
            .hint("coordinator and workers talk over TCP, also on one machine"),
    }
}

/// `lockstep train` takes any free ports; these are for `lockstep coordinator`.
fn default_port(address: &str) -> Check {
    let bound = address.parse::<SocketAddr>().map_err(|error| error.to_string());
    match bound.and_then(|address| TcpListener::bind(address).map_err(|error| error.to_string())) {
        Ok(_) => Check::ok("port", format!("{address} is free for `lockstep coordinator`")),
        Err(error) => Check::note("port", format!("{address} cannot be bound: {error}"))
            .hint("`lockstep coordinator` takes other ports with --listen and --http"),
    }
}

/// Where `runs` is or would be made.
fn run_directories(runs: &Path) -> Check {
    let shown = if runs.is_dir() { runs } else { Path::new(".") };
    let elsewhere = "choose a place that can be written with --run-dir";
    if runs.exists() && !runs.is_dir() {
        return Check::problem("runs", format!("{} is a file", runs.display())).hint(elsewhere);
    }
    let place = std::path::absolute(runs).unwrap_or_else(|_| runs.to_owned());
    if let Err(error) = access(shown, Access::WRITE_OK | Access::EXEC_OK) {
        let error = std::io::Error::from(error);
        return Check::problem("runs", format!("{} cannot be written: {error}", place.display()))
            .hint(elsewhere);
    }
    match statvfs(shown) {
        Err(error) => {
            let error = std::io::Error::from(error);
            Check::note("runs", format!("{} can be written; free space unknown: {error}", place.display()))
        }
        Ok(space) => {
            let free = space.f_bavail.saturating_mul(space.f_frsize);
            let text = format!("{} can be written, {} free", place.display(), bytes(free));
            if free < LITTLE_SPACE_BYTES {
                return Check::note("runs", text)
                    .hint("a run keeps three checkpoints; --run-dir puts it elsewhere");
            }
            Check::ok("runs", text)
        }
    }
}

/// `lockstep train` writes there where its coordinator listens.
fn temporary_files(dir: &Path) -> Check {
    match access(dir, Access::WRITE_OK | Access::EXEC_OK) {
        Ok(()) => Check::ok("temporary", format!("{} can be written", dir.display())),
        Err(error) => {
            let error = std::io::Error::from(error);
            Check::problem("temporary", format!("{} cannot be written: {error}", dir.display()))
                .hint("name another folder in TMPDIR")
        }
    }
}

fn data(places: &Places) -> Vec<Check> {
    let mut checks =
        vec![Check::ok("data", "embedded: a text, labelled fields and drawn digits, compiled in")];
    for (name, task) in [("tinyshakespeare", Task::Chars), ("mnist", Task::Rows)] {
        checks.push(match place_of(task, name, places) {
            Ok(path) => Check::ok("data", format!("{name}: {}", path.unwrap_or_else(PathBuf::new).display())),
            Err(problem) => Check { hint: problem.hint, ..Check::note("data", problem.sentence) },
        });
    }
    checks
}

#[cfg(test)]
mod tests {
    use super::super::Finding;
    use super::*;

    #[test]
    fn a_port_in_use_is_noted() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap().to_string();
        let check = default_port(&address);
        assert_eq!(check.finding, Finding::Note);
        assert!(check.text.starts_with(&format!("{address} cannot be bound: ")), "{}", check.text);
        drop(taken);
        assert_eq!(default_port(&address).finding, Finding::Ok);
        assert_eq!(loopback().finding, Finding::Ok);
    }

    #[test]
    fn the_place_of_runs_is_judged() {
        let dir = tempfile::tempdir().unwrap();
        let check = run_directories(dir.path());
        assert!(check.finding != Finding::Problem && check.text.contains(" free"), "{check:?}");
        let file = dir.path().join("runs");
        std::fs::write(&file, "").unwrap();
        assert_eq!(run_directories(&file).finding, Finding::Problem);
        assert_eq!(temporary_files(&dir.path().join("none")).finding, Finding::Problem);
    }

    #[test]
    fn data_that_is_missing_says_where_it_was_looked_for() {
        let dir = tempfile::tempdir().unwrap();
        let places = Places { cache_dir: Some(dir.path().to_owned()), ..Places::default() };
        let text = dir.path().join("input.txt");
        std::fs::write(&text, "some").unwrap();
        let [embedded, shakespeare, mnist] = &data(&places)[..] else { panic!() };
        assert_eq!((embedded.finding, shakespeare.finding), (Finding::Ok, Finding::Ok));
        assert_eq!(shakespeare.text, format!("tinyshakespeare: {}", text.display()));
        assert_eq!(mnist.finding, Finding::Note);
        assert!(mnist.text.contains("was not found, looked at") && mnist.hint.is_some(), "{mnist:?}");
    }
}
