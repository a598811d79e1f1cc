//! What the user sees of a run: the job, progress, a line per epoch, the end.
//!
//! Three forms: a bar at the foot of a terminal, plain lines elsewhere, JSON lines with `--json`.

mod pace;
mod text;

use std::io::{IsTerminal, Write, stdout};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use protocol::job::{JobFile, Task};
use protocol::message::StepReport;
use protocol::schedule::Schedule;
use protocol::sums::StepSums;
use serde_json::json;

use pace::Pace;
pub(crate) use text::{duration, fixed, quality, quoted, short};

const PLAIN_INTERVAL: Duration = Duration::from_secs(5);
const LIVE_INTERVAL: Duration = Duration::from_millis(100);

/// Columns of a terminal that does not say how many it has.
const DEFAULT_COLUMNS: usize = 80;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Live,
    Plain,
    Json,
}

/// Where a run shows itself.
pub(crate) struct Screen {
    out: Box<dyn Write + Send>,
    form: Form,
    task: Task,
    total_steps: u64,
    steps_per_epoch: u64,
    last_shown: Instant,
    pace: Pace,
    /// At the foot of a terminal, from the first step to the end.
    bar: Option<ProgressBar>,
}

/// How far a run is.
#[derive(Debug, Clone, Copy)]
struct Progress {
    step: u64,
    total_steps: u64,
    /// The pass over the data, from 1.
    epoch: u64,
    loss: f64,
    samples_per_second: Option<f64>,
    seconds_left: Option<f64>,
}

/// What is known at an epoch's end, or at the run's.
#[derive(Debug, Clone, Copy)]
pub(crate) struct EpochEnd<'a> {
    pub(crate) step: u64,
    pub(crate) train_loss: Option<f64>,
    pub(crate) validation: Option<&'a StepSums>,
    pub(crate) gradient_norm: f64,
    pub(crate) learning_rate: f64,
    /// Rows trained on per second of wall-clock time.
    pub(crate) samples_per_second: f64,
    pub(crate) workers: usize,
    /// Fraction of the epoch's step time spent waiting for the collective.
    pub(crate) communication: f64,
    pub(crate) seconds: f64,
}

impl Screen {
    pub(crate) fn new(json: bool, task: Task, schedule: &Schedule) -> Self {
        // A terminal that cannot move its cursor gets lines.
        let can_redraw = stdout().is_terminal() && std::env::var("TERM").is_ok_and(|term| term != "dumb");
        let form = match (json, can_redraw) {
            (true, _) => Form::Json,
            (false, true) => Form::Live,
            (false, false) => Form::Plain,
        };
        Self::on(Box::new(stdout()), form, task, schedule)
    }

    /// A screen that shows nothing.
    #[cfg(test)]
    pub(crate) fn dark(task: Task, schedule: &Schedule) -> Self {
        Self::on(Box::new(std::io::sink()), Form::Plain, task, schedule)
    }

    fn on(out: Box<dyn Write + Send>, form: Form, task: Task, schedule: &Schedule) -> Self {
        let now = Instant::now();
        Self {
            out,
            form,
            task,
            total_steps: schedule.total_steps,
            steps_per_epoch: schedule.steps_per_epoch,
            last_shown: now,
            pace: Pace::new(now),
            bar: None,
        }
    }

    /// Shows the job as a table.
    pub(crate) fn job(&mut self, preset: &str, file: &JobFile, rows: &[(&str, String)]) {
        if self.form == Form::Json {
            let facts = facts(rows);
            return self.json(
                &json!({"kind": "job", "preset": preset, "job": file.job, "run": file.run, "facts": facts}),
            );
        }
        self.lines(&text::table(&format!("Lockstep: {preset}"), rows, self.columns()));
    }

