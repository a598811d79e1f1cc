//! What members report: steps, evaluations and texts, each taken in once, into records, metrics and the screen; and how
//! long each member took, and for what.

use std::time::Duration;

use failpoints::{Point, reach};
use protocol::activity::Profile;
use protocol::control::ControlState;
use protocol::message::{StepReport, WorkerId};
use protocol::problem::Problem;
use protocol::sums::StepSums;
use tokio::time::Instant;

use super::Run;
use crate::epoch_clock::EpochClock;
use crate::membership::Event;
use crate::screen::EpochEnd;
use crate::store::journal::Record;
use crate::store::metrics_log::EpochLine;

/// Steps that are left out are shown at most this often.
const SKIP_NOTICE_INTERVAL: Duration = Duration::from_secs(1);

impl Run {
    /// Takes in what a worker has told for the profile, which is written when all members have.
    pub(super) fn profiled(&mut self, id: WorkerId, profile: Profile) {
        self.profile.take(id, self.name(id), profile, self.started.elapsed());
        if self.profile.is_ready(self.membership.members()) {
            self.write_profile();
        }
    }

    /// Writes what there is of the profile, if it is not written yet.
    pub(super) fn write_profile(&mut self) {
        let written = self.profile.write();
        if let Some(sentence) = written.unwrap_or_else(|problem| Some(problem.to_string())) {
            self.parts.screen.notice(&sentence);
        }
    }

    /// Takes in a step the first time it is reported; the reports of the other members say the same.
    pub(super) fn step_done(&mut self, report: StepReport) -> Result<(), Problem> {
        if !self.counts(report.generation) || report.step != self.step + 1 {
            return Ok(());
        }
        let (epoch, _) = self.schedule.position(self.step);
        // For people and in their files, passes over the data count from 1.
        let epoch = epoch + 1;
        self.step = report.step;
        self.control = report.control;
        self.epoch.step(&report);
        self.last_report = Some(report);
        self.parts.records.step(&report, epoch, self.members().len() as u32)?;
        self.parts.metrics.step(&report);
        self.parts.losses.step(report.step, report.sums.mean_loss());
        self.parts.screen.step(&report);
        if report.is_skipped() {
            self.step_skipped(&report)?;
        }
        let speed = self.parts.screen.samples_per_second();
        self.with_status(|status| {
            (status.step, status.epoch) = (report.step, epoch);
            status.train_loss = Some(report.sums.mean_loss()).filter(|loss| loss.is_finite());
            status.samples_per_second = speed;
        });
        let interval = Duration::from_secs(self.parts.file.run.checkpoint_seconds);
        if self.checkpoint_asked.elapsed() >= interval && self.writing == 0 && !self.arriving.is_under_way() {
            self.checkpoint_asked = Instant::now();
            let digest_steps = self.parts.file.run.digest_steps.max(1);
            self.ask_state((self.step + 1).next_multiple_of(digest_steps));
        }
        Ok(())
    }

    /// Takes in how long a member computed. At the end of a window, names those that are slower than the others; and the
    /// membership may deal shards anew.
    pub(super) fn compare_speed(&mut self, id: WorkerId, report: &StepReport) -> Result<(), Problem> {
        if report.generation != self.generation {
            return Ok(());
        }
        let Some(window) = self.paces.take(self.started.elapsed(), id, report.seconds.compute) else {
            return Ok(());
        };
        for straggler in self.stragglers.take(&window) {
            let text = straggler.sentence(&self.name(straggler.id), self.parts.file.fleet.balance);
            self.parts.screen.notice(&text);
            self.parts.records.journal(&Record::Event { text })?;
        }
        self.decide(Event::Paces(window))
    }

    /// Says that a step was left out: in the journal each time, on the screen no more often than anybody reads.
    pub(super) fn step_skipped(&mut self, report: &StepReport) -> Result<(), Problem> {
        let StepReport { step, sums, gradient_norm, .. } = report;
        let loss = sums.mean_loss();
        let text = format!(
            "step {step} was left out: it is not finite (loss {loss}, gradient norm {gradient_norm})"
        );
        if self.skip_shown.is_none_or(|shown| shown.elapsed() >= SKIP_NOTICE_INTERVAL) {
            self.skip_shown = Some(Instant::now());
            let (skipped, limit) = (self.control.skipped_updates, self.parts.file.job.skip_limit);
            self.parts.screen.notice(&format!("{text}; {skipped} so far, skip_limit is {limit}"));
        }
        self.parts.records.journal(&Record::Event { text })
    }

    /// Takes in an evaluation the first time it is reported.
    pub(super) fn evaluated(
        &mut self,
        step: u64,
        sums: &StepSums,
        control: ControlState,
    ) -> Result<(), Problem> {
        if step != self.step || self.evaluated_at == Some(step) {
            return Ok(());
        }
        (self.evaluated_at, self.validation) = (Some(step), Some(*sums));
        if self.schedule.ends_epoch(step) {
            reach(Point::EpochEnd, step);
        }
        self.control = control;
        let train_loss = self.control.epoch.mean_loss();
        let validation = (sums.weight > 0).then_some(sums);
        let (loss, accuracy) = (validation.map(StepSums::mean_loss), validation.map(StepSums::accuracy));
        let (seconds, communication) = (self.epoch.seconds(), self.epoch.communication());
        let (workers, samples_per_second) = (self.members().len(), self.epoch.rows() as f64 / seconds);
        let (learning_rate, gradient_norm) = self
            .last_report
            .map_or((f64::NAN, f64::NAN), |report| (report.learning_rate, report.gradient_norm));
        let line = self.schedule.ends_epoch(step).then(|| EpochLine {
            step,
            epoch: step / self.schedule.steps_per_epoch,
            train_loss: train_loss.unwrap_or(f64::NAN),
            train_accuracy: self.control.epoch.accuracy().unwrap_or(f64::NAN),
            val_loss: loss,
            val_accuracy: accuracy,
            learning_rate,
            samples_per_second,
            seconds,
            communication_share: communication,
            workers: workers as u32,
        });
        self.parts.records.evaluation(step, sums, line.clone())?;
        self.parts.metrics.evaluation(sums);
        self.parts.screen.epoch(&EpochEnd {
            step,
            train_loss,
            validation,
            gradient_norm,
            learning_rate,
            samples_per_second,
            workers,
            communication,
            seconds,
        });
        self.with_status(|status| (status.val_loss, status.val_accuracy) = (loss, accuracy));
        if let Some(line) = line {
            // A picture is not worth the run.
            if let Err(problem) = self.parts.losses.epoch(line) {
                self.parts.screen.notice(&problem.to_string());
            }
            self.epoch = EpochClock::new();
        }
        Ok(())
    }

    /// Takes in what the network wrote at an epoch's end. Faster members may have reported later steps meanwhile.
    pub(super) fn sampled(&mut self, step: u64, tokens: &[u32]) -> Result<(), Problem> {
        let Some(sample) = self.sample.as_ref().filter(|_| self.schedule.ends_epoch(step)) else {
            return Ok(());
        };
        let (epoch, text) = (step / self.schedule.steps_per_epoch, sample.text(tokens));
        if self.parts.records.sample(step, epoch, &text)? {
            self.parts.screen.sample(step, epoch, &text);
        }
        Ok(())
    }
}
