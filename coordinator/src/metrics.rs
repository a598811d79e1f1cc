//! The run's Prometheus metrics.

use std::time::{SystemTime, UNIX_EPOCH};

use prometheus::core::Collector;
use prometheus::{
    CounterVec, Encoder, Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry, TextEncoder,
};
use protocol::message::StepReport;
use protocol::sums::StepSums;

const VALID: &str = "metric names and labels are valid and distinct";

/// All series of the coordinator; clones share them. Every label set exists from the start, at 0.
#[derive(Clone)]
pub(crate) struct Metrics {
    registry: Registry,
    steps: IntCounter,
    samples: IntCounter,
    targets: IntCounter,
    skipped: IntCounter,
    phase_seconds: CounterVec,
    step_seconds: Histogram,
    train_loss: Gauge,
    validation_loss: Gauge,
    validation_accuracy: Gauge,
    gradient_norm: Gauge,
    learning_rate: Gauge,
    step: IntGauge,
    checkpoints: IntCounterVec,
    checkpoint_step: IntGauge,
    checkpoint_time: Gauge,
    records_waiting: IntGauge,
    workers: IntGaugeVec,
    generations: IntCounter,
}

impl Metrics {
    pub(crate) fn new(build: &str) -> Self {
        let registry = Registry::new();
        let counter = |name, help| register(&registry, IntCounter::new(name, help).expect(VALID));
        let gauge = |name, help| register(&registry, Gauge::new(name, help).expect(VALID));
        let int_gauge = |name, help| register(&registry, IntGauge::new(name, help).expect(VALID));
        let buckets = prometheus::exponential_buckets(0.001, 2.0, 14).expect(VALID);
        let metrics = Self {
            steps: counter("lockstep_steps_total", "Training steps finished since the coordinator's start."),
            samples: counter("lockstep_samples_total", "Rows of the batches of these steps."),
            targets: counter("lockstep_targets_total", "Predictions trained on in these steps."),
            skipped: counter(
                "lockstep_skipped_updates_total",
                "Steps left out because they were not finite, over the whole run.",
            ),
            phase_seconds: register(
                &registry,
                CounterVec::new(
                    Opts::new(
                        "lockstep_step_phase_seconds_total",
                        "Wall-clock time of the steps by phase, as the first worker to report saw it.",
                    ),
                    &["phase"],
                )
                .expect(VALID),
            ),
            step_seconds: register(
                &registry,
                Histogram::with_opts(
                    HistogramOpts::new("lockstep_step_duration_seconds", "Wall-clock time of a step.")
                        .buckets(buckets),
                )
                .expect(VALID),
            ),
            train_loss: gauge("lockstep_train_loss", "Mean training loss of the last step, in nats."),
            validation_loss: gauge("lockstep_validation_loss", "Mean loss of the last evaluation, in nats."),
            validation_accuracy: gauge(
                "lockstep_validation_accuracy_ratio",
                "Fraction of right predictions in the last evaluation.",
            ),
            gradient_norm: gauge(
                "lockstep_gradient_norm",
                "Norm of the last step's mean gradient before clipping by the global norm.",
            ),
            learning_rate: gauge("lockstep_learning_rate", "Learning rate of the last step."),
            step: int_gauge("lockstep_step", "Steps done over the whole run."),
            checkpoints: register(
                &registry,
                IntCounterVec::new(
                    Opts::new("lockstep_checkpoints_total", "Checkpoints by outcome."),
                    &["outcome"],
                )
                .expect(VALID),
            ),
            checkpoint_step: int_gauge("lockstep_checkpoint_step", "Steps done in the newest checkpoint."),
            checkpoint_time: gauge(
                "lockstep_checkpoint_timestamp_seconds",
                "When a checkpoint was last written since the coordinator's start; 0 before.",
            ),
            records_waiting: int_gauge(
                "lockstep_records_waiting",
                "1 while the disk takes no lines of journal and metrics file: they wait in memory.",
            ),
            workers: register(
                &registry,
                IntGaugeVec::new(Opts::new("lockstep_workers", "Connected workers by role."), &["role"])
                    .expect(VALID),
            ),
            generations: counter("lockstep_generations_total", "Generations formed."),
            registry,
        };
        let info = Opts::new("lockstep_build_info", "Always 1; the label says which build this is.");
        let info = register(&metrics.registry, IntGaugeVec::new(info, &["build"]).expect(VALID));
        info.with_label_values(&[build]).set(1);
        for phase in ["data", "compute", "reduce", "update"] {
            metrics.phase_seconds.with_label_values(&[phase]);
        }
        for outcome in ["written", "failed"] {
            metrics.checkpoints.with_label_values(&[outcome]);
        }
        // Not known yet, which is not 0.
        for unknown in [&metrics.train_loss, &metrics.validation_loss, &metrics.validation_accuracy] {
            unknown.set(f64::NAN);
        }
        metrics.set_workers(0, 0);
        #[cfg(target_os = "linux")]
        metrics
            .registry
            .register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))
            .expect(VALID);
        metrics
    }

    /// Counts the steps that were left out since the run's first start.
    pub(crate) fn skipped(&self, skipped_updates: u64) {
        self.skipped.inc_by(skipped_updates.saturating_sub(self.skipped.get()));
    }

    /// Counts a finished step.
    pub(crate) fn step(&self, report: &StepReport) {
        let (sums, seconds) = (&report.sums, report.seconds);
        self.steps.inc();
        self.samples.inc_by(sums.rows);
        self.targets.inc_by(sums.weight);
        self.skipped(report.control.skipped_updates);
        let phases = [
            ("data", seconds.data),
            ("compute", seconds.compute),
            ("reduce", seconds.reduce),
            ("update", seconds.update),
        ];
        for (phase, value) in phases {
            self.phase_seconds.with_label_values(&[phase]).inc_by(value);
        }
        self.step_seconds.observe(phases.iter().map(|(_, value)| value).sum());
        self.train_loss.set(sums.mean_loss());
        self.gradient_norm.set(report.gradient_norm);
        self.learning_rate.set(report.learning_rate);
        self.step.set(report.step as i64);
    }

    /// Shows an evaluation.
    pub(crate) fn evaluation(&self, sums: &StepSums) {
        self.validation_loss.set(sums.mean_loss());
        self.validation_accuracy.set(sums.accuracy());
    }

    /// Counts a checkpoint, written or not.
    pub(crate) fn checkpoint(&self, written_step: Option<u64>) {
        let outcome = if written_step.is_some() { "written" } else { "failed" };
        self.checkpoints.with_label_values(&[outcome]).inc();
        if let Some(step) = written_step {
            self.checkpoint_step.set(step as i64);
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            self.checkpoint_time.set(now.as_secs_f64());
        }
    }

    /// Shows whether records wait for the disk.
    pub(crate) fn set_records_waiting(&self, are_waiting: bool) {
        self.records_waiting.set(are_waiting.into());
    }

    /// Shows how many workers are connected.
    pub(crate) fn set_workers(&self, members: usize, standby: usize) {
        self.workers.with_label_values(&["member"]).set(members as i64);
        self.workers.with_label_values(&["standby"]).set(standby as i64);
    }

    /// Counts a generation.
    pub(crate) fn generation(&self) {
        self.generations.inc();
    }

    /// The text of `/metrics`.
    pub(crate) fn text(&self) -> String {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text).expect("writing to memory");
        String::from_utf8(text).expect("the exposition format is UTF-8")
    }
}

fn register<C: Collector + Clone + 'static>(registry: &Registry, collector: C) -> C {
    registry.register(Box::new(collector.clone())).expect(VALID);
    collector
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_series_exists_from_the_start() {
        let text = Metrics::new("0.1.0 (test)").text();
        for line in [
            "lockstep_samples_total 0",
            "lockstep_skipped_updates_total 0",
            "lockstep_step_phase_seconds_total{phase=\"reduce\"} 0",
            "lockstep_checkpoints_total{outcome=\"failed\"} 0",
            "lockstep_workers{role=\"standby\"} 0",
            "lockstep_build_info{build=\"0.1.0 (test)\"} 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is missing in\n{text}");
        }
    }
}
