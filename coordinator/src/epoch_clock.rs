//! Times and sums of the running epoch.

use std::time::Instant;

use protocol::control::EpochSums;
use protocol::message::StepReport;

/// Started anew when an epoch's evaluation is done, and at a resume, there with the sums of the steps before it.
#[derive(Debug)]
pub(crate) struct EpochClock {
    since: Instant,
    step_seconds: f64,
    reduce_seconds: f64,
    rows: u64,
    sums: EpochSums,
}

impl EpochClock {
    pub(crate) fn new(sums: EpochSums) -> Self {
        Self { since: Instant::now(), step_seconds: 0.0, reduce_seconds: 0.0, rows: 0, sums }
    }

    pub(crate) fn step(&mut self, report: &StepReport) {
        let seconds = report.seconds;
        self.step_seconds += seconds.data + seconds.compute + seconds.reduce + seconds.update;
        self.reduce_seconds += seconds.reduce;
        self.rows += report.sums.rows;
        self.sums.loss += report.sums.loss;
        self.sums.weight += report.sums.weight;
        self.sums.correct += report.sums.correct;
    }

    /// Rows trained on since its start.
    pub(crate) fn rows(&self) -> u64 {
        self.rows
    }

    /// Mean loss of the epoch's steps so far, if there was one.
    pub(crate) fn mean_loss(&self) -> Option<f64> {
        self.sums.mean_loss()
    }

    /// Fraction of the epoch's targets so far that the network ranked first, if there was one.
    pub(crate) fn accuracy(&self) -> Option<f64> {
        (self.sums.weight > 0).then(|| self.sums.correct as f64 / self.sums.weight as f64)
    }

    /// Wall-clock time since its start.
    pub(crate) fn seconds(&self) -> f64 {
        self.since.elapsed().as_secs_f64()
    }

    /// Part of the step time that was spent waiting for the collective.
    pub(crate) fn communication(&self) -> f64 {
        if self.step_seconds > 0.0 { self.reduce_seconds / self.step_seconds } else { 0.0 }
    }
}
