//! A coordinator and workers started one by one, as on a cluster.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::process::{Process, eventually, lockstep};
use super::run::Run;

/// A coordinator that listens.
pub(crate) struct Coordinator {
    pub(crate) process: Process,
    /// `HOST:PORT` for workers.
    pub(crate) control: String,
    /// `HOST:PORT` of status and metrics.
    pub(crate) http: String,
    token: Option<String>,
}

impl Coordinator {
    /// Starts the coordinator of a run and waits until it listens.
    pub(crate) fn start(run: &Run, options: &str, token: Option<&str>) -> Self {
        Self::start_as(lockstep(), run, options, token)
    }

    /// The same with everything logged that can be.
    pub(crate) fn start_logging(run: &Run, options: &str) -> Self {
        let mut command = lockstep();
        command.env("LOCKSTEP_LOG", "trace");
        Self::start_as(command, run, options, None)
    }

    /// Starts it again where it was.
    pub(crate) fn start_again(self, run: &Run, options: &str) -> Self {
        let Self { process, control, http, token } = self;
        drop(process);
        Self::start_at((&control, &http), lockstep(), run, options, token.as_deref())
    }

    fn start_as(command: Command, run: &Run, options: &str, token: Option<&str>) -> Self {
        Self::start_at(("127.0.0.1:0", "127.0.0.1:0"), command, run, options, token)
    }

    fn start_at(
        (control, http): (&str, &str),
        mut command: Command,
        run: &Run,
        options: &str,
        token: Option<&str>,
    ) -> Self {
        let ready = ready_file(run);
        command.arg("coordinator").args(run.words()).args(options.split_whitespace());
        command.args(["--listen", control, "--http", http, "--ready-file"]).arg(&ready);
        let mut process = Process::start(with_token(&mut command, token));
        // Both ports are bound when the box is shown and the file is written.
        process.line_with("run directory");
        let text = eventually("the ready file", || std::fs::read_to_string(&ready).ok());
        let address = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)).unwrap().to_owned();
        Self {
            process,
            control: address("control="),
            http: address("http="),
            token: token.map(str::to_owned),
        }
    }

    /// Starts a worker for it, in this working directory.
    pub(crate) fn worker(&self, working_dir: &Path, options: &str) -> Process {
        self.worker_at(&self.control, working_dir, options)
    }

    /// What starts such a worker, for whoever has more to say to it.
    pub(crate) fn worker_command(&self, working_dir: &Path, options: &str) -> Command {
        worker_command(&self.control, working_dir, options, self.token.as_deref())
    }

    /// A worker that knows it by another address.
    pub(crate) fn worker_at(&self, control: &str, working_dir: &Path, options: &str) -> Process {
        start_worker(control, working_dir, options, self.token.as_deref())
    }

    /// The same with another token.
    pub(crate) fn worker_with_token(
        &self,
        working_dir: &Path,
        options: &str,
        token: Option<&str>,
    ) -> Process {
        start_worker(&self.control, working_dir, options, token)
    }
}

fn start_worker(control: &str, working_dir: &Path, options: &str, token: Option<&str>) -> Process {
    Process::start(&mut worker_command(control, working_dir, options, token))
}

fn worker_command(control: &str, working_dir: &Path, options: &str, token: Option<&str>) -> Command {
    let mut command = lockstep();
    command.current_dir(working_dir).args(["worker", "--coordinator", control]);
    with_token(&mut command, token).args(options.split_whitespace());
    command
}

fn with_token<'a>(command: &'a mut Command, token: Option<&str>) -> &'a mut Command {
    match token {
        Some(token) => command.env("LOCKSTEP_TOKEN", token),
        None => command,
    }
}

fn ready_file(run: &Run) -> PathBuf {
    run.dir().with_extension("ready")
}
