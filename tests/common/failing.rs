//! A run whose processes do something at failpoints, and what they leave behind when they do.

use std::path::PathBuf;
use std::process::Command;

use super::folder::Folder;
use super::process::{Process, eventually, lockstep};
use super::run::Run;

/// The folder of the events of one run.
pub(crate) struct Events {
    folder: PathBuf,
}

/// A process was at a failpoint.
#[derive(Debug, Clone)]
pub(crate) struct Event {
    /// The process's name.
    pub(crate) who: String,
    pub(crate) pid: u32,
    /// Steps done there.
    pub(crate) step: u64,
    file: PathBuf,
}

impl Events {
    pub(crate) fn new(folder: &Folder, name: &str) -> Self {
        Self { folder: folder.empty(name) }
    }

    /// Starts `lockstep train` with these options; all of its processes obey `plan`.
    pub(crate) fn start(&self, run: &Run, options: &str, plan: &str) -> Process {
        let mut command = lockstep();
        command.arg("train").args(run.words()).args(options.split_whitespace());
        self.start_command(&mut command, plan)
    }

    /// Starts a process that obeys `plan`.
    pub(crate) fn start_command(&self, command: &mut Command, plan: &str) -> Process {
        Process::start(command.env("LOCKSTEP_FAIL", plan).env("LOCKSTEP_FAIL_EVENTS", &self.folder))
    }

    /// Those that have been at this point (`reduce@30:kill`), in no order.
    pub(crate) fn at(&self, entry: &str) -> Vec<Event> {
        let files = std::fs::read_dir(&self.folder).unwrap().flatten();
        let event = |file: std::fs::DirEntry| {
            let who = file.file_name().to_str()?.strip_suffix(entry)?.strip_suffix('.')?.to_owned();
            let text = std::fs::read_to_string(file.path()).ok()?;
            // The file is there a moment before its line.
            let (pid, step) = text.strip_suffix('\n')?.split_once(' ')?;
            Some(Event { who, pid: pid.parse().unwrap(), step: step.parse().unwrap(), file: file.path() })
        };
        files.filter_map(event).collect()
    }

    /// Waits until somebody has been at this point.
    pub(crate) fn wait(&self, entry: &str) -> Event {
        eventually(format!("somebody at {entry}"), || self.at(entry).pop())
    }
}

impl Event {
    /// Lets whoever holds there go on.
    pub(crate) fn release(&self) {
        std::fs::write(self.file.with_added_extension("go"), "").unwrap();
    }
}
