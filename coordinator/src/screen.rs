//! What the user sees of a run: the job, progress, a line per epoch, the end.
//!
//! Three forms: a live line on a terminal, plain lines elsewhere, JSON lines with `--json`.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use protocol::job::{JobFile, Task};
use protocol::message::StepReport;
use protocol::schedule::Schedule;
use protocol::sums::StepSums;
use serde_json::json;

const PLAIN_INTERVAL: Duration = Duration::from_secs(5);
const LIVE_INTERVAL: Duration = Duration::from_millis(200);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Live,
    Plain,
    Json,
}

/// Where a run shows itself.
pub(crate) struct Screen {
    form: Form,
    task: Task,
    total_steps: u64,
    steps_per_epoch: u64,
    last_shown: Instant,
    /// Start of the interval over which speed is measured: time, and samples since then.
    window: (Instant, u64),
    samples_per_second: Option<f64>,
    /// A live line is on the terminal and must be wiped before the next one.
    dirty: bool,
}

/// What is known at an epoch's end, or at the run's.
pub(crate) struct EpochEnd<'a> {
    pub(crate) step: u64,
    pub(crate) train_loss: Option<f64>,
    pub(crate) validation: Option<&'a StepSums>,
    pub(crate) gradient_norm: f64,
    pub(crate) learning_rate: f64,
    pub(crate) workers: usize,
    /// Fraction of the epoch's step time spent waiting for the collective.
    pub(crate) communication: f64,
    pub(crate) seconds: f64,
}

impl Screen {
    pub(crate) fn new(json: bool, task: Task, schedule: &Schedule) -> Self {
        let form = match (json, std::io::stdout().is_terminal()) {
            (true, _) => Form::Json,
            (false, true) => Form::Live,
            (false, false) => Form::Plain,
        };
        let now = Instant::now();
        Self {
            form,
            task,
            total_steps: schedule.total_steps,
            steps_per_epoch: schedule.steps_per_epoch,
            last_shown: now,
            window: (now, 0),
            samples_per_second: None,
            dirty: false,
        }
    }

    /// Shows the job as a table.
    pub(crate) fn job(&mut self, preset: &str, file: &JobFile, rows: &[(&str, String)]) {
        if self.form == Form::Json {
            let facts: serde_json::Map<_, _> =
                rows.iter().map(|(key, value)| ((*key).to_owned(), json!(value))).collect();
            self.line(
                &json!({"kind": "job", "preset": preset, "job": file.job, "run": file.run, "facts": facts})
                    .to_string(),
            );
            return;
        }
        let key_width = rows.iter().map(|(key, _)| key.chars().count()).max().unwrap_or(0);
        let value_width = rows.iter().map(|(_, value)| value.chars().count()).max().unwrap_or(0);
        let title = format!(" Lockstep: {preset} ");
        let width = (key_width + value_width + 5).max(title.chars().count() + 2);
        let value_width = width - key_width - 5;
        self.line(&format!("╭─{title}{}╮", "─".repeat(width - 1 - title.chars().count())));
        for (key, value) in rows {
            self.line(&format!("│ {key:key_width$}   {value:value_width$} │"));
        }
        self.line(&format!("╰{}╯", "─".repeat(width)));
    }

    /// Shows a step, if it is time.
    pub(crate) fn step(&mut self, report: &StepReport) {
        let now = Instant::now();
        self.window.1 += report.sums.rows;
        let interval = if self.form == Form::Live { LIVE_INTERVAL } else { PLAIN_INTERVAL };
        if now - self.last_shown < interval {
            return;
        }
        self.last_shown = now;
        let seconds = (now - self.window.0).as_secs_f64();
        let speed = self.window.1 as f64 / seconds;
        if seconds > 2.0 {
            self.window = (now, 0);
            self.samples_per_second = Some(speed);
        }
        let steps_left = self.total_steps - report.step;
        let eta = steps_left as f64 * report.sums.rows as f64 / speed;
        let (loss, epoch) = (report.sums.mean_loss(), (report.step - 1) / self.steps_per_epoch + 1);
        if self.form == Form::Json {
            let line = json!({"kind": "progress", "step": report.step, "total_steps": self.total_steps,
                "epoch": epoch, "train_loss": loss, "samples_per_second": speed, "eta_seconds": eta});
            return self.line(&line.to_string());
        }
        let line = format!(
            "epoch {epoch:>3}  step {:>6}/{}  loss {loss:.4}  {speed:.0} samples/s  {} left",
            report.step,
            self.total_steps,
            duration(eta)
        );
        if self.form == Form::Live {
            // As in `line`: a terminal that is gone must not end the run.
            let mut out = std::io::stdout();
            let _ = write!(out, "\r\x1b[2K{line}").and_then(|()| out.flush());
            self.dirty = true;
        } else {
            self.line(&line);
        }
    }

