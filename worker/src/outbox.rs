//! What the step loop tells the coordinator, and what it is asked meanwhile.
//!
//! The loop never waits for the network: messages go to a queue that the session empties, requests are left in a
//! place that the loop looks at after each step.

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use failpoints::{Point, reach};
use model::device::{Device, Result};
use protocol::activity::Phase;
use protocol::frame::{BULK_CHUNK_BYTES, BulkHeader, BulkKind, encode_bulk};
use protocol::message::{Generation, ToCoordinator};
use protocol::schedule::Schedule;
use tokio::sync::mpsc::UnboundedSender;

use crate::metrics::{Overhead, WorkerMetrics};
use crate::replica::Replica;
use crate::sums_exchange::Wish;
use crate::trace::Tracer;

/// What the session takes out of the queue.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "nearly all of them are messages, which a box would only allocate"
)]
pub enum Outgoing {
    /// A message.
    Message(ToCoordinator),
    /// Part of a state: the contents of a frame.
    Bulk(Bytes),
    /// From here on reports are of a generation that begins in the state after so many steps.
    Begin(u64),
}

/// What the coordinator asked for.
#[derive(Debug, Default)]
struct Requests {
    drain: bool,
    /// The last generation that is to pause.
    pause: Option<Generation>,
    /// Steps after which the state is to be streamed.
    states: Vec<u64>,
}

/// The sending end; clones share queue and requests.
#[derive(Clone)]
pub struct Outbox {
    queue: UnboundedSender<Outgoing>,
    requests: Arc<Mutex<Requests>>,
    metrics: WorkerMetrics,
    tracer: Tracer,
    schedule: Schedule,
    digest_steps: u64,
}

impl Outbox {
    /// An outbox with this queue; when digests are due is [`Schedule::digests_after`].
    pub fn new(
        queue: UnboundedSender<Outgoing>,
        metrics: WorkerMetrics,
        schedule: Schedule,
        digest_steps: u64,
    ) -> Self {
        let tracer = Tracer::new(metrics.data_plane());
        Self { queue, requests: Arc::default(), metrics, tracer, schedule, digest_steps }
    }

    /// Where the training thread writes down what it does.
    pub(crate) fn tracer(&self) -> &Tracer {
        &self.tracer
    }

    /// Queues a message. When the session has ended there is nobody left to tell, which the loop learns elsewhere.
    pub fn send(&self, message: ToCoordinator) {
        if let ToCoordinator::Step(report) = &message {
            self.metrics.step(report);
        }
        let _ = self.queue.send(Outgoing::Message(message));
    }

    /// Says that a step was left out because its numbers are not finite.
    pub fn non_finite(&self, step: u64, loss: f64, norm: f64) {
        let sentence = format!(
            "step {step} is not finite (loss {loss}, gradient norm {norm}); its update was not applied"
        );
        let hint = "start over with --fresh and a smaller learning_rate or another init; --set non_finite=skip leaves such steps out";
        // The same step has the same numbers wherever it is done.
        self.send(ToCoordinator::Failed { sentence, hint: Some(hint.to_owned()), is_final: true });
    }

    /// Counts time that training itself does not need.
    pub(crate) fn overhead(&self, part: Overhead, time: Duration) {
        self.metrics.overhead(part, time);
    }

    /// Steps that this worker has finished.
    pub(crate) fn steps_done(&self) -> u64 {
        self.metrics.steps_done()
    }

    /// Asks the loop to stop after the next step.
    pub fn request_drain(&self) {
        self.lock().drain = true;
    }

    /// Asks the loop to stop after the next step of this generation, for the next generation.
    pub fn request_pause(&self, generation: Generation) {
        self.lock().pause = Some(generation);
    }

    /// What was asked of this generation.
    pub fn wish(&self, generation: Generation) -> Wish {
        let requests = self.lock();
        match (requests.drain, requests.pause == Some(generation)) {
            (true, _) => Wish::Drain,
            (false, true) => Wish::Pause,
            (false, false) => Wish::GoOn,
        }
    }

    /// A generation begins in the state after `step` steps, with a profile of these. Forgets what was asked of the last one. A drain is asked of the
    /// worker, and stays.
    pub(crate) fn begin_generation(&self, generation: Generation, step: u64, profile: Range<u64>) {
        self.tracer.begin(generation, step, profile);
        let _ = self.queue.send(Outgoing::Begin(step));
        self.lock().pause = None;
        self.forget_states();
    }

    /// Forgets the states that were asked for: whoever did is gone.
    pub(crate) fn forget_states(&self) {
        self.lock().states.clear();
    }

    /// Asks the loop for the state after the first step that is at least this one and has a digest, if any has: a state that
    /// was not compared with the others' is written nowhere.
    pub fn request_state(&self, at_step: u64) {
        self.lock().states.push(at_step);
    }

    /// Does what is due after a whole step: digests and requested states.
    ///
    /// # Errors
    /// The device failed.
    pub fn after_step<D: Device>(
        &self,
        device: &D,
        replica: &Replica<D>,
        generation: Generation,
    ) -> Result<()> {
        let step = replica.progress.step;
        let is_compared = self.schedule.digests_after(step, self.digest_steps);
        if is_compared {
            self.tracer.enter(Phase::Snapshot, step);
            self.send_digest(device, replica, generation)?;
        }
        if !is_compared && self.digest_steps > 0 {
            return Ok(());
        }
        let due = {
            let mut requests = self.lock();
            let before = requests.states.len();
            requests.states.retain(|&at_step| at_step > step);
            requests.states.len() < before
        };
        if due {
            self.tracer.enter(Phase::Snapshot, step);
            self.send_state(device, replica, generation)?;
        }
        Ok(())
    }

    /// Queues the digest of the state.
    ///
    /// # Errors
    /// The device failed.
    pub fn send_digest<D: Device>(
        &self,
        device: &D,
        replica: &Replica<D>,
        generation: Generation,
    ) -> Result<()> {
        let started = Instant::now();
        let digest = replica.digest(device)?;
        self.overhead(Overhead::Digests, started.elapsed());
        self.send(ToCoordinator::Digest { generation, step: replica.progress.step, digest });
        Ok(())
    }

    /// Queues the whole state, in bulk frames.
    ///
    /// # Errors
    /// The device failed.
    pub fn send_state<D: Device>(
        &self,
        device: &D,
        replica: &Replica<D>,
        generation: Generation,
    ) -> Result<()> {
        let image = replica.image(device)?;
        let chunks = image.chunks(BULK_CHUNK_BYTES);
        let half = chunks.len() / 2;
        for (sequence, chunk) in chunks.enumerate() {
            if sequence == half {
                reach(Point::Checkpoint, replica.progress.step);
            }
            let header = BulkHeader {
                kind: BulkKind::State,
                generation,
                step: replica.progress.step,
                sequence: sequence as u32,
                tag: (sequence * BULK_CHUNK_BYTES) as u64,
            };
            let _ = self.queue.send(Outgoing::Bulk(encode_bulk(&header, chunk)));
        }
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Requests> {
        self.requests.lock().expect("no holder of this lock can panic")
    }
}
