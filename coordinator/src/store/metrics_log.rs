//! `metrics.jsonl`: the numbers of each step and each epoch and what the network wrote, one JSON object a line, for
//! people and plots.
//!
//! Each step is there exactly once: a report that comes twice is left out, and a resume drops what lies after the
//! step it goes on from. Nothing is ever computed from this file.

use std::path::Path;

use protocol::message::PhaseSeconds;
use protocol::problem::Problem;
use serde::{Deserialize, Deserializer, Serialize};

use super::files::{LineFile, LineSync, read_if_there, write_atomic};

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum MetricLine {
    /// A step.
    Step(StepLine),
    /// A finished epoch.
    Epoch(EpochLine),
    /// A text that the network wrote at an epoch's end.
    Sample(SampleLine),
}

/// The numbers of one step. What is not finite is written as `null` and read as not-a-number.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepLine {
    /// Steps done, this one included.
    pub step: u64,
    /// The pass over the data it belongs to, from 1.
    pub epoch: u64,
    /// Mean loss of the step's batch in nats.
    #[serde(deserialize_with = "number_or_nan")]
    pub train_loss: f64,
    /// Norm of the mean gradient before clipping.
    #[serde(deserialize_with = "number_or_nan")]
    pub grad_norm: f64,
    /// Learning rate of the update.
    #[serde(deserialize_with = "number_or_nan")]
    pub learning_rate: f64,
    /// Rows per second of wall-clock time.
    #[serde(deserialize_with = "number_or_nan")]
    pub samples_per_second: f64,
    /// Workers that shared the step.
    pub workers: u32,
    /// Whether it was left out because it is not finite; only then it is written.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub skipped: bool,
    /// Where its time went.
    pub seconds: SecondsLine,
}

/// Wall-clock seconds of the phases of a step.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct SecondsLine {
    /// Waiting for the batch.
    #[serde(deserialize_with = "number_or_nan")]
    pub data: f64,
    /// Forward, backward, adding own shards.
    #[serde(deserialize_with = "number_or_nan")]
    pub compute: f64,
    /// Waiting for the collective.
    #[serde(deserialize_with = "number_or_nan")]
    pub reduce: f64,
    /// Clipping and the optimizer.
    #[serde(deserialize_with = "number_or_nan")]
    pub update: f64,
}

impl From<PhaseSeconds> for SecondsLine {
    fn from(seconds: PhaseSeconds) -> Self {
        let PhaseSeconds { data, compute, reduce, update } = seconds;
        Self { data, compute, reduce, update }
    }
}

/// The numbers of one finished epoch. What is not finite is written as `null`; so is what was not measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EpochLine {
    /// Steps done at its end.
    pub step: u64,
    /// The epoch, from 1.
    pub epoch: u64,
    /// Mean training loss in nats.
    #[serde(deserialize_with = "number_or_nan")]
    pub train_loss: f64,
    /// Fraction of the training targets that the network ranked first.
    #[serde(deserialize_with = "number_or_nan")]
    pub train_accuracy: f64,
    /// Mean validation loss in nats; `None` without validation data.
    pub val_loss: Option<f64>,
    /// Fraction of the validation targets that the network ranked first; `None` without validation data.
    pub val_accuracy: Option<f64>,
    /// Learning rate of the last step.
    #[serde(deserialize_with = "number_or_nan")]
    pub learning_rate: f64,
    /// Rows per second of wall-clock time over the epoch.
    #[serde(deserialize_with = "number_or_nan")]
    pub samples_per_second: f64,
    /// Wall-clock seconds of the epoch, evaluation included.
    #[serde(deserialize_with = "number_or_nan")]
    pub seconds: f64,
    /// Part of the steps' time spent waiting for the collective, from 0 to 1.
    #[serde(deserialize_with = "number_or_nan")]
    pub communication_share: f64,
    /// Workers at its end.
    pub workers: u32,
}

/// What the network wrote at the end of one epoch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SampleLine {
    /// Steps done.
    pub step: u64,
    /// The epoch, from 1.
    pub epoch: u64,
    /// The text, without what it continues.
    pub text: String,
}

fn number_or_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// The little that decides whether a line stays; lines of later versions with more kinds and keys have it too.
#[derive(Deserialize)]
struct Place {
    kind: String,
    step: u64,
}

/// The last step for which there is a line of each kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Last {
    step: u64,
    epoch: u64,
    sample: u64,
}

