//! One checkpoint to use: the newest of a run, or a file. Reads only, and needs no lock.

use std::path::{Path, PathBuf};

use protocol::problem::Problem;

use super::checkpoint::Checkpoint;
use super::checkpoint_dir::{CheckpointDir, FOLDER, Newest};
use super::files::io_problem;
use super::run_dir::require_run;

/// A checkpoint that passed every check.
#[derive(Debug)]
pub struct Loaded {
    /// What is in it.
    pub checkpoint: Checkpoint,
    /// The file.
    pub path: PathBuf,
    /// The run it is of; `None` for a file that lies elsewhere.
    pub run_dir: Option<PathBuf>,
    /// A sentence for each newer one that was passed over.
    pub skipped: Vec<String>,
}

/// Loads the newest verified checkpoint of the run in the directory `path`, or the checkpoint in the file `path`.
///
/// # Errors
/// Neither a run with a usable checkpoint nor a whole and undamaged checkpoint.
pub fn load(path: &Path) -> Result<Loaded, Problem> {
    if path.is_file() {
        return load_file(path);
    }
    let Newest { checkpoint, file, skipped } = newest_of_run(path)?;
    Ok(Loaded { checkpoint, path: path.join(file), run_dir: Some(path.to_owned()), skipped })
}

/// The newest verified checkpoint of a run.
///
/// # Errors
/// It is not a run directory, has no checkpoint yet, or all its checkpoints are damaged.
pub(crate) fn newest_of_run(run_dir: &Path) -> Result<Newest, Problem> {
    require_run(run_dir)?;
    CheckpointDir::new(run_dir).newest_verified()?.ok_or_else(|| {
        Problem::usage(format!("{} has no checkpoint yet", run_dir.display())).hint(
            "the first one is written at the first epoch's end, or earlier with --set checkpoint_seconds=SECONDS",
        )
    })
}

fn load_file(path: &Path) -> Result<Loaded, Problem> {
    let bytes = std::fs::read(path).map_err(|error| io_problem("read", path, &error))?;
    let checkpoint = Checkpoint::from_bytes(&bytes).map_err(|problem| {
        Problem::usage(format!("{} is not a usable checkpoint: {problem}", path.display())).hint(
            problem
                .hint
                .as_deref()
                .unwrap_or("give the directory of a run, or a file of its folder checkpoints"),
        )
    })?;
    Ok(Loaded { checkpoint, path: path.to_owned(), run_dir: run_of(path), skipped: Vec::new() })
}

/// The run whose checkpoint a file is; `latest`, a link, leads there too.
fn run_of(path: &Path) -> Option<PathBuf> {
    let file = path.canonicalize().ok()?;
    let folder = file.parent().filter(|folder| folder.file_name().is_some_and(|name| name == FOLDER))?;
    let run_dir = folder.parent()?;
    require_run(run_dir).is_ok().then(|| run_dir.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::checkpoint_dir::LATEST;
    use crate::store::run_dir::{OpenMode, RunDir};
    use crate::store::testing::{self, KEEP};
    use std::fs;

    fn run() -> (tempfile::TempDir, RunDir) {
        let dir = tempfile::tempdir().unwrap();
        let job = testing::job_file("char-gru", &[]);
        let run = RunDir::open(dir.path(), OpenMode::Resume, &job, "d1").unwrap();
        (dir, run)
    }

    #[test]
    fn a_run_gives_its_newest_checkpoint_and_a_file_its_own() {
        let (dir, run) = run();
        let problem = load(dir.path()).unwrap_err();
        assert_eq!(problem.sentence, format!("{} has no checkpoint yet", dir.path().display()));
        let older = run.checkpoints().write(&testing::checkpoint(5, 5), KEEP).unwrap().file;
        run.checkpoints().write(&testing::checkpoint(10, 10), KEEP).unwrap();

        let newest = load(dir.path()).unwrap();
        assert_eq!(newest.checkpoint, testing::checkpoint(10, 10));
        assert!(newest.path.is_file() && newest.run_dir.as_deref() == Some(dir.path()));

        let here = dir.path().canonicalize().unwrap();
        for (file, step) in [(format!("{FOLDER}/{older}"), 5), (LATEST.to_owned(), 10)] {
            let loaded = load(&dir.path().join(file)).unwrap();
            assert_eq!(loaded.checkpoint, testing::checkpoint(step, step));
            assert_eq!(loaded.run_dir.as_deref(), Some(&*here));
        }

        let elsewhere = tempfile::tempdir().unwrap();
        let copy = elsewhere.path().join("copy.safetensors");
        fs::copy(dir.path().join(LATEST), &copy).unwrap();
        assert_eq!(load(&copy).unwrap().run_dir, None);
    }

    #[test]
    fn what_is_no_checkpoint_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.safetensors");
        let mut bytes = testing::checkpoint(5, 5).to_bytes();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&file, bytes).unwrap();
        let problem = load(&file).unwrap_err();
        assert_eq!(
            problem.sentence,
            format!(
                "{} is not a usable checkpoint: its content does not have the digest that it records",
                file.display()
            )
        );
        assert!(load(dir.path()).unwrap_err().sentence.contains("is not a run directory"));
        assert!(load(&dir.path().join("none")).unwrap_err().sentence.starts_with("there is no directory"));
    }
}
