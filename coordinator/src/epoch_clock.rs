//! Times of the running epoch.

use std::time::Instant;

use protocol::message::StepReport;

/// Started anew when an epoch's evaluation is done, and at a resume.
#[derive(Debug)]
pub(crate) struct EpochClock {
    since: Instant,
    step_seconds: f64,
    reduce_seconds: f64,
    rows: u64,
}

impl EpochClock {
    pub(crate) fn new() -> Self {
        Self { since: Instant::now(), step_seconds: 0.0, reduce_seconds: 0.0, rows: 0 }
    }

    pub(crate) fn step(&mut self, report: &StepReport) {
        let seconds = report.seconds;
        self.step_seconds += seconds.data + seconds.compute + seconds.reduce + seconds.update;
        self.reduce_seconds += seconds.reduce;
        self.rows += report.sums.rows;
    }

    /// Rows trained on since its start.
    pub(crate) fn rows(&self) -> u64 {
        self.rows
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
