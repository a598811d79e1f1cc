//! Batches to one member: in the order of the schedule, as far ahead as the member has granted.

use std::ops::Range;
use std::sync::Arc;

use failpoints::{Point, reach};
use protocol::frame::{BulkHeader, BulkKind, encode_bulk};
use protocol::message::Generation;
use protocol::schedule::{Schedule, Work};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use crate::data::Dataset;
use crate::server::Link;

/// Batches that a member may ask for at a time; workers ask for eight.
const MOST_BATCHES_AHEAD: usize = 64;

/// Feeds one member of a generation until it is dropped or the schedule ends.
pub(crate) struct Feeder {
    window: Arc<Semaphore>,
    task: JoinHandle<()>,
}

impl Feeder {
    /// Starts to feed this work and all that follows it.
    pub(crate) fn start(
        mut dataset: Box<dyn Dataset>,
        schedule: Schedule,
        first: Option<Work>,
        generation: Generation,
        shards: Range<u32>,
        link: Link,
    ) -> Self {
        let window = Arc::new(Semaphore::new(0));
        let credits = window.clone();
        let task = tokio::spawn(async move {
            for (sequence, work) in first.into_iter().flat_map(|work| schedule.from(work)).enumerate() {
                credits.acquire().await.expect("the window is never closed").forget();
                let payload = dataset.batch(work, shards.clone()).to_bytes();
                let (Work::Train { step, .. } | Work::Evaluate { step, .. }) = work;
                reach(Point::Feed, step);
                let header =
                    BulkHeader { kind: BulkKind::Batch, generation, step, sequence: sequence as u32, tag: 0 };
                link.send_frame(encode_bulk(&header, &payload));
            }
        });
        Self { window, task }
    }

    /// The member has room for this many more batches; how many that are at most, is not its to say.
    pub(crate) fn grant(&self, batches: u32) {
        let room = MOST_BATCHES_AHEAD.saturating_sub(self.window.available_permits());
        self.window.add_permits(room.min(batches as usize));
    }
}

impl Drop for Feeder {
    fn drop(&mut self) {
        self.task.abort();
    }
}
