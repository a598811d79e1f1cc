//! Times and sums of the running epoch, as this process saw them.

use std::time::Instant;

use protocol::message::StepReport;
use protocol::sums::StepSums;

/// Started anew at each epoch, and at a resume in the middle of one.
#[derive(Debug)]
pub(crate) struct EpochClock {
    since: Instant,
    step_seconds: f64,
    reduce_seconds: f64,
    sums: StepSums,
}

impl EpochClock {
    pub(crate) fn new() -> Self {
        Self { since: Instant::now(), step_seconds: 0.0, reduce_seconds: 0.0, sums: StepSums::default() }
    }

    pub(crate) fn step(&mut self, report: &StepReport) {
        let seconds = report.seconds;
        self.step_seconds += seconds.data + seconds.compute + seconds.reduce + seconds.update;
        self.reduce_seconds += seconds.reduce;
        self.sums = self.sums.combine(report.sums);
    }

    /// Sums over the steps so far.
    pub(crate) fn sums(&self) -> &StepSums {
        &self.sums
    }

    /// Mean loss of the steps so far, if there was one.
    pub(crate) fn mean_loss(&self) -> Option<f64> {
        (self.sums.weight > 0).then(|| self.sums.mean_loss())
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
