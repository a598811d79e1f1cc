//! `loss.svg`: the losses of a run so far, from its first step on, however often it was resumed.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use protocol::job::Task;
use protocol::problem::Problem;

use crate::data::grouped;
use crate::plot::{LossPlot, loss_svg};
use crate::screen::fixed;
use crate::store::files::write_atomic;
use crate::store::metrics_log::{self, EpochLine, MetricLine, StepLine};

/// Points of the training loss at most.
const BINS: usize = 600;

/// Points of the validation loss at most.
const EPOCHS: usize = 300;

/// Where epochs are short, the file is not written at the end of each.
const WRITE_INTERVAL: Duration = Duration::from_secs(1);

/// The losses of a run, and the file that shows them.
#[derive(Debug)]
pub(crate) struct LossFile {
    path: PathBuf,
    title: String,
    task: Task,
    curve: LossCurve,
    written: Option<Instant>,
}

impl LossFile {
    /// Goes on from the losses in a metrics file. `path` is where the picture is written.
    ///
    /// # Errors
    /// The metrics file cannot be read.
    pub(crate) fn open(path: PathBuf, metrics: &Path, title: String, task: Task) -> Result<Self, Problem> {
        Ok(Self { path, title, task, curve: LossCurve::read(metrics)?, written: None })
    }

    /// Forgets what is not in the metrics file any more.
    ///
    /// # Errors
    /// The metrics file cannot be read.
    pub(crate) fn reread(&mut self, metrics: &Path) -> Result<(), Problem> {
        self.curve = LossCurve::read(metrics)?;
        Ok(())
    }

    /// Takes in the loss of a step.
    pub(crate) fn step(&mut self, step: u64, loss: f64) {
        self.curve.step(step, loss);
    }

    /// Takes in a finished epoch, and writes the file unless it was written a moment ago.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(crate) fn epoch(&mut self, line: EpochLine) -> Result<(), Problem> {
        self.curve.epoch(line);
        if self.written.is_some_and(|written| written.elapsed() < WRITE_INTERVAL) {
            return Ok(());
        }
        self.write().map(drop)
    }

    /// Writes the file, if there is anything to show; gives where it is.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(crate) fn write(&mut self) -> Result<Option<&Path>, Problem> {
        if self.curve.last_step == 0 {
            return Ok(None);
        }
        // An attempt that failed counts too: the next one waits as long.
        self.written = Some(Instant::now());
        let plot = LossPlot {
            title: &self.title,
            caption: &self.curve.caption(self.task),
            training: &self.curve.training(),
            validation: &self.curve.validation(),
        };
        write_atomic(&self.path, loss_svg(&plot).as_bytes())?;
        Ok(Some(&self.path))
    }
}

/// The losses of a run, those of steps in bounded space: what it holds follows from the losses alone, not from when
/// they came.
#[derive(Debug)]
struct LossCurve {
    /// Steps per bin, a power of two: when there would be too many bins, each two become one.
    bin_width: u64,
    bins: Vec<Bin>,
    last_step: u64,
    epochs: Vec<EpochLine>,
}

/// Sum and number of the finite losses of some steps.
#[derive(Debug, Clone, Copy, Default)]
struct Bin {
    sum: f64,
    count: u64,
}

impl Default for LossCurve {
    fn default() -> Self {
        Self { bin_width: 1, bins: Vec::new(), last_step: 0, epochs: Vec::new() }
    }
}

impl LossCurve {
    /// The losses in a metrics file.
    fn read(metrics: &Path) -> Result<Self, Problem> {
        let mut curve = Self::default();
        for line in metrics_log::read(metrics)? {
            match line {
                MetricLine::Step(StepLine { step, train_loss, .. }) => curve.step(step, train_loss),
                MetricLine::Epoch(line) => curve.epoch(line),
                MetricLine::Sample(_) => {}
            }
        }
        Ok(curve)
    }

    /// Takes in the loss of a step; they come in order, from 1.
    fn step(&mut self, step: u64, loss: f64) {
        self.last_step = self.last_step.max(step);
        while (step - 1) / self.bin_width >= BINS as u64 {
            self.bin_width *= 2;
            let pair = |pair: &[Bin]| Bin {
                sum: pair.iter().map(|bin| bin.sum).sum(),
                count: pair.iter().map(|bin| bin.count).sum(),
            };
            self.bins = self.bins.chunks(2).map(pair).collect();
        }
        let index = ((step - 1) / self.bin_width) as usize;
        if self.bins.len() <= index {
            self.bins.resize(index + 1, Bin::default());
        }
        if loss.is_finite() {
            self.bins[index].sum += loss;
            self.bins[index].count += 1;
        }
    }

    fn epoch(&mut self, line: EpochLine) {
        self.epochs.push(line);
    }

