//! Everything a run writes: journal, metrics file, checkpoints.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use protocol::job::{Decay, JobFile, JobSpec};
use protocol::layout::StateLayout;
use protocol::message::{StepReport, WorkerId};
use protocol::problem::Problem;
use protocol::sums::StepSums;

use crate::data::DataFacts;
use crate::early_end::EarlyEnd;
use crate::stage::Stage;
use crate::store::checkpoint::Checkpoint;
use crate::store::checkpoint_dir::{CheckpointDir, Newest};
use crate::store::diverged;
use crate::store::files::LineSync;
use crate::store::identity::{Identity, START_OVER};
use crate::store::journal::{Journal, Record, Replay};
use crate::store::metrics_log::{EpochLine, MetricLine, MetricsLog, SampleLine, StepLine};
use crate::store::run_dir::{OpenMode, RunDir};
use crate::store::state::StateImage;
use crate::warm_start::FirstState;

/// An open run directory.
pub(crate) struct Records {
    pub(crate) dir: RunDir,
    pub(crate) run_id: String,
    pub(crate) coordinator_epoch: u64,
    pub(crate) last_generation: u64,
    /// The shards of its members, by rank, if they may still be there.
    pub(crate) places: Vec<Range<u32>>,
    /// What workers of this and older generations hold is not what the run goes on from.
    pub(crate) fence: u64,
    journal: Journal,
    metrics: MetricsLog,
    replay: Replay,
    make_checkpoint: MakeCheckpoint,
    /// What the state that the run goes on from was computed with; `None` if it starts from the seed, or if that
    /// was not recorded.
    pub(crate) bits: Option<String>,
    /// The newest checkpoint.
    pub(crate) checkpoint: Option<Stage>,
    checkpoints: CheckpointDir,
    /// What the user should know of the directory and of the state that the run goes on from.
    pub(crate) notices: Vec<String>,
    /// The same that holds only if the run goes on from the disk.
    from_disk: Vec<String>,
}

/// From a state image to all that is kept with it.
type MakeCheckpoint = Arc<dyn Fn(Vec<u8>) -> Result<Checkpoint, Problem> + Send + Sync>;
/// What a run directory is opened for.
pub(crate) struct Opening<'a> {
    pub(crate) path: &'a Path,
    /// Delete what is in it.
    pub(crate) fresh: bool,
    pub(crate) file: &'a JobFile,
    pub(crate) facts: &'a DataFacts,
    pub(crate) layout: &'a StateLayout,
    /// What this binary is.
    pub(crate) build: &'a str,
    /// The state of step 0, if it is not the seed's.
    pub(crate) first: Option<FirstState>,
    /// The learning rate to go on with.
    pub(crate) learning_rate: Option<f64>,
}

