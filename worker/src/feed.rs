//! Batches on their way from the coordinator to the step loop.

use std::sync::mpsc::Receiver;

use failpoints::{Point, reach};
use protocol::activity::Phase;
use protocol::batch::Batch;
use protocol::message::{Generation, ToCoordinator};
use protocol::schedule::Work;

use crate::outbox::Outbox;

/// Batches that the coordinator may send ahead. Hides its latency; bounds the worker's memory.
pub const BATCHES_AHEAD: u32 = 8;

/// The connection to the coordinator ended, or a batch was not the next one.
#[derive(Debug, thiserror::Error)]
pub enum FeedClosed {
    /// No more batches come: the generation was aborted or the coordinator is gone.
    #[error("no more batches arrive from the coordinator")]
    Ended,
    /// The coordinator and this worker disagree about the order of work.
    #[error("batch {got:?} arrived, expected {expected:?}")]
    Unexpected {
        /// What arrived.
        got: Work,
        /// What the schedule says.
        expected: Work,
    },
}

/// The receiving end.
pub struct Feed {
    batches: Receiver<Batch>,
    generation: Generation,
    outbox: Outbox,
}

impl Feed {
    /// A feed of one generation; tells the coordinator that the whole window is free.
    pub fn new(batches: Receiver<Batch>, generation: Generation, outbox: Outbox) -> Self {
        outbox.send(ToCoordinator::Credit { generation, batches: BATCHES_AHEAD });
        Self { batches, generation, outbox }
    }

    /// Waits for the batch of this work and frees its place in the window.
    ///
    /// # Errors
    /// No more batches come, or another one than the schedule's next.
    pub fn next(&mut self, expected: Work) -> Result<Batch, FeedClosed> {
        let (Work::Train { step, .. } | Work::Evaluate { step, .. }) = expected;
        self.outbox.tracer().enter(Phase::Data, step);
        reach(Point::Feed, step);
        let batch = self.batches.recv().map_err(|_| FeedClosed::Ended)?;
        self.outbox.tracer().batch_taken();
        if batch.work != expected {
            return Err(FeedClosed::Unexpected { got: batch.work, expected });
        }
        self.outbox.send(ToCoordinator::Credit { generation: self.generation, batches: 1 });
        Ok(batch)
    }
}