    /// Rows per second over the last seconds.
    pub(crate) fn samples_per_second(&self) -> Option<f64> {
        self.samples_per_second
    }

    /// Shows what an evaluation gave.
    pub(crate) fn epoch(&mut self, end: &EpochEnd<'_>) {
        let (epochs, rest) = (end.step / self.steps_per_epoch, end.step % self.steps_per_epoch);
        if self.form == Form::Json {
            let line = json!({"kind": "epoch", "step": end.step, "epoch": epochs, "train_loss": end.train_loss,
                "val_loss": end.validation.map(StepSums::mean_loss),
                "val_accuracy": end.validation.map(StepSums::accuracy), "grad_norm": end.gradient_norm,
                "learning_rate": end.learning_rate, "workers": end.workers,
                "communication": end.communication, "seconds": end.seconds});
            return self.line(&line.to_string());
        }
        let name = if rest == 0 { format!("epoch {epochs:>3}") } else { format!("step {:>4}", end.step) };
        let mut line = format!("{name}  train {}", end.train_loss.map_or("–".into(), |l| format!("{l:.4}")));
        if let Some(sums) = end.validation {
            line += &format!("  val {:.4}", sums.mean_loss());
            line += &match self.task {
                Task::Chars => format!("  {:.3} bits/char", sums.mean_loss() / std::f64::consts::LN_2),
                Task::Rows => format!("  accuracy {:.2} %", 100.0 * sums.accuracy()),
            };
        }
        line += &format!(
            "  grad {:.3}  lr {}  {} workers  comm {:.0} %  {}",
            end.gradient_norm,
            end.learning_rate,
            end.workers,
            100.0 * end.communication,
            duration(end.seconds)
        );
        self.line(&line);
    }

    /// Shows what the network wrote at an epoch's end.
    pub(crate) fn sample(&mut self, step: u64, epoch: u64, text: &str) {
        if self.form == Form::Json {
            let line = json!({"kind": "sample", "step": step, "epoch": epoch, "text": text});
            return self.line(&line.to_string());
        }
        // What a terminal would obey is shown as something that it shows.
        let harmless = text.replace('\t', "    ").replace(|c: char| c.is_control() && c != '\n', "\u{fffd}");
        for line in harmless.trim_matches('\n').lines() {
            self.line(format!("  │ {line}").trim_end());
        }
    }

    /// Shows a sentence.
    pub(crate) fn notice(&mut self, sentence: &str) {
        if self.form == Form::Json {
            self.line(&json!({"kind": "notice", "text": sentence}).to_string());
        } else {
            self.line(sentence);
        }
    }

    /// Shows how the run ended: rows of what and where.
    pub(crate) fn summary(&mut self, outcome: &str, rows: &[(&str, String)]) {
        if self.form == Form::Json {
            let facts: serde_json::Map<_, _> =
                rows.iter().map(|(key, value)| ((*key).to_owned(), json!(value))).collect();
            return self.line(&json!({"kind": "end", "outcome": outcome, "facts": facts}).to_string());
        }
        self.line(outcome);
        let width = rows.iter().map(|(key, _)| key.chars().count()).max().unwrap_or(0);
        for (key, value) in rows {
            self.line(&format!("  {key:width$}  {value}"));
        }
    }

    fn line(&mut self, text: &str) {
        let wipe = if std::mem::take(&mut self.dirty) { "\r\x1b[2K" } else { "" };
        // A reader that closed the pipe has seen enough; the run goes on.
        let _ = writeln!(std::io::stdout(), "{wipe}{text}");
    }
}

/// Seconds for people: `0.8 s`, `12 s`, `3 min 20 s`, `2 h 5 min`.
pub(crate) fn duration(seconds: f64) -> String {
    let whole = seconds.max(0.0).round() as u64;
    match whole {
        0..10 => format!("{seconds:.1} s"),
        10..60 => format!("{whole} s"),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3600, whole / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_well() {
        let cases = [(0.84, "0.8 s"), (12.4, "12 s"), (200.0, "3 min 20 s"), (7500.0, "2 h 5 min")];
        for (seconds, text) in cases {
            assert_eq!(duration(seconds), text);
        }
    }
}