impl Records {
    /// Opens or creates the run directory, and finds or writes the state to go on from.
    ///
    /// # Errors
    /// Whatever makes the directory unusable for this job.
    pub(crate) fn open(opening: Opening<'_>) -> Result<(Self, Option<StateImage>), Problem> {
        let Opening { path, fresh, facts, layout, build, first, learning_rate, .. } = opening;
        let mode = if fresh { OpenMode::Fresh } else { OpenMode::Resume };
        let dir = RunDir::open(path, mode, opening.file, &facts.digest)?;
        let file = dir.job().clone();
        let (mut journal, replay) = Journal::open(&dir.journal_path())?;
        let mut checkpoints = dir.checkpoints();
        let newest = checkpoints.newest_verified()?;
        if let Some(newest) = &newest {
            let ours = Identity { job: &file.job, data_digest: &facts.digest };
            check_fits(newest, ours, layout)?;
        }
        check_begins(path, &file.job, newest.is_some() || first.is_some())?;
        let notices = match replay.torn_bytes {
            0 => Vec::new(),
            torn => vec![format!("the last {torn} bytes of the journal were damaged and are gone")],
        };
        let checkpoint = newest.as_ref().map(|newest| Stage::of(&newest.checkpoint.image));
        let step = checkpoint.map_or(0, |stage| stage.step);
        let run_id = match &replay.run_id {
            Some(id) => id.clone(),
            None => new_run_id()?,
        };
        let coordinator_epoch = replay.coordinator_epoch + 1;
        journal.append(&Record::Start {
            coordinator_epoch,
            run_id: run_id.clone(),
            build: build.to_owned(),
        })?;
        for change in dir.changed_settings() {
            journal.append(&Record::Event { text: change.clone() })?;
        }
        let rate = |newest: &Newest| newest.checkpoint.image.control().learning_rate(file.job.learning_rate);
        let changes_rate = newest.as_ref().zip(learning_rate).is_some_and(|(at, wanted)| rate(at) != wanted);
        let is_changed = changes_rate || !dir.changed_settings().is_empty();
        let places: Vec<Range<u32>> = match is_changed || replay.fence >= replay.last_generation {
            true => Vec::new(),
            false => replay.places.iter().map(|[from, to]| *from..*to).collect(),
        };
        // While workers may come back that are further, what they did is kept.
        let metrics = MetricsLog::open(&dir.metrics_path(), u64::MAX)?;
        let (layout, job, digest) = (layout.clone(), file.job.clone(), facts.digest.clone());
        let labels = facts.labels.clone();
        let vocabulary: Option<String> = facts.vocabulary.as_ref().map(|chars| chars.iter().collect());
        let make_checkpoint: MakeCheckpoint = Arc::new(move |bytes: Vec<u8>| {
            Ok(Checkpoint {
                image: StateImage::new(&layout, bytes)?,
                job: job.clone(),
                data_digest: digest.clone(),
                vocabulary: vocabulary.clone(),
                labels: labels.clone(),
            })
        });
        let mut records = Self {
            dir,
            run_id,
            coordinator_epoch,
            last_generation: replay.last_generation,
            fence: if is_changed { replay.last_generation } else { replay.fence },
            places,
            // Where nothing was computed that is kept, any build may begin.
            bits: replay.bits.clone().filter(|_| step > 0),
            journal,
            metrics,
            replay,
            make_checkpoint,
            checkpoint,
            checkpoints,
            notices,
            from_disk: Vec::new(),
        };
        let mut image = match (newest, first) {
            (Some(newest), _) => {
                records.from_disk.extend(newest.skipped);
                let undone = records.undone_learning_rate(step).filter(|_| learning_rate.is_none());
                records.from_disk.extend(undone);
                records.from_disk.push(format!("going on from {} ({step} steps done)", newest.file));
                Some(newest.checkpoint.image)
            }
            (None, Some(first)) => {
                records.write(&first.image)?;
                records.notices.push(first.notice);
                Some(first.image)
            }
            (None, None) if records.replay.last_step() > 0 => {
                let done = records.replay.last_step();
                let sentence = format!(
                    "there is no checkpoint of the {done} steps that were done before: starting again"
                );
                records.from_disk.push(sentence);
                None
            }
            (None, None) => None,
        };
        match records.places.len() {
            0 => {
                let notices = records.rewind(step)?;
                records.notices.extend(notices);
            }
            1 => records.notices.push("looking for the run's worker, which may still be there".to_owned()),
            all => {
                records
                    .notices
                    .push(format!("looking for the run's {all} workers, which may still be there"));
            }
        }
        if let Some(image) = &mut image {
            records.learning_rate(image, learning_rate, &file.job)?;
        }
        Ok((records, image))
    }

    /// Goes back to the state after `step` steps: what is on record of later ones no longer counts. Gives what the user
    /// should know of it.
    pub(crate) fn rewind(&mut self, step: u64) -> Result<Vec<String>, Problem> {
        if self.replay.last_step() > step {
            self.journal.append(&Record::Rewind { to_step: step })?;
            self.fence = self.last_generation;
        }
        if self.metrics.last_step() > step {
            self.metrics.rewind(step)?;
        }
        Ok(std::mem::take(&mut self.from_disk))
    }

    /// The last step that was on record when the directory was opened, in the ledger and in the metrics.
    pub(crate) fn last_step(&self) -> u64 {
        self.replay.last_step().min(self.metrics.last_step())
    }

    /// Whether the evaluation after `step` steps was on record then, and the end of the epoch if it `ends_epoch`.
    pub(crate) fn has_evaluation(&self, step: u64, ends_epoch: bool) -> bool {
        self.replay.evaluations.contains_key(&step) && (!ends_epoch || self.metrics.last_epoch() >= step)
    }

    /// What the last generation was computed with, if that was recorded.
    pub(crate) fn last_bits(&self) -> Option<&str> {
        self.replay.bits.as_deref()
    }

