//! The run directory: whose it is, who holds it, and what may be deleted in it.
//!
//! ```text
//! job.toml       the job, all keys resolved       journal        what happened
//! data.toml      digest of the data               metrics.jsonl  numbers of steps and epochs
//! checkpoints/   states and their manifest        lock           held while a coordinator runs
//! latest, best   links to states                  loss.svg       picture of the losses
//! hangs/         what workers did last            profile.json   what they did in the steps of a profile
//! ```
//! A directory belongs to one `[job]` over one data set. `[run]` may change when it is resumed, `[fleet]` always.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use protocol::job::{JobFile, JobSpec, RunSpec, differences};
use protocol::problem::Problem;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use toml::Table;

use super::checkpoint_dir::{BEST, CheckpointDir, FOLDER, LATEST, MANIFEST, step_of};
use super::diverged;
use super::files::{
    create_dir, io_problem, names_in, read_if_there, remove_if_there, temporary_of, write_atomic,
};
use super::identity::{Identity, START_OVER};
use crate::hang_dump;

const JOB: &str = "job.toml";
const DATA: &str = "data.toml";
const JOURNAL: &str = "journal";
const METRICS: &str = "metrics.jsonl";
const LOSS_PLOT: &str = "loss.svg";
const PROFILE: &str = "profile.json";
const LOCK: &str = "lock";

/// What `--fresh` deletes besides checkpoints, in this order: while `job.toml` is there, a deletion that a crash
/// interrupted is still seen as a run directory of the old job.
const DELETED_BY_FRESH: [&str; 8] = [LATEST, BEST, LOSS_PLOT, PROFILE, METRICS, JOURNAL, DATA, JOB];

const MISSING: &str = "it has no job.toml and lock";

/// What to do with a directory that has a run in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenMode {
    /// Go on with it.
    Resume,
    /// Delete it and start over.
    Fresh,
}

/// A run directory that this process holds: the lock is given back when this is dropped or the process dies.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    job: JobFile,
    changed_settings: Vec<String>,
    _lock: File,
}

/// What identifies the data of a run.
#[derive(Serialize, Deserialize)]
struct DataFile {
    digest: String,
}

impl RunDir {
    /// Creates a run directory or opens one of the same job and data, and holds its lock. Whoever goes on with a run
    /// need not say again which parameters it started from: an empty `init_from` means the one that is there.
    ///
    /// # Errors
    /// Another process holds it; it is of another `[job]` or other data; it is some other directory that is not
    /// empty; it cannot be written.
    pub fn open(path: &Path, mode: OpenMode, job: &JobFile, data_digest: &str) -> Result<Self, Problem> {
        if path.exists() && !path.is_dir() {
            return Err(Problem::usage(format!("{} is a file, not a directory", path.display()))
                .hint("give another --run-dir"));
        }
        let names = names_in(path)?;
        if !names.is_empty() && !is_run(&names) {
            return Err(Problem::usage(format!(
                "{} is not empty and is not a run directory: {MISSING}",
                path.display()
            ))
            .hint("give another --run-dir"));
        }
        create_dir(path)?;
        let lock = take_lock(path)?;
        remove_temporary_files(path)?;
        if mode == OpenMode::Fresh {
            delete_run(path)?;
        }
        let mut job = job.clone();
        let changed_settings = match StoredRun::read(path)? {
            Some(stored) => {
                if job.job.init_from.is_empty() {
                    job.job.init_from.clone_from(&stored.job.init_from);
                }
                let ours = Identity { job: &job.job, data_digest };
                ours.check(&path.display(), stored.identity())?;
                let changes = stored.run.map_or_else(Vec::new, |run| differences(&job.run, &run));
                changes.iter().map(ToString::to_string).collect()
            }
            None => {
                check_new(path)?;
                let data = DataFile { digest: data_digest.to_owned() };
                let text = toml::to_string(&data).expect("a string can be written as TOML");
                // The data first: a directory with a job has its data digest, whenever a crash comes.
                write_atomic(&path.join(DATA), text.as_bytes())?;
                Vec::new()
            }
        };
        write_atomic(&path.join(JOB), job.to_toml().as_bytes())?;
        Ok(Self { path: path.to_owned(), job, changed_settings, _lock: lock })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The job it is opened for.
    pub fn job(&self) -> &JobFile {
        &self.job
    }

    /// The keys of `[run]` that differ from the last time, with both values, to be journaled as an event.
    pub fn changed_settings(&self) -> &[String] {
        &self.changed_settings
    }

    /// Where the checkpoints are.
    pub fn checkpoints(&self) -> CheckpointDir {
        CheckpointDir::new(&self.path)
    }

    /// Where the journal is.
    pub fn journal_path(&self) -> PathBuf {
        journal_path(&self.path)
    }

    /// Where the numbers of steps and epochs are.
    pub fn metrics_path(&self) -> PathBuf {
        metrics_path(&self.path)
    }

    /// Where the picture of the losses is.
    pub fn loss_plot_path(&self) -> PathBuf {
        self.path.join(LOSS_PLOT)
    }

    /// Where the profile is.
    pub fn profile_path(&self) -> PathBuf {
        self.path.join(PROFILE)
    }
}

/// What `job.toml` and `data.toml` say.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredRun {
    /// What is computed.
    pub job: JobSpec,
    /// How long and from which data, as it was given last; `None` if another version wrote it.
    pub run: Option<RunSpec>,
    /// Identifies the data.
    pub data_digest: String,
}