impl Last {
    /// Moves on to a line of this kind after `step` steps; false if there is one already.
    fn advance(&mut self, kind: &str, step: u64) -> bool {
        let last = match kind {
            "step" => &mut self.step,
            "epoch" => &mut self.epoch,
            "sample" => &mut self.sample,
            _ => return true,
        };
        if step <= *last {
            return false;
        }
        *last = step;
        true
    }
}

/// A metrics file open for appending. Needs the run directory's lock.
#[derive(Debug)]
pub struct MetricsLog {
    lines: LineFile,
    last: Last,
}

impl MetricsLog {
    /// Opens a metrics file, creating it if there is none, and drops a torn last line and all lines after `step` steps,
    /// so that a run that goes on from there writes them anew.
    ///
    /// # Errors
    /// The file cannot be read or written; it is then as it was.
    pub fn open(path: &Path, step: u64) -> Result<Self, Problem> {
        let content = read_if_there(path)?.unwrap_or_default();
        let (kept, last) = kept_lines(&content, step);
        if kept != content {
            write_atomic(path, &kept)?;
        }
        let lines = LineFile::open(path, kept.len() as u64)?;
        Ok(Self { lines, last })
    }

    /// Drops all lines after `step` steps.
    ///
    /// # Errors
    /// The file cannot be read or written.
    pub fn rewind(&mut self, step: u64) -> Result<(), Problem> {
        let (kept, last) = kept_lines(&self.lines.content()?, step);
        self.lines.replace(&kept)?;
        self.last = last;
        Ok(())
    }

    /// The last step that has a line; 0 if none has.
    pub fn last_step(&self) -> u64 {
        self.last.step
    }

    /// The last step after which an epoch has a line; 0 if none has.
    pub fn last_epoch(&self) -> u64 {
        self.last.epoch
    }

    /// Appends a line. One for a step or epoch that has a line already is left out, and false is returned.
    ///
    /// # Errors
    /// Too much waits in memory because the file cannot be written.
    pub fn append(&mut self, line: &MetricLine) -> Result<bool, Problem> {
        let mut last = self.last;
        let is_new = match line {
            MetricLine::Step(line) => last.advance("step", line.step),
            MetricLine::Epoch(line) => last.advance("epoch", line.step),
            MetricLine::Sample(line) => last.advance("sample", line.step),
        };
        if is_new {
            self.lines.append(&serde_json::to_string(line).expect("plain values can be written as JSON"))?;
            self.last = last;
        }
        Ok(is_new)
    }

    /// What waits until its lines are on the disk.
    pub(crate) fn on_disk(&self) -> LineSync {
        self.lines.on_disk()
    }
}