    /// Changes the learning rate of the state that the run goes on from, if another is `wanted`, and notes whatever
    /// rate the state has where the journal does not say so yet.
    fn learning_rate(
        &mut self,
        image: &mut StateImage,
        wanted: Option<f64>,
        job: &JobSpec,
    ) -> Result<(), Problem> {
        let of_job = job.learning_rate;
        let step = image.progress().step;
        let mut control = image.control();
        let before = control;
        if let Some(wanted) = wanted {
            let over = control.early_end(job, image.progress()).filter(|_| image.is_whole());
            if let Some(end) = over.and_then(|stop| EarlyEnd::of(&stop, job, &control, image.progress())) {
                let sentence = format!("{}; another learning rate changes nothing", end.sentence);
                return Err(Problem::usage(sentence).hint(end.hint));
            }
            control.change_learning_rate(of_job, wanted);
        }
        let now = control.learning_rate(of_job);
        if control != before {
            image.set_control(&control);
            // At once: whoever goes on from here without saying it again has it all the same.
            self.write(image)?;
            let before = before.learning_rate(of_job);
            let which = if job.decay == Decay::Constant { "" } else { " that decays" };
            self.notices.push(format!("the learning rate{which} is {now} from here on, it was {before}"));
        }
        if self.replay.learning_rate_at(step).unwrap_or(of_job) != now {
            self.journal(&Record::LearningRate { step, learning_rate: now.to_string() })?;
        }
        Ok(())
    }

    /// What to say when the state after `step` is from before a change of the learning rate.
    fn undone_learning_rate(&self, step: u64) -> Option<String> {
        let (at, rate) = self.replay.learning_rates.range(step + 1..).next_back()?;
        Some(format!(
            "the change of the learning rate to {rate} came after step {at} and is undone; \
             to make it again: --change-learning-rate {rate}"
        ))
    }

    /// Writes a state as a checkpoint before the run is under way.
    fn write(&mut self, image: &StateImage) -> Result<(), Problem> {
        let mut writer = self.checkpoint_writer();
        let (stage, file) = writer.write(image.bytes().to_vec())?;
        self.checkpoints = writer.dir;
        self.checkpoint_written(stage, file)
    }

    /// The last evaluation recorded before this start, for a state after `step` steps.
    pub(crate) fn evaluation_at(&self, step: u64) -> Option<StepSums> {
        let sums = self.replay.evaluation_at(step)?;
        Some(StepSums { loss: sums.loss, weight: sums.weight, correct: sums.correct, ..StepSums::default() })
    }

    /// The newest state on the disk.
    ///
    /// # Errors
    /// There are checkpoints, and all of them are damaged.
    pub(crate) fn newest_state(&self) -> Result<Option<StateImage>, Problem> {
        Ok(self.dir.checkpoints().newest_verified()?.map(|newest| newest.checkpoint.image))
    }

    /// Appends to the journal. It never runs ahead of the metrics file: after a crash that may have lines that the journal
    /// lacks, which a resume drops, but no gap.
    pub(crate) fn journal(&mut self, record: &Record) -> Result<(), Problem> {
        if self.metrics.on_disk().refused().is_none() {
            return self.journal.append(record);
        }
        if !record.waits_for_disk() {
            return self.journal.keep(record);
        }
        self.metrics.on_disk().flush()?;
        self.journal.append(record)
    }

    /// Why lines of the journal or the metrics file wait in memory, if any do.
    pub(crate) fn waiting(&self) -> Option<Problem> {
        self.metrics.on_disk().refused().or_else(|| self.journal.on_disk().refused())
    }

    /// Tries again to write the lines that wait in memory.
    pub(crate) fn flush(&self) {
        if self.metrics.on_disk().flush().is_ok() {
            let _ = self.journal.on_disk().flush();
        }
    }

    /// Records a finished step.
    pub(crate) fn step(&mut self, report: &StepReport, epoch: u64, workers: u32) -> Result<(), Problem> {
        let seconds = report.seconds;
        let duration = seconds.data + seconds.compute + seconds.reduce + seconds.update;
        self.metrics.append(&MetricLine::Step(StepLine {
            step: report.step,
            epoch,
            train_loss: report.sums.mean_loss(),
            grad_norm: report.gradient_norm,
            learning_rate: report.learning_rate,
            samples_per_second: report.sums.rows as f64 / duration,
            workers,
            skipped: report.is_skipped(),
            seconds: seconds.into(),
        }))?;
        self.journal(&Record::step(report.step, &report.sums))
    }

    /// Records an evaluation, and the epoch that it ends, if it does.
    pub(crate) fn evaluation(
        &mut self,
        step: u64,
        sums: &StepSums,
        epoch: Option<EpochLine>,
    ) -> Result<(), Problem> {
        self.journal(&Record::evaluation(step, sums))?;
        if let Some(line) = epoch {
            self.metrics.append(&MetricLine::Epoch(line))?;
        }
        Ok(())
    }