impl StoredRun {
    /// Reads both files; `None` if there is no `job.toml`.
    ///
    /// # Errors
    /// One of them cannot be read or is not what this program writes.
    pub fn read(dir: &Path) -> Result<Option<Self>, Problem> {
        let (job_path, data_path) = (dir.join(JOB), dir.join(DATA));
        let unreadable = |path: &Path, what: &str, reason: &str| {
            Problem::usage(format!("{} is not the {what} of a run: {reason}", path.display()))
                .hint(START_OVER)
        };
        let Some(content) = read_if_there(&job_path)? else {
            return Ok(None);
        };
        let not_a_job = |reason: &str| unreadable(&job_path, "job", reason);
        let text = String::from_utf8(content).map_err(|error| not_a_job(&error.to_string()))?;
        let mut table: Table = text.parse().map_err(|error: toml::de::Error| not_a_job(error.message()))?;
        let job = table.remove("job").ok_or_else(|| not_a_job("it has no [job]"))?;
        let job = job.try_into().map_err(|error: toml::de::Error| not_a_job(error.message()))?;
        let content = read_if_there(&data_path)?.unwrap_or_default();
        let DataFile { digest } = toml::from_slice(&content)
            .map_err(|error| unreadable(&data_path, "data digest", error.message()))?;
        let run = table.remove("run").and_then(|run| run.try_into().ok());
        Ok(Some(Self { job, run, data_digest: digest }))
    }

    /// Reads both files of a directory that must be a run.
    ///
    /// # Errors
    /// As [`read`](Self::read), or there is no `job.toml`.
    pub fn of(dir: &Path) -> Result<Self, Problem> {
        Self::read(dir)?.ok_or_else(|| Problem::usage(format!("{} has no {JOB}", dir.display())))
    }

    /// The `[run]` section.
    ///
    /// # Errors
    /// Another version wrote it.
    pub fn settings(&self, dir: &Path) -> Result<RunSpec, Problem> {
        self.run.clone().ok_or_else(|| {
            Problem::usage(format!("the [run] of {} is not of this version", dir.display()))
                .hint("read it with the version of lockstep that wrote it")
        })
    }

    /// What the directory is of.
    pub fn identity(&self) -> Identity<'_> {
        Identity { job: &self.job, data_digest: &self.data_digest }
    }
}

/// Whether a directory already belongs to a job.
pub fn has_job(path: &Path) -> bool {
    path.join(JOB).exists()
}