    /// Shows a step, if it is time.
    pub(crate) fn step(&mut self, report: &StepReport) {
        let now = Instant::now();
        self.pace.add(now, report.sums.rows);
        let interval = if self.form == Form::Live { LIVE_INTERVAL } else { PLAIN_INTERVAL };
        if now - self.last_shown < interval {
            return;
        }
        self.last_shown = now;
        let samples_per_second = self.pace.samples_per_second(now);
        let rows_left = (self.total_steps - report.step) as f64 * report.sums.rows as f64;
        let progress = Progress {
            step: report.step,
            total_steps: self.total_steps,
            epoch: (report.step - 1) / self.steps_per_epoch + 1,
            loss: report.sums.mean_loss(),
            samples_per_second,
            seconds_left: samples_per_second.map(|speed| rows_left / speed),
        };
        match self.form {
            Form::Live => self.draw(&progress),
            Form::Plain => self.lines(&[text::progress_line(&progress)]),
            Form::Json => self.json(&json!({"kind": "progress", "step": progress.step,
                "total_steps": progress.total_steps, "epoch": progress.epoch, "train_loss": progress.loss,
                "samples_per_second": progress.samples_per_second, "eta_seconds": progress.seconds_left})),
        }
    }

    /// Rows per second over the last seconds.
    pub(crate) fn samples_per_second(&self) -> Option<f64> {
        self.pace.samples_per_second(Instant::now())
    }

    /// Shows what an evaluation gave.
    pub(crate) fn epoch(&mut self, end: &EpochEnd<'_>) {
        if self.form == Form::Json {
            return self.json(
                &json!({"kind": "epoch", "step": end.step, "epoch": end.step / self.steps_per_epoch,
                "train_loss": end.train_loss, "val_loss": end.validation.map(StepSums::mean_loss),
                "val_accuracy": end.validation.map(StepSums::accuracy), "grad_norm": end.gradient_norm,
                "learning_rate": end.learning_rate, "samples_per_second": end.samples_per_second,
                "workers": end.workers, "communication": end.communication, "seconds": end.seconds}),
            );
        }
        self.lines(&text::epoch_lines(self.task, self.steps_per_epoch, end, self.columns()));
    }

    /// Shows what the network wrote at an epoch's end.
    pub(crate) fn sample(&mut self, step: u64, epoch: u64, text: &str) {
        if self.form == Form::Json {
            return self.json(&json!({"kind": "sample", "step": step, "epoch": epoch, "text": text}));
        }
        self.lines(&text::sample_lines(text, self.columns()));
    }

    /// Shows a sentence.
    pub(crate) fn notice(&mut self, sentence: &str) {
        match self.form {
            Form::Json => self.json(&json!({"kind": "notice", "text": sentence})),
            _ => self.lines(&[sentence.to_owned()]),
        }
    }

    /// Shows how the run ended: rows of what and where, and the commands that come next.
    pub(crate) fn summary(&mut self, outcome: &str, rows: &[(&str, String)], next: &[String]) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        match self.form {
            Form::Json => self.json(&json!({"kind": "end", "outcome": outcome, "facts": facts(rows)})),
            _ => self.lines(&text::summary(outcome, rows, next)),
        }
    }

    fn draw(&mut self, progress: &Progress) {
        let beside = text::beside_bar(progress, self.columns().unwrap_or(DEFAULT_COLUMNS));
        let bar = self.bar.get_or_insert_with(|| {
            let bar = ProgressBar::with_draw_target(Some(progress.total_steps), ProgressDrawTarget::stdout());
            // Left without colours where NO_COLOR is set.
            let style = ProgressStyle::with_template("{wide_bar:.cyan/dim} {msg}").expect("a valid template");
            bar.with_style(style.progress_chars("━╸─")).with_position(progress.step)
        });
        bar.set_message(beside);
        bar.set_position(progress.step);
    }

    /// Columns of the terminal; none where lines may have any length.
    fn columns(&self) -> Option<usize> {
        let of_terminal =
            || rustix::termios::tcgetwinsize(stdout()).ok().map(|size| usize::from(size.ws_col));
        (self.form == Form::Live)
            .then(|| of_terminal().filter(|columns| *columns > 0).unwrap_or(DEFAULT_COLUMNS))
    }

    fn json(&mut self, event: &serde_json::Value) {
        self.lines(&[event.to_string()]);
    }

    /// Writes lines, above the bar if there is one. A reader that closed the pipe, or a terminal that is gone, has
    /// seen enough: the run goes on.
    fn lines(&mut self, lines: &[String]) {
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        let out = &mut self.out;
        let mut write = || {
            let _ = out.write_all(text.as_bytes());
        };
        match &self.bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }
}

fn facts(rows: &[(&str, String)]) -> serde_json::Map<String, serde_json::Value> {
    rows.iter().map(|(key, value)| ((*key).to_owned(), json!(value))).collect()
}