    /// Records what the network wrote at an epoch's end; false if there is such a text already.
    pub(crate) fn sample(&mut self, step: u64, epoch: u64, text: &str) -> Result<bool, Problem> {
        self.metrics.append(&MetricLine::Sample(SampleLine { step, epoch, text: text.to_owned() }))
    }

    /// What writes a state image as a checkpoint, on another thread.
    pub(crate) fn checkpoint_writer(&self) -> CheckpointWriter {
        let lines = [self.metrics.on_disk(), self.journal.on_disk()];
        let dir = self.checkpoints.clone();
        let keep = self.dir.job().run.keep_checkpoints as usize;
        CheckpointWriter { dir, keep, make: self.make_checkpoint.clone(), lines }
    }

    /// Writes the state of a replica that has parted from others; gives the file.
    pub(crate) fn diverged(&self, image: Vec<u8>, worker: (WorkerId, &str)) -> Result<PathBuf, Problem> {
        diverged::write(self.dir.path(), &(self.make_checkpoint)(image)?, worker)
    }

    /// Records that a checkpoint was written.
    pub(crate) fn checkpoint_written(&mut self, stage: Stage, file: String) -> Result<(), Problem> {
        self.checkpoint = Some(stage);
        self.journal(&Record::Checkpoint { step: stage.step, file })
    }
}

/// Writes one checkpoint.
pub(crate) struct CheckpointWriter {
    dir: CheckpointDir,
    /// The newest that stay.
    keep: usize,
    make: MakeCheckpoint,
    /// Metrics file and journal.
    lines: [LineSync; 2],
}

impl CheckpointWriter {
    /// Writes the image; gives how far it is and the file's name.
    pub(crate) fn write(&mut self, image: Vec<u8>) -> Result<(Stage, String), Problem> {
        // A state on the disk is never computed again. Were the lines of the steps before it still in memory, a power
        // loss would tear a hole into ledger and metrics that no resume mends.
        self.lines.iter().try_for_each(LineSync::sync)?;
        let checkpoint = (self.make)(image)?;
        let entry = self.dir.write(&checkpoint, self.keep)?;
        Ok((Stage::of(&checkpoint.image), entry.file))
    }
}

/// A checkpoint of another job can only have been put there by hand.
fn check_fits(newest: &Newest, ours: Identity<'_>, layout: &StateLayout) -> Result<(), Problem> {
    ours.check(&newest.file, newest.checkpoint.identity())?;
    if newest.checkpoint.image.layout() == layout {
        return Ok(());
    }
    Err(Problem::usage(format!("{} has tensors of other shapes than this job over this data", newest.file))
        .hint(START_OVER))
}

/// A run that starts from given parameters needs them until its first checkpoint is written.
fn check_begins(path: &Path, job: &JobSpec, has_state: bool) -> Result<(), Problem> {
    if has_state || job.init_from.is_empty() {
        return Ok(());
    }
    Err(Problem::usage(format!(
        "{} starts from the parameters {}, which it does not hold",
        path.display(),
        job.init_from
    ))
    .hint("give --init-from RUN|FILE with these parameters, or --fresh to start over"))
}

/// A name that no other run has: 12 random hexadecimal digits.
fn new_run_id() -> Result<String, Problem> {
    let token = protocol::handshake::Token::generate()
        .map_err(|e| Problem::failed(format!("the system has no randomness to name the run: {e}")))?;
    Ok(token[..12].to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::testing;
    use std::path::Path;

    #[test]
    fn no_checkpoint_is_written_before_the_lines_of_its_steps() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoint = testing::checkpoint(5, 0);
        let image = checkpoint.image.bytes().to_vec();
        let writer = |lines| CheckpointWriter {
            dir: CheckpointDir::new(dir.path()),
            keep: testing::KEEP,
            make: Arc::new({
                let checkpoint = checkpoint.clone();
                move |_| Ok(checkpoint.clone())
            }),
            lines,
        };
        let good = || LineSync::open(&dir.path().join("lines")).unwrap();
        // A device cannot be synced; a disk that fails answers the same way.
        let bad = || LineSync::open(Path::new("/dev/null")).unwrap();
        for lines in [[bad(), good()], [good(), bad()]] {
            let problem = writer(lines).write(image.clone()).unwrap_err();
            assert!(problem.sentence.starts_with("cannot sync /dev/null: "), "{problem}");
            assert!(CheckpointDir::new(dir.path()).newest_verified().unwrap().is_none());
        }
        writer([good(), good()]).write(image).unwrap();
        assert!(CheckpointDir::new(dir.path()).newest_verified().unwrap().is_some());
    }
}
