//! The worker's own Prometheus metrics.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use prometheus::{Counter, CounterVec, Encoder, IntCounter, IntGauge, Opts, Registry, TextEncoder};
use protocol::message::StepReport;
use protocol::problem::Problem;

use crate::collective::tcp::DataPlaneBytes;

/// What lets a run outlive its workers, and takes time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Overhead {
    /// Digesting the state.
    Digests,
    /// Giving every worker everybody's recurrent state.
    RecurrentState,
    /// Saying what the training thread does; beside it, on another thread.
    SignsOfLife,
}

impl Overhead {
    fn name(self) -> &'static str {
        match self {
            Self::Digests => "digests",
            Self::RecurrentState => "recurrent_state",
            Self::SignsOfLife => "signs_of_life",
        }
    }
}

/// Counters of one worker; clones share them. Every series exists from the start, at 0.
#[derive(Clone)]
pub struct WorkerMetrics {
    registry: Registry,
    steps: IntCounter,
    samples: IntCounter,
    seconds: CounterVec,
    overhead: CounterVec,
    sent: Counter,
    received: Counter,
    shards: IntGauge,
    bytes: Arc<DataPlaneBytes>,
}

impl WorkerMetrics {
    /// A registry with all series at 0.
    pub fn new() -> Self {
        let registry = Registry::new();
        let steps = IntCounter::new("lockstep_worker_steps_total", "Steps this worker finished.");
        let samples =
            IntCounter::new("lockstep_worker_samples_total", "Rows of the global batch in these steps.");
        let seconds = CounterVec::new(
            Opts::new(
                "lockstep_worker_phase_seconds_total",
                "Wall-clock time of this worker's steps by phase.",
            ),
            &["phase"],
        );
        let overhead = CounterVec::new(
            Opts::new(
                "lockstep_worker_overhead_seconds_total",
                "Wall-clock time that this worker spent on what lets a run outlive its workers, by part.",
            ),
            &["part"],
        );
        let sent = Counter::new("lockstep_worker_sent_bytes_total", "Bytes sent to other workers.");
        let received =
            Counter::new("lockstep_worker_received_bytes_total", "Bytes received from other workers.");
        let shards = IntGauge::new("lockstep_worker_shards", "Shards this worker holds.");
        let valid = "the names and labels are valid and distinct";
        let metrics = Self {
            registry,
            steps: steps.expect(valid),
            samples: samples.expect(valid),
            seconds: seconds.expect(valid),
            overhead: overhead.expect(valid),
            sent: sent.expect(valid),
            received: received.expect(valid),
            shards: shards.expect(valid),
            bytes: Arc::default(),
        };
        for phase in ["data", "compute", "reduce", "update"] {
            metrics.seconds.with_label_values(&[phase]);
        }
        for part in [Overhead::Digests, Overhead::RecurrentState, Overhead::SignsOfLife] {
            metrics.overhead.with_label_values(&[part.name()]);
        }
        let collectors: [Box<dyn prometheus::core::Collector>; 7] = [
            Box::new(metrics.overhead.clone()),
            Box::new(metrics.steps.clone()),
            Box::new(metrics.samples.clone()),
            Box::new(metrics.seconds.clone()),
            Box::new(metrics.sent.clone()),
            Box::new(metrics.received.clone()),
            Box::new(metrics.shards.clone()),
        ];
        for collector in collectors {
            metrics.registry.register(collector).expect(valid);
        }
        #[cfg(target_os = "linux")]
        metrics
            .registry
            .register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))
            .expect(valid);
        metrics
    }

    /// The counters that the collective adds to.
    pub fn data_plane(&self) -> Arc<DataPlaneBytes> {
        self.bytes.clone()
    }

    /// Counts a finished step.
    pub fn step(&self, report: &StepReport) {
        self.steps.inc();
        self.samples.inc_by(report.sums.rows);
        let seconds = report.seconds;
        for (phase, value) in [
            ("data", seconds.data),
            ("compute", seconds.compute),
            ("reduce", seconds.reduce),
            ("update", seconds.update),
        ] {
            self.seconds.with_label_values(&[phase]).inc_by(value);
        }
    }

    /// Counts time that training itself does not need.
    pub(crate) fn overhead(&self, part: Overhead, time: Duration) {
        self.overhead.with_label_values(&[part.name()]).inc_by(time.as_secs_f64());
    }

    /// Steps that this worker has finished.
    pub(crate) fn steps_done(&self) -> u64 {
        self.steps.get()
    }

    /// Says how many shards the worker holds.
    pub fn shards(&self, count: usize) {
        self.shards.set(count as i64);
    }

    /// The text of `/metrics`.
    pub fn text(&self) -> String {
        for (counter, bytes) in [(&self.sent, self.bytes.sent()), (&self.received, self.bytes.received())] {
            counter.inc_by((bytes as f64 - counter.get()).max(0.0));
        }
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text).expect("writing to memory");
        String::from_utf8(text).expect("the exposition format is UTF-8")
    }
}

impl Default for WorkerMetrics {
    fn default() -> Self {
        Self::new()
    }
}

/// Serves `/metrics` at this address from now on; gives the address with the port that was bound.
///
/// # Errors
/// The address cannot be listened on.
pub async fn serve(address: SocketAddr, metrics: WorkerMetrics) -> Result<SocketAddr, Problem> {
    let refused = |e: std::io::Error| {
        Problem::failed(format!("cannot serve metrics on {address}: {e}"))
            .hint("choose another address with --metrics, or port 0 for any free one")
    };
    let listener = tokio::net::TcpListener::bind(address).await.map_err(refused)?;
    let bound = listener.local_addr().map_err(refused)?;
    let text = move || {
        let metrics = metrics.clone();
        async move { ([("content-type", prometheus::TEXT_FORMAT)], metrics.text()) }
    };
    let routes = axum::Router::new().route("/metrics", axum::routing::get(text));
    tokio::spawn(async move {
        let _ = axum::serve(listener, routes).await;
    });
    Ok(bound)
}
