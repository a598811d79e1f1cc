//! The checkpoints of a run: `checkpoints/step-00000200.safetensors`, their manifest, and the links `latest` and `best`.
//!
//! A new file is complete and on the disk before the manifest names it, and the manifest before an older file is
//! deleted. The manifest holds the digest of each whole file; one that a crash kept out of the manifest, or whose
//! manifest is lost, is still verified by the digest inside it. That is also how a state is replaced by another one of
//! the same step: the manifest forgets the old file first.

use std::fs;
use std::path::{Path, PathBuf};

use failpoints::{Injected, Point, reach};
use protocol::problem::{Exit, Problem};
use serde::{Deserialize, Serialize};

use super::checkpoint::Checkpoint;
use super::files::{
    create_dir, io_problem, link_atomic, names_in, read_if_there, remove_if_there, write_atomic,
    write_of_step,
};
use crate::hex::sha256_hex;

/// Name of the folder inside the run directory.
pub(super) const FOLDER: &str = "checkpoints";
/// Name of the link inside the run directory.
pub(super) const LATEST: &str = "latest";
/// Name of the link to the state of the epoch with the lowest validation loss, while there is a checkpoint of it.
pub(super) const BEST: &str = "best";
/// Name of the manifest inside the folder.
pub(super) const MANIFEST: &str = "manifest.json";

/// One checkpoint in the manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Name of the file, without its folder.
    pub file: String,
    /// Steps done in its state.
    pub step: u64,
    /// SHA-256 of the file, 64 lower-case hexadecimal digits.
    pub file_digest: String,
    /// Length of the file.
    pub bytes: u64,
}

/// The newest checkpoint that passed every check.
#[derive(Debug)]
pub struct Newest {
    /// What is in it.
    pub checkpoint: Checkpoint,
    /// Its path relative to the run directory.
    pub file: String,
    /// A sentence for each newer one that was passed over, and for a damaged manifest.
    pub skipped: Vec<String>,
}

/// The checkpoints of one run directory. Writing needs the directory's lock, reading does not.
#[derive(Debug, Clone)]
pub struct CheckpointDir {
    run_dir: PathBuf,
    /// Steps of the checkpoints that were passed over when the newest was looked for. They do not count among those
    /// that are kept, or they would drive out the sound ones before them.
    damaged: Vec<u64>,
}

impl CheckpointDir {
    /// The checkpoints of the run in this directory. Nothing is touched yet.
    pub fn new(run_dir: &Path) -> Self {
        Self { run_dir: run_dir.to_owned(), damaged: Vec::new() }
    }

    /// Writes a checkpoint, points `latest` to it and `best` to the best one, and deletes older ones but the newest
    /// `keep`, this one included, and the best.
    ///
    /// Checkpoints of later steps go too: after a resume from an earlier one they can only be those that were found
    /// damaged.
    ///
    /// # Errors
    /// Any failed file operation. The checkpoints before it are then still there, and the new one is whole or not there.
    pub fn write(&mut self, checkpoint: &Checkpoint, keep: usize) -> Result<Entry, Problem> {
        let content = checkpoint.to_bytes();
        let step = checkpoint.image.progress().step;
        let entry = Entry {
            file: file_name(step),
            step,
            file_digest: sha256_hex([&content[..]]),
            bytes: content.len() as u64,
        };
        create_dir(&self.folder())?;
        let mut entries = self.manifest().unwrap_or_default();
        if entries.iter().any(|old| old.step == step && *old != entry) {
            entries.retain(|old| old.step != step);
            self.write_manifest(&entries)?;
        }
        if let Some(Injected::Error) = reach(Point::CheckpointWrite, step) {
            return Err(Problem::failed("a failpoint"));
        }
        write_of_step(&self.folder().join(&entry.file), &content, step)?;

        let is_sound = |other: &u64| *other == step || *other < step && !self.damaged.contains(other);
        let mut kept: Vec<u64> = self.steps_on_disk()?.into_iter().filter(is_sound).collect();
        kept.sort_unstable_by(|a, b| b.cmp(a));
        let best = checkpoint.image.best_step().filter(|best| kept.contains(best));
        kept.truncate(keep.max(1));
        kept.extend(best);
        entries.retain(|old| old.step != step && kept.contains(&old.step));
        entries.push(entry.clone());
        self.write_manifest(&entries)?;
        link_atomic(&self.run_dir.join(LATEST), &format!("{FOLDER}/{}", entry.file))?;
        match best {
            Some(best) => link_atomic(&self.run_dir.join(BEST), &format!("{FOLDER}/{}", file_name(best)))?,
            None => remove_if_there(&self.run_dir.join(BEST))?,
        }

        for other in self.steps_on_disk()? {
            if !kept.contains(&other) {
                remove_if_there(&self.folder().join(file_name(other)))?;
            }
        }
        // They are gone; whatever has their steps from now on is sound.
        self.damaged.clear();
        Ok(entry)
    }