    /// The mean of each bin, at the middle of its steps.
    fn training(&self) -> Vec<(f64, f64)> {
        let middle = |index: usize| {
            let first = index as u64 * self.bin_width + 1;
            let last = (first + self.bin_width - 1).min(self.last_step);
            (first + last) as f64 / 2.0
        };
        let bins = self.bins.iter().enumerate().filter(|(_, bin)| bin.count > 0);
        bins.map(|(index, bin)| (middle(index), bin.sum / bin.count as f64)).collect()
    }

    /// The validation losses of all epochs or, where there are many, of every so many; of the last one always.
    fn validation(&self) -> Vec<(f64, f64)> {
        let last = self.epochs.len().saturating_sub(1);
        let every = self.epochs.len().div_ceil(EPOCHS).max(1);
        let shown = |index: usize| index == last || (index + 1).is_multiple_of(every);
        let epochs = self.epochs.iter().enumerate().filter(|(index, _)| shown(*index));
        epochs.filter_map(|(_, line)| Some((line.step as f64, line.val_loss?))).collect()
    }

    /// Where the run is, and the numbers of its last finished epoch.
    fn caption(&self, task: Task) -> String {
        let steps = format!("{} step{}", grouped(self.last_step), if self.last_step == 1 { "" } else { "s" });
        let Some(line) = self.epochs.last() else {
            let newest = self.training().last().map_or(f64::NAN, |point| point.1);
            return format!("{steps} · training loss {}", fixed(newest, 4));
        };
        let mut caption =
            format!("{steps} · epoch {}: training loss {}", line.epoch, fixed(line.train_loss, 4));
        if let Some(loss) = line.val_loss {
            caption += &format!(", validation loss {}", fixed(loss, 4));
            match (task, line.val_accuracy) {
                (Task::Chars, _) => {
                    caption += &format!(" ({} bits/char)", fixed(loss / std::f64::consts::LN_2, 3))
                }
                (Task::Rows | Task::Classify, Some(accuracy)) => {
                    caption += &format!(", accuracy {:.2} %", 100.0 * accuracy)
                }
                (Task::Rows | Task::Classify, None) => {}
            }
        }
        caption
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(steps: u64, loss: impl Fn(u64) -> f64) -> LossCurve {
        let mut curve = LossCurve::default();
        (1..=steps).for_each(|step| curve.step(step, loss(step)));
        curve
    }

    fn epoch(epoch: u64, val_loss: Option<f64>) -> EpochLine {
        EpochLine {
            step: 10 * epoch,
            epoch,
            train_loss: 2.25,
            train_accuracy: 0.5,
            val_loss,
            val_accuracy: val_loss.map(|_| 0.875),
            learning_rate: 0.001,
            samples_per_second: 100.0,
            seconds: 1.0,
            communication_share: 0.0,
            workers: 2,
        }
    }

    #[test]
    fn few_steps_are_shown_each() {
        assert_eq!(curve(3, |step| step as f64).training(), [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]);
        assert_eq!(curve(600, |_| 1.0).training().len(), 600);
    }

    #[test]
    fn many_steps_are_means_over_equal_bins() {
        // A straight line stays one, whatever the number of steps.
        for steps in [601, 1000, 4801, 100_000] {
            let points = curve(steps, |step| 0.5 * step as f64).training();
            assert!((300..=600).contains(&points.len()), "{} points of {steps} steps", points.len());
            assert!(points.iter().all(|(step, loss)| *loss == 0.5 * step), "{steps} steps");
        }
    }

    #[test]
    fn losses_that_are_not_finite_are_left_out_of_their_bin() {
        let points = curve(1200, |step| if step % 2 == 0 { f64::NAN } else { 3.0 }).training();
        assert!(points.len() == 600 && points.iter().all(|point| point.1 == 3.0));
        assert!(curve(5, |_| f64::INFINITY).training().is_empty());
    }

    #[test]
    fn the_last_of_many_epochs_is_shown() {
        let mut curve = LossCurve::default();
        (1..=1000).for_each(|number| curve.epoch(epoch(number, Some(number as f64))));
        let points = curve.validation();
        assert!((200..=301).contains(&points.len()), "{}", points.len());
        assert_eq!(points.last(), Some(&(10_000.0, 1000.0)));
    }

    #[test]
    fn the_caption_says_where_the_run_is() {
        let mut curve = curve(1234, |_| 1.5);
        assert_eq!(curve.caption(Task::Chars), "1,234 steps · training loss 1.5000");
        curve.epoch(epoch(3, None));
        assert_eq!(curve.caption(Task::Rows), "1,234 steps · epoch 3: training loss 2.2500");
        curve.epoch(epoch(4, Some(2.0)));
        let start = "1,234 steps · epoch 4: training loss 2.2500, validation loss 2.0000";
        assert_eq!(curve.caption(Task::Chars), format!("{start} (2.885 bits/char)"));
        assert_eq!(curve.caption(Task::Rows), format!("{start}, accuracy 87.50 %"));
    }
}