/// All lines of a metrics file that this version understands, for plots. That there is no file is no line.
///
/// # Errors
/// The file cannot be read.
pub fn read(path: &Path) -> Result<Vec<MetricLine>, Problem> {
    let content = read_if_there(path)?.unwrap_or_default();
    Ok(content.split(|&byte| byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect())
}

/// The lines that stay: whole, not after `most` steps, and each step and epoch once.
fn kept_lines(content: &[u8], most: u64) -> (Vec<u8>, Last) {
    let mut kept = Vec::with_capacity(content.len());
    let mut last = Last::default();
    for line in content.split(|&byte| byte == b'\n') {
        let Ok(Place { kind, step }) = serde_json::from_slice(line) else {
            continue;
        };
        if step <= most && last.advance(&kind, step) {
            kept.extend_from_slice(line);
            kept.push(b'\n');
        }
    }
    (kept, last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::files::names_in;
    use std::fs;
    use std::path::PathBuf;

    fn step(step: u64) -> MetricLine {
        MetricLine::Step(StepLine {
            step,
            epoch: (step - 1) / 2,
            train_loss: 1.5,
            grad_norm: 2.0,
            learning_rate: 0.001,
            samples_per_second: 100.0,
            workers: 2,
            skipped: false,
            seconds: PhaseSeconds { data: 0.25, compute: 1.0, reduce: 0.5, update: 0.125 }.into(),
        })
    }

    fn epoch(step: u64) -> MetricLine {
        MetricLine::Epoch(EpochLine {
            step,
            epoch: step / 2 - 1,
            train_loss: 1.5,
            train_accuracy: 0.5,
            val_loss: Some(1.25),
            val_accuracy: None,
            learning_rate: 0.001,
            samples_per_second: 100.0,
            seconds: 3.0,
            communication_share: 0.25,
            workers: 2,
        })
    }

    fn sample(step: u64) -> MetricLine {
        MetricLine::Sample(SampleLine { step, epoch: step / 2, text: format!("\"é\n\u{1b}{step}") })
    }

    fn story() -> Vec<MetricLine> {
        vec![step(1), step(2), epoch(2), sample(2), step(3), step(4), epoch(4), sample(4), step(5)]
    }

    fn written() -> (tempfile::TempDir, PathBuf, MetricsLog) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut log = MetricsLog::open(&path, u64::MAX).unwrap();
        for line in story() {
            assert!(log.append(&line).unwrap());
        }
        (dir, path, log)
    }

    #[test]
    fn lines_come_back_and_are_as_documented() {
        let (_dir, path, log) = written();
        assert_eq!(read(&path).unwrap(), story());
        assert_eq!(log.last_step(), 5);
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(
            text.lines().next().unwrap(),
            "{\"kind\":\"step\",\"step\":1,\"epoch\":0,\"train_loss\":1.5,\"grad_norm\":2.0,\
             \"learning_rate\":0.001,\"samples_per_second\":100.0,\"workers\":2,\
             \"seconds\":{\"data\":0.25,\"compute\":1.0,\"reduce\":0.5,\"update\":0.125}}"
        );
    }

    #[test]
    fn a_report_that_came_twice_is_left_out() {
        let (_dir, path, mut log) = written();
        let before = fs::read(&path).unwrap();
        for line in story() {
            assert!(!log.append(&line).unwrap());
        }
        assert!(fs::read(&path).unwrap() == before);
    }

    #[test]
    fn a_resume_drops_later_steps_and_each_step_is_there_once() {
        for (resumed, kept) in [(0, 0), (1, 1), (2, 4), (3, 5), (4, 8), (5, 9), (9, 9)] {
            let (dir, path, _) = written();
            let mut log = MetricsLog::open(&path, resumed).unwrap();
            assert_eq!(read(&path).unwrap(), story()[..kept], "resumed at {resumed}");
            for line in &story()[kept..] {
                assert!(log.append(line).unwrap());
            }
            assert_eq!(read(&path).unwrap(), story(), "resumed at {resumed}");
            assert_eq!(names_in(dir.path()).unwrap(), ["metrics.jsonl"]);
        }
    }

    #[test]
    fn whoever_waits_for_lines_waits_for_those_after_a_rewind() {
        let (_dir, path, mut log) = written();
        let on_disk = log.on_disk();
        log.rewind(2).unwrap();
        assert_eq!((read(&path).unwrap(), log.last_step()), (story()[..4].to_vec(), 2));
        for line in &story()[4..] {
            assert!(log.append(line).unwrap());
        }
        assert_eq!(read(&path).unwrap(), story());
        on_disk.sync().unwrap();
    }

    #[test]
    fn a_torn_last_line_is_dropped_and_written_again() {
        let (_dir, path, _) = written();
        let whole = fs::read(&path).unwrap();
        let before_last = whole[..whole.len() - 1].iter().rposition(|&byte| byte == b'\n').unwrap() + 1;
        for length in before_last..=whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            let mut log = MetricsLog::open(&path, u64::MAX).unwrap();
            log.append(&step(5)).unwrap();
            assert!(fs::read(&path).unwrap() == whole, "torn at byte {length}");
        }
    }

    #[test]
    fn lines_that_are_double_or_damaged_are_dropped() {
        let (_dir, path, _) = written();
        let whole = fs::read(&path).unwrap();
        let line = serde_json::to_string(&step(2)).unwrap();
        fs::write(&path, [&whole, line.as_bytes(), b"\n\0\0\xff\n{}\n"].concat()).unwrap();
        MetricsLog::open(&path, u64::MAX).unwrap();
        assert!(fs::read(&path).unwrap() == whole);
    }

    #[test]
    fn what_is_not_finite_is_null() {
        let (_dir, path, mut log) = written();
        let MetricLine::Step(mut line) = step(6) else { unreachable!() };
        line.train_loss = f64::NAN;
        line.grad_norm = f64::INFINITY;
        line.skipped = true;
        log.append(&MetricLine::Step(line)).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains("\"train_loss\":null,\"grad_norm\":null"), "{text}");
        assert_eq!(text.matches("\"skipped\":true").count(), 1);
        let Some(MetricLine::Step(read)) = read(&path).unwrap().pop() else { unreachable!() };
        assert!(read.train_loss.is_nan() && read.grad_norm.is_nan() && read.skipped);
    }
}