    /// Whether there is no checkpoint at all.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn is_empty(&self) -> Result<bool, Problem> {
        Ok(self.steps_on_disk()?.is_empty())
    }

    /// Reads the newest checkpoint that passes every check; `None` if the run has none at all.
    ///
    /// # Errors
    /// There are checkpoints and none of them is usable; the sentence names each with the reason.
    pub fn newest_verified(&mut self) -> Result<Option<Newest>, Problem> {
        let mut skipped = Vec::new();
        self.damaged.clear();
        let manifest = self.manifest().unwrap_or_else(|reason| {
            skipped.push(reason);
            Vec::new()
        });
        let steps = self.steps()?;
        for &step in &steps {
            match self.read(step, manifest.iter().find(|entry| entry.step == step)) {
                Ok(checkpoint) => {
                    let file = format!("{FOLDER}/{}", file_name(step));
                    return Ok(Some(Newest { checkpoint, file, skipped }));
                }
                // Not damaged: it is another version's, and going on would delete it.
                Err(problem) if problem.exit == Exit::Usage => {
                    let sentence = format!("{FOLDER}/{}: {problem}", file_name(step));
                    return Err(Problem { sentence, ..problem });
                }
                Err(problem) => {
                    skipped.push(format!("{FOLDER}/{}: {problem}", file_name(step)));
                    self.damaged.push(step);
                }
            }
        }
        if steps.is_empty() && skipped.is_empty() {
            return Ok(None);
        }
        Err(Problem::for_good(format!(
            "no checkpoint in {} is usable: {}",
            self.folder().display(),
            skipped.join("; ")
        ))
        .hint("restore one of these files from a copy, or give --fresh to start over"))
    }

    /// Steps of which there is a file or a line of the manifest, newest first.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn steps(&self) -> Result<Vec<u64>, Problem> {
        let mut steps = self.steps_on_disk()?;
        steps.extend(self.manifest().unwrap_or_default().iter().map(|entry| entry.step));
        steps.sort_unstable_by(|a, b| b.cmp(a));
        steps.dedup();
        Ok(steps)
    }

    /// Reads the checkpoint of this step, if it passes every check.
    ///
    /// # Errors
    /// It does not, or there is none.
    pub fn verified(&self, step: u64) -> Result<Checkpoint, Problem> {
        let manifest = self.manifest().unwrap_or_default();
        self.read(step, manifest.iter().find(|entry| entry.step == step))
    }

    /// Reads the checkpoint of a step and checks it against its line of the manifest, if it has one.
    fn read(&self, step: u64, listed: Option<&Entry>) -> Result<Checkpoint, Problem> {
        let path = self.folder().join(file_name(step));
        let content = fs::read(&path).map_err(|error| io_problem("read", &path, &error))?;
        if let Some(entry) = listed {
            let digest = sha256_hex([&content[..]]);
            if content.len() as u64 != entry.bytes {
                return Err(Problem::failed(format!(
                    "it has {} bytes, the manifest says {}",
                    content.len(),
                    entry.bytes
                )));
            }
            if digest != entry.file_digest {
                return Err(Problem::failed(format!(
                    "its digest is {}, the manifest says {}",
                    short(&digest),
                    short(&entry.file_digest)
                )));
            }
        }
        let checkpoint = Checkpoint::from_bytes(&content)?;
        let inside = checkpoint.image.progress().step;
        if inside != step {
            return Err(Problem::failed(format!("it holds the state after step {inside}")));
        }
        Ok(checkpoint)
    }

    /// The lines of the manifest, none if there is no manifest; a sentence if it cannot be read.
    fn manifest(&self) -> Result<Vec<Entry>, String> {
        let content = read_if_there(&self.folder().join(MANIFEST))
            .map_err(|problem| problem.sentence)?
            .unwrap_or_default();
        if content.is_empty() {
            return Ok(Vec::new());
        }
        serde_json::from_slice(&content).map_err(|error| format!("{FOLDER}/{MANIFEST} is damaged: {error}"))
    }

    fn write_manifest(&self, entries: &[Entry]) -> Result<(), Problem> {
        let json = serde_json::to_string_pretty(entries).expect("plain values can be written as JSON");
        write_atomic(&self.folder().join(MANIFEST), format!("{json}\n").as_bytes())
    }

    fn steps_on_disk(&self) -> Result<Vec<u64>, Problem> {
        Ok(names_in(&self.folder())?.iter().filter_map(|name| step_of(name)).collect())
    }

    fn folder(&self) -> PathBuf {
        self.run_dir.join(FOLDER)
    }
}