/// Checks that there is a run in a directory that is only to be read. No lock is needed for that.
///
/// # Errors
/// There is no such directory, or none that this program has made.
pub fn require_run(path: &Path) -> Result<(), Problem> {
    let hint = "give the directory of a run, such as runs/NAME";
    if path.is_file() {
        return Err(Problem::usage(format!("{} is a file, not a run directory", path.display())).hint(hint));
    }
    if !path.is_dir() {
        return Err(Problem::usage(format!("there is no directory {}", path.display())).hint(hint));
    }
    if !is_run(&names_in(path)?) {
        return Err(
            Problem::usage(format!("{} is not a run directory: {MISSING}", path.display())).hint(hint)
        );
    }
    Ok(())
}

/// Where the journal of a run directory is.
pub(crate) fn journal_path(run_dir: &Path) -> PathBuf {
    run_dir.join(JOURNAL)
}

/// Where the numbers of steps and epochs of a run directory are.
pub(super) fn metrics_path(run_dir: &Path) -> PathBuf {
    run_dir.join(METRICS)
}

/// Whether a directory with these entries is one of ours. A lone `job.toml` or `lock` may be somebody else's: it
/// takes two of our files, or a start that a crash interrupted, which has left nothing but ours.
fn is_run(names: &[String]) -> bool {
    let has = |wanted: &str| names.iter().any(|name| name == wanted);
    let is_ours = |name: &String| {
        let name = temporary_of(name).unwrap_or(name);
        [LOCK, FOLDER, hang_dump::FOLDER, diverged::FOLDER].contains(&name)
            || DELETED_BY_FRESH.contains(&name)
    };
    has(JOB) && (has(LOCK) || has(DATA)) || has(LOCK) && names.iter().all(is_ours)
}

fn take_lock(dir: &Path) -> Result<File, Problem> {
    let path = dir.join(LOCK);
    let failed = |verb| move |error: std::io::Error| io_problem(verb, &dir.join(LOCK), &error);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(failed("open"))?;
    // The kernel gives the lock back when the process dies, however it does; a file with a pid would stay.
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => {
            let mut holder = String::new();
            let _ = file.read_to_string(&mut holder);
            let holder = match holder.trim() {
                "" => "another process".to_owned(),
                pid => format!("process {pid}"),
            };
            return Err(Problem::usage(format!("{} is in use by {holder}", dir.display()))
                .hint("wait until it ends, or give another --run-dir"));
        }
        Err(errno) => return Err(failed("lock")(errno.into())),
    }
    file.set_len(0).map_err(failed("write"))?;
    writeln!(file, "{}", std::process::id()).map_err(failed("write"))?;
    Ok(file)
}

/// Checks that a directory without a job has no results either: nothing would say which job's they are.
fn check_new(dir: &Path) -> Result<(), Problem> {
    let result = if !names_in(&dir.join(FOLDER))?.iter().all(|name| step_of(name).is_none()) {
        FOLDER
    } else if dir.join(JOURNAL).exists() {
        JOURNAL
    } else {
        return Ok(());
    };
    Err(Problem::usage(format!("{} has {result} but no {JOB}", dir.display())).hint(START_OVER))
}

/// Deletes what this program writes, and nothing else.
fn delete_run(dir: &Path) -> Result<(), Problem> {
    let folder = dir.join(FOLDER);
    for name in names_in(&folder)? {
        if is_checkpoint_file(&name) {
            remove_if_there(&folder.join(name))?;
        }
    }
    diverged::delete(dir)?;
    let hangs = dir.join(hang_dump::FOLDER);
    for name in names_in(&hangs)?.iter().filter(|name| hang_dump::is_dump(name)) {
        remove_if_there(&hangs.join(name))?;
    }
    let _ = std::fs::remove_dir(&hangs);
    // Fails where somebody has put something else there; then that stays.
    let _ = std::fs::remove_dir(&folder);
    for name in DELETED_BY_FRESH {
        remove_if_there(&dir.join(name))?;
    }
    Ok(())
}

