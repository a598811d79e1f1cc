//! One run directory and the job that is trained in it.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::process::{Ended, Process, lockstep};

/// A run directory, and the words of the command line that say what is trained in it.
pub(crate) struct Run {
    dir: PathBuf,
    job: String,
}

/// What two runs are compared by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hashes {
    pub(crate) step: u64,
    pub(crate) parameter: String,
    pub(crate) state: String,
}

impl Run {
    pub(crate) fn new(dir: PathBuf, job: &str) -> Self {
        Self { dir, job: job.to_owned() }
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The job and the run directory as words of a command line.
    pub(crate) fn words(&self) -> Vec<String> {
        let mut words: Vec<String> = self.job.split_whitespace().map(str::to_owned).collect();
        words.extend(["--run-dir".to_owned(), self.dir.to_str().unwrap().to_owned()]);
        words
    }

    /// Starts `lockstep train` with these further options.
    pub(crate) fn start(&self, options: &str) -> Process {
        Process::start(lockstep().arg("train").args(self.words()).args(options.split_whitespace()))
    }

    /// Trains to the end, whatever the exit code.
    pub(crate) fn end(&self, options: &str) -> Ended {
        self.start(options).end()
    }

    /// Trains to the end and gives the final hashes.
    pub(crate) fn train(&self, options: &str) -> Hashes {
        self.end(options).expect_exit(0);
        self.hashes()
    }

    /// What `inspect --json` says about it.
    pub(crate) fn inspect(&self) -> Value {
        let ended = Process::start(lockstep().arg("inspect").arg("--json").arg(&self.dir)).end();
        ended.expect_exit(0);
        serde_json::from_str(&ended.stdout).unwrap()
    }

    /// The hashes in it.
    pub(crate) fn hashes(&self) -> Hashes {
        let inspection = self.inspect();
        let text = |key: &str| inspection[key].as_str().unwrap().to_owned();
        let (parameter, state) = (text("parameter_sha256"), text("state_sha256"));
        assert_eq!((parameter.len(), state.len()), (64, 64), "{inspection}");
        Hashes { step: inspection["step"].as_u64().unwrap(), parameter, state }
    }

    /// The newest checkpoint, every byte of it.
    pub(crate) fn checkpoint(&self) -> Vec<u8> {
        std::fs::read(self.dir.join("latest")).unwrap()
    }

    /// Steps in `metrics.jsonl` so far; also while it is being written.
    pub(crate) fn steps_so_far(&self) -> u64 {
        let text = std::fs::read_to_string(self.dir.join("metrics.jsonl")).unwrap_or_default();
        text.lines().filter(|line| line.starts_with(r#"{"kind":"step""#)).count() as u64
    }

    /// The `step` of each line of this kind in `metrics.jsonl`, in the order of the lines.
    pub(crate) fn metric_steps(&self, kind: &str) -> Vec<u64> {
        let text = std::fs::read_to_string(self.dir.join("metrics.jsonl")).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.filter(|line| line["kind"] == kind).map(|line| line["step"].as_u64().unwrap()).collect()
    }

    /// The lines of `metrics.jsonl` by kind and step, without what depends on the fleet and on time.
    pub(crate) fn metric_lines(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.dir.join("metrics.jsonl")).unwrap();
        let mut lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        for line in &mut lines {
            for key in ["samples_per_second", "seconds", "communication_share", "workers"] {
                line.as_object_mut().unwrap().remove(key);
            }
        }
        lines.sort_by_key(|line| (line["kind"].to_string(), line["step"].as_u64()));
        lines
    }

    /// `inspect --audit`.
    pub(crate) fn audit(&self) -> Ended {
        Process::start(lockstep().args(["inspect", "--audit"]).arg(&self.dir)).end()
    }
}