fn file_name(step: u64) -> String {
    format!("step-{step:08}.safetensors")
}

/// The step of a checkpoint's file name, `None` for any other name.
pub(super) fn step_of(name: &str) -> Option<u64> {
    let step = name.strip_prefix("step-")?.strip_suffix(".safetensors")?.parse().ok()?;
    (file_name(step) == name).then_some(step)
}

/// The start of a digest, enough to tell two apart; whatever text a damaged manifest has in its place.
fn short(digest: &str) -> String {
    digest.chars().take(12).collect::<String>() + "…"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::testing::{self, KEEP};
    use proptest::prelude::*;
    use protocol::control::ControlState;

    /// A run directory with checkpoints of these steps.
    fn with_steps(steps: &[u64]) -> (tempfile::TempDir, CheckpointDir) {
        let dir = tempfile::tempdir().unwrap();
        let mut checkpoints = CheckpointDir::new(dir.path());
        for &step in steps {
            checkpoints.write(&testing::checkpoint(step, step), KEEP).unwrap();
        }
        (dir, checkpoints)
    }

    fn damage(dir: &Path, name: &str, change: impl Fn(&mut Vec<u8>)) {
        let path = dir.join(FOLDER).join(name);
        let mut bytes = fs::read(&path).unwrap();
        change(&mut bytes);
        fs::write(&path, bytes).unwrap();
    }

    fn newest_step(checkpoints: &mut CheckpointDir) -> (u64, Vec<String>) {
        let newest = checkpoints.newest_verified().unwrap().unwrap();
        let step = newest.checkpoint.image.progress().step;
        assert_eq!(newest.checkpoint, testing::checkpoint(step, step));
        assert_eq!(newest.file, format!("checkpoints/{}", file_name(step)));
        (step, newest.skipped)
    }

    #[test]
    fn damaged_ones_do_not_drive_out_the_sound_one_before_them() {
        let (dir, mut checkpoints) = with_steps(&[5, 10, 15]);
        for step in [10, 15] {
            damage(dir.path(), &file_name(step), |bytes| bytes.truncate(9));
        }
        assert_eq!(newest_step(&mut checkpoints).0, 5);
        for step in [8, 10] {
            checkpoints.write(&testing::checkpoint(step, step), KEEP).unwrap();
        }
        assert_eq!(checkpoints.steps().unwrap(), [10, 8, 5]);
        checkpoints.write(&testing::checkpoint(12, 12), KEEP).unwrap();
        assert_eq!(checkpoints.steps().unwrap(), [12, 10, 8], "the new state after step 10 is sound");
    }

    #[test]
    fn the_best_one_stays_besides_the_newest_and_has_a_link() {
        let (dir, mut checkpoints) = with_steps(&[]);
        // Epochs have five steps; after the last of so many evaluated ones, the best was so many epochs ago.
        let mut write = |step, evaluated_epochs, epochs_without_improvement| {
            let mut checkpoint = testing::checkpoint(step, step);
            let best_validation_loss = 1.0;
            let control = checkpoint.image.control();
            checkpoint.image.set_control(&ControlState {
                best_validation_loss,
                evaluated_epochs,
                epochs_without_improvement,
                ..control
            });
            checkpoints.write(&checkpoint, 2).unwrap();
            let mut steps = checkpoints.steps().unwrap();
            steps.reverse();
            (steps, fs::read_link(dir.path().join(BEST)).ok())
        };
        let link = |step| Some(Path::new(FOLDER).join(file_name(step)));
        assert_eq!(write(5, 1, 0), (vec![5], link(5)));
        assert_eq!(write(10, 2, 0), (vec![5, 10], link(10)));
        for (step, behind) in [(15, 1), (20, 2), (25, 3)] {
            assert_eq!(
                write(step, step / 5, behind),
                (vec![10, step - 5, step][usize::from(step == 15)..].to_vec(), link(10))
            );
        }
        assert_eq!(write(30, 6, 0), (vec![25, 30], link(30)));
        // Whoever goes on from before the best one has none until there is another.
        assert_eq!(write(27, 5, 3), (vec![25, 27], None));
    }

    #[test]
    fn the_newest_three_stay_and_latest_points_to_the_newest() {
        let (dir, mut checkpoints) = with_steps(&[5, 10, 200, 300]);
        assert_eq!(newest_step(&mut checkpoints), (300, vec![]));
        let names = names_in(&dir.path().join(FOLDER)).unwrap();
        assert_eq!(
            names,
            [
                "manifest.json",
                "step-00000010.safetensors",
                "step-00000200.safetensors",
                "step-00000300.safetensors"
            ]
        );
        let link = fs::read_link(dir.path().join(LATEST)).unwrap();
        assert_eq!(link, Path::new("checkpoints/step-00000300.safetensors"));
        assert!(dir.path().join(LATEST).is_file(), "the link must lead to the file");
        assert_eq!(names_in(dir.path()).unwrap(), [FOLDER, LATEST]);

        let manifest: serde_json::Value =
            serde_json::from_slice(&fs::read(dir.path().join(FOLDER).join(MANIFEST)).unwrap()).unwrap();
        let content = fs::read(dir.path().join(LATEST)).unwrap();
        assert_eq!(manifest.as_array().unwrap().len(), 3);
        assert_eq!(
            manifest[2],
            serde_json::json!({
                "file": "step-00000300.safetensors",
                "step": 300,
                "file_digest": sha256_hex([&content[..]]),
                "bytes": content.len(),
            })
        );
    }

    #[test]
    fn a_run_without_checkpoints_is_no_problem() {
        let (_dir, mut checkpoints) = with_steps(&[]);
        assert!(checkpoints.newest_verified().unwrap().is_none());
    }

    #[test]
    fn a_damaged_newest_checkpoint_is_named_and_the_previous_one_used() {
        type Change = fn(&mut Vec<u8>);
        let cases: [(Change, &str); 4] = [
            (|bytes| *bytes.last_mut().unwrap() ^= 1, "its digest is "),
            (|bytes| bytes.truncate(100), "it has 100 bytes, the manifest says "),
            (|bytes| bytes.clear(), "it has 0 bytes, the manifest says "),
            (|bytes| bytes[0] ^= 1, "its digest is "),
        ];
        for (change, reason) in cases {
            let (dir, mut checkpoints) = with_steps(&[10, 20, 30]);
            damage(dir.path(), &file_name(30), change);
            let (step, skipped) = newest_step(&mut checkpoints);
            assert_eq!(step, 20);
            let start = format!("checkpoints/step-00000030.safetensors: {reason}");
            assert!(skipped.len() == 1 && skipped[0].starts_with(&start), "{skipped:?}");
        }
    }

    #[test]
    fn a_missing_file_is_named_and_the_previous_one_used() {
        let (dir, mut checkpoints) = with_steps(&[10, 20]);
        fs::remove_file(dir.path().join(LATEST)).unwrap();
        fs::remove_file(dir.path().join(FOLDER).join(file_name(20))).unwrap();
        let (step, skipped) = newest_step(&mut checkpoints);
        assert_eq!(step, 10);
        assert!(skipped[0].contains("cannot read") && skipped[0].contains("No such file"), "{skipped:?}");
    }

    #[test]
    fn when_all_are_damaged_each_is_named() {
        let (dir, mut checkpoints) = with_steps(&[10, 20]);
        for step in [10, 20] {
            damage(dir.path(), &file_name(step), |bytes| bytes[50] ^= 1);
        }
        let problem = checkpoints.newest_verified().unwrap_err();
        assert!(problem.sentence.contains("step-00000010.safetensors: its digest"), "{problem}");
        assert!(problem.sentence.contains("step-00000020.safetensors: its digest"), "{problem}");
        assert!(problem.hint.unwrap().contains("--fresh"));
    }

    #[test]
    fn without_a_usable_manifest_files_verify_themselves() {
        for manifest in ["", "[{]", "{\"file\": 3}", "\0\0\0"] {
            let (dir, mut checkpoints) = with_steps(&[10, 20]);
            fs::write(dir.path().join(FOLDER).join(MANIFEST), manifest).unwrap();
            damage(dir.path(), &file_name(20), |bytes| *bytes.last_mut().unwrap() ^= 1);
            let (step, skipped) = newest_step(&mut checkpoints);
            assert_eq!(step, 10);
            assert!(
                skipped.last().unwrap().contains("does not have the digest that it records"),
                "{skipped:?}"
            );
            assert_eq!(skipped.len(), if manifest.is_empty() { 1 } else { 2 });

            // The next checkpoint writes a whole manifest again.
            checkpoints.write(&testing::checkpoint(20, 20), KEEP).unwrap();
            assert_eq!(newest_step(&mut checkpoints), (20, vec![]));
        }
    }

    #[test]
    fn a_file_that_a_crash_kept_out_of_the_manifest_is_used() {
        let (dir, mut checkpoints) = with_steps(&[10]);
        let path = dir.path().join(FOLDER).join(file_name(20));
        fs::write(&path, testing::checkpoint(20, 20).to_bytes()).unwrap();
        assert_eq!(newest_step(&mut checkpoints), (20, vec![]));
    }

    #[test]
    fn a_file_under_another_steps_name_is_not_used() {
        let (dir, mut checkpoints) = with_steps(&[10, 20]);
        let folder = dir.path().join(FOLDER);
        fs::copy(folder.join(file_name(10)), folder.join(file_name(30))).unwrap();
        let (step, skipped) = newest_step(&mut checkpoints);
        assert_eq!(step, 20);
        assert!(skipped[0].ends_with("it holds the state after step 10"), "{skipped:?}");
    }

    #[test]
    fn a_checkpoint_after_a_rewind_replaces_the_damaged_later_ones() {
        let (dir, mut checkpoints) = with_steps(&[10, 20, 30]);
        damage(dir.path(), &file_name(30), |bytes| bytes.truncate(9));
        damage(dir.path(), &file_name(20), |bytes| bytes.truncate(9));
        checkpoints.write(&testing::checkpoint(15, 15), KEEP).unwrap();
        assert_eq!(newest_step(&mut checkpoints), (15, vec![]));
        let names = names_in(&dir.path().join(FOLDER)).unwrap();
        assert_eq!(names, ["manifest.json", "step-00000010.safetensors", "step-00000015.safetensors"]);
    }

    #[test]
    fn a_crash_while_a_state_is_replaced_leaves_the_old_one_or_the_new_one() {
        let (dir, mut checkpoints) = with_steps(&[10, 20]);
        // A directory where the new file is prepared: the write fails where a crash would cut it off.
        let blocked = dir.path().join(FOLDER).join(format!(".{}.tmp", file_name(20)));
        fs::create_dir(&blocked).unwrap();
        checkpoints.write(&testing::checkpoint(20, 7), KEEP).unwrap_err();
        fs::remove_dir(&blocked).unwrap();
        assert_eq!(newest_step(&mut checkpoints), (20, vec![]));

        // After the new file, before the new manifest.
        let path = dir.path().join(FOLDER).join(file_name(20));
        fs::write(&path, testing::checkpoint(20, 7).to_bytes()).unwrap();
        let newest = checkpoints.newest_verified().unwrap().unwrap();
        assert_eq!((newest.checkpoint, newest.skipped), (testing::checkpoint(20, 7), vec![]));
    }

    #[test]
    fn a_failed_write_leaves_the_others_and_no_temporary_file() {
        let (dir, mut checkpoints) = with_steps(&[10]);
        // A directory with something in it cannot be replaced.
        fs::create_dir_all(dir.path().join(FOLDER).join(file_name(20)).join("inside")).unwrap();
        let problem = checkpoints.write(&testing::checkpoint(20, 20), KEEP).unwrap_err();
        assert!(problem.sentence.starts_with("cannot write "), "{problem}");
        let names = names_in(&dir.path().join(FOLDER)).unwrap();
        assert!(names.iter().all(|name| !name.ends_with(".tmp")), "{names:?}");
        assert_eq!(newest_step(&mut checkpoints).0, 10);
    }

    #[test]
    fn only_our_names_are_checkpoints() {
        assert_eq!(step_of("step-00000200.safetensors"), Some(200));
        assert_eq!(step_of(&file_name(u64::MAX)), Some(u64::MAX));
        for other in
            ["step-200.safetensors", ".step-00000200.safetensors.tmp", "step-+0000200.safetensors", "x"]
        {
            assert_eq!(step_of(other), None, "{other}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn no_damage_to_a_listed_file_is_accepted(
            at in 0.0..1.0f64, removed in 0usize..50, inserted in prop::collection::vec(any::<u8>(), 0..50),
        ) {
            let (dir, mut checkpoints) = with_steps(&[10, 20]);
            let path = dir.path().join(FOLDER).join(file_name(20));
            let before = fs::read(&path).unwrap();
            damage(dir.path(), &file_name(20), |bytes| {
                let start = (at * bytes.len() as f64) as usize;
                let end = (start + removed).min(bytes.len());
                bytes.splice(start..end, inserted.iter().copied());
            });
            let unchanged = fs::read(&path).unwrap() == before;
            prop_assert_eq!(newest_step(&mut checkpoints).0, if unchanged { 20 } else { 10 });
        }

        #[test]
        fn no_damage_to_the_manifest_makes_the_reader_panic(
            at in 0.0..1.0f64, removed in 0usize..50, inserted in prop::collection::vec(any::<u8>(), 0..50),
        ) {
            let (dir, mut checkpoints) = with_steps(&[10, 20]);
            damage(dir.path(), MANIFEST, |bytes| {
                let start = (at * bytes.len() as f64) as usize;
                let end = (start + removed).min(bytes.len());
                bytes.splice(start..end, inserted.iter().copied());
            });
            match checkpoints.newest_verified() {
                Ok(newest) => prop_assert!(newest.is_some()),
                Err(problem) => prop_assert!(problem.sentence.starts_with("no checkpoint in "), "{}", problem),
            }
        }
    }
}