/// Deletes what a crash in the middle of a replacement has left. Only the holder of the lock may: it is the one
/// that writes.
fn remove_temporary_files(dir: &Path) -> Result<(), Problem> {
    for name in names_in(dir)? {
        if temporary_of(&name).is_some_and(|name| DELETED_BY_FRESH.contains(&name)) {
            remove_if_there(&dir.join(name))?;
        }
    }
    let folder = dir.join(FOLDER);
    for name in names_in(&folder)? {
        if temporary_of(&name).is_some_and(is_checkpoint_file) {
            remove_if_there(&folder.join(name))?;
        }
    }
    Ok(())
}

fn is_checkpoint_file(name: &str) -> bool {
    name == MANIFEST || step_of(name).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::journal::{Journal, Record};
    use crate::store::testing::{self, KEEP};
    use protocol::problem::Exit;
    use std::fs;

    fn open(path: &Path, settings: &[(&str, &str)]) -> Result<RunDir, Problem> {
        RunDir::open(path, OpenMode::Resume, &testing::job_file("char-gru", settings), "d1")
    }

    fn fresh(path: &Path, settings: &[(&str, &str)]) -> Result<RunDir, Problem> {
        RunDir::open(path, OpenMode::Fresh, &testing::job_file("char-gru", settings), "d1")
    }

    /// A run with one file of every kind.
    fn full(path: &Path) {
        let run = open(path, &[]).unwrap();
        run.checkpoints().write(&testing::checkpoint(5, 0), KEEP).unwrap();
        let (mut journal, _) = Journal::open(&run.journal_path()).unwrap();
        journal.append(&Record::Event { text: "x".to_owned() }).unwrap();
        fs::write(run.metrics_path(), "{}\n").unwrap();
        fs::write(run.loss_plot_path(), "<svg/>\n").unwrap();
        fs::write(run.profile_path(), "{}\n").unwrap();
    }

    #[test]
    fn a_new_directory_gets_job_data_and_lock() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("runs/one");
        let run = open(&path, &[]).unwrap();
        assert_eq!(names_in(&path).unwrap(), ["data.toml", "job.toml", "lock"]);
        let text = fs::read_to_string(path.join(JOB)).unwrap();
        assert_eq!(
            JobFile::resolve("char-lstm", Some(&text), &[]).unwrap(),
            testing::job_file("char-gru", &[])
        );
        assert_eq!(fs::read_to_string(path.join(DATA)).unwrap(), "digest = \"d1\"\n");
        assert_eq!(fs::read_to_string(path.join(LOCK)).unwrap(), format!("{}\n", std::process::id()));
        assert_eq!(run.path(), path);
    }

    #[test]
    fn a_directory_has_one_holder() {
        let dir = tempfile::tempdir().unwrap();
        let first = open(dir.path(), &[]).unwrap();
        for mode in [OpenMode::Resume, OpenMode::Fresh] {
            let job = testing::job_file("char-gru", &[]);
            let problem = RunDir::open(dir.path(), mode, &job, "d1").unwrap_err();
            let sentence = format!("{} is in use by process {}", dir.path().display(), std::process::id());
            assert_eq!((problem.sentence, problem.exit), (sentence, Exit::Usage));
            assert!(problem.hint.unwrap().contains("--run-dir"));
        }
        drop(first);
        open(dir.path(), &[]).unwrap();
    }

    #[test]
    fn a_resume_may_change_run_and_fleet_and_says_so() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(open(dir.path(), &[]).unwrap().changed_settings(), [""; 0]);
        let run = open(dir.path(), &[("epochs", "20"), ("workers", "4"), ("data", "b.txt")]).unwrap();
        assert_eq!(
            run.changed_settings(),
            ["data: \"embedded\" there, \"b.txt\" here", "epochs: 24 there, 20 here"]
        );
        drop(run);
        let text = fs::read_to_string(dir.path().join(JOB)).unwrap();
        assert!(text.contains("epochs = 20") && text.contains("workers = 4"), "{text}");
    }

    #[test]
    fn what_a_run_started_from_need_not_be_said_again_and_cannot_be_changed() {
        let dir = tempfile::tempdir().unwrap();
        let [one, other] = ["1a".repeat(32), "2b".repeat(32)];
        assert_eq!(open(dir.path(), &[("init_from", &one)]).unwrap().job().job.init_from, one);
        assert_eq!(open(dir.path(), &[]).unwrap().job().job.init_from, one);
        let problem = open(dir.path(), &[("init_from", &other)]).unwrap_err();
        let difference = format!("init_from: \"{one}\" there, \"{other}\" here");
        assert!(problem.sentence.ends_with(&difference), "{problem}");
        assert_eq!(fresh(dir.path(), &[]).unwrap().job().job.init_from, "");
        let problem = open(dir.path(), &[("init_from", &one)]).unwrap_err();
        assert!(problem.sentence.ends_with(&format!("init_from: unset there, \"{one}\" here")), "{problem}");
    }

    #[test]
    fn another_learning_rate_is_refused_with_the_option_that_changes_it() {
        let dir = tempfile::tempdir().unwrap();
        open(dir.path(), &[]).unwrap();
        let hint = open(dir.path(), &[("learning_rate", "0.0005")]).unwrap_err().hint.unwrap();
        assert!(hint.contains("--change-learning-rate 0.0005") && hint.contains("--fresh"), "{hint}");
    }

    #[test]
    fn another_job_or_other_data_is_refused_and_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        full(dir.path());
        let before = fs::read(dir.path().join(JOB)).unwrap();
        let problem = open(dir.path(), &[("seed", "2"), ("clip", "none")]).unwrap_err();
        let differences = "is of another job: clip: \"global\" there, \"none\" here, seed: 1 there, 2 here";
        assert_eq!(problem.sentence, format!("{} {differences}", dir.path().display()));
        assert_eq!(problem.exit, Exit::Usage);
        assert!(problem.hint.unwrap().starts_with("give another --run-dir"));

        let job = testing::job_file("char-gru", &[]);
        let problem = RunDir::open(dir.path(), OpenMode::Resume, &job, "d9").unwrap_err();
        assert!(problem.sentence.ends_with("digest of the data: d1 there, d9 here"), "{problem}");
        assert!(fs::read(dir.path().join(JOB)).unwrap() == before);
        open(dir.path(), &[]).unwrap().checkpoints().newest_verified().unwrap().unwrap();
    }

    #[test]
    fn a_damaged_directory_is_refused_but_can_be_started_over() {
        let cases: [(&str, Option<&str>, &str); 6] = [
            (JOB, Some("[job]\nseed = 1\n"), "job.toml is not the job of a run: missing field"),
            (JOB, Some("[run]\n"), "job.toml is not the job of a run: it has no [job]"),
            (JOB, Some("\0"), "job.toml is not the job of a run: "),
            (JOB, None, "has checkpoints but no job.toml"),
            (DATA, Some("diges"), "data.toml is not the data digest of a run: "),
            (DATA, None, "data.toml is not the data digest of a run: missing field"),
        ];
        for (name, content, reason) in cases {
            let dir = tempfile::tempdir().unwrap();
            full(dir.path());
            match content {
                Some(content) => fs::write(dir.path().join(name), content).unwrap(),
                None => fs::remove_file(dir.path().join(name)).unwrap(),
            }
            let problem = open(dir.path(), &[]).unwrap_err();
            assert!(problem.sentence.contains(reason), "'{problem}' does not say '{reason}'");
            assert!(problem.hint.unwrap().starts_with("give another --run-dir"));
            fresh(dir.path(), &[]).unwrap();
            open(dir.path(), &[]).unwrap();
        }
    }

    #[test]
    fn fresh_deletes_what_is_ours_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        full(dir.path());
        fs::write(dir.path().join("notes.txt"), "mine").unwrap();
        fs::write(dir.path().join(FOLDER).join("best.safetensors"), "mine").unwrap();
        let run = fresh(dir.path(), &[("seed", "2")]).unwrap();
        assert_eq!(names_in(dir.path()).unwrap(), [FOLDER, "data.toml", "job.toml", "lock", "notes.txt"]);
        assert_eq!(names_in(&dir.path().join(FOLDER)).unwrap(), ["best.safetensors"]);
        assert!(run.checkpoints().newest_verified().unwrap().is_none());
        drop(run);

        fs::remove_file(dir.path().join(FOLDER).join("best.safetensors")).unwrap();
        drop(fresh(dir.path(), &[]).unwrap());
        assert_eq!(names_in(dir.path()).unwrap(), ["data.toml", "job.toml", "lock", "notes.txt"]);
    }

    #[test]
    fn a_foreign_directory_is_refused_and_untouched() {
        for names in
            [&["journal"][..], &["job.toml"], &["lock", "profile.ini"], &["checkpoints", "data.toml"]]
        {
            let dir = tempfile::tempdir().unwrap();
            for name in names {
                fs::write(dir.path().join(name), "mine").unwrap();
            }
            for attempt in [open, fresh] {
                let problem = attempt(dir.path(), &[]).unwrap_err();
                assert!(problem.sentence.contains("is not empty and is not a run directory"), "{problem}");
                assert_eq!(problem.exit, Exit::Usage);
            }
            assert_eq!(names_in(dir.path()).unwrap(), names);
            assert!(names.iter().all(|name| fs::read(dir.path().join(name)).unwrap() == b"mine"));
        }
    }

    #[test]
    fn what_a_crash_left_is_cleared_away() {
        let dir = tempfile::tempdir().unwrap();
        full(dir.path());
        for name in [".job.toml.tmp", ".latest.tmp", ".mine.tmp"] {
            fs::write(dir.path().join(name), "half").unwrap();
        }
        for name in [".manifest.json.tmp", ".step-00000010.safetensors.tmp"] {
            fs::write(dir.path().join(FOLDER).join(name), "half").unwrap();
        }
        open(dir.path(), &[]).unwrap();
        let temporary = |dir: &Path| -> Vec<String> {
            names_in(dir).unwrap().into_iter().filter(|name| name.ends_with(".tmp")).collect()
        };
        assert_eq!(temporary(dir.path()), [".mine.tmp"]);
        assert_eq!(temporary(&dir.path().join(FOLDER)), [""; 0]);
    }

    #[test]
    fn a_start_that_a_crash_interrupted_starts_again() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(LOCK), "1\n").unwrap();
        fs::write(dir.path().join(DATA), "digest = \"other\"\n").unwrap();
        open(dir.path(), &[]).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join(DATA)).unwrap(), "digest = \"d1\"\n");
    }

    #[test]
    fn a_place_that_cannot_be_used_is_named_with_the_systems_reason() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let problem = open(&file, &[]).unwrap_err();
        assert_eq!(problem.sentence, format!("{} is a file, not a directory", file.display()));
        let problem = open(&file.join("run"), &[]).unwrap_err();
        let start = format!("cannot read {}/run: Not a directory", file.display());
        assert!(problem.sentence.starts_with(&start), "{problem}");
        assert_eq!(names_in(dir.path()).unwrap(), ["file"]);
    }

    #[test]
    fn only_a_run_is_opened_for_reading() {
        let dir = tempfile::tempdir().unwrap();
        let missing = require_run(&dir.path().join("none")).unwrap_err();
        assert!(missing.sentence.starts_with("there is no directory "), "{missing}");
        let empty = require_run(dir.path()).unwrap_err();
        assert!(empty.sentence.ends_with("is not a run directory: it has no job.toml and lock"), "{empty}");
        assert!(empty.hint.is_some());
        let _held = open(dir.path(), &[]).unwrap();
        require_run(dir.path()).unwrap();
    }
}
