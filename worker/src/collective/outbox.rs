//! What is on its way to one peer.
//!
//! Whoever has a frame writes it, as far as the socket takes it without waiting: in most cases all of it, and no other
//! thread has to wake up. What the socket does not take is queued for a thread of its own, the only one that ever waits
//! for a peer to read. The queue has no bound; a step's operations are the bound.

use std::collections::VecDeque;
use std::io;
use std::sync::{Condvar, Mutex, PoisonError};

use transport::DataStream;

use super::lock;
use super::wire::{Outgoing, Payload};

/// The frames that one peer is still to get, in the order in which they were sent.
pub(super) struct Outbox {
    pub(super) stream: DataStream,
    queue: Mutex<Queue>,
    /// Notified when the writing thread has something to do.
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    frames: VecDeque<(Outgoing, Payload)>,
    /// Whether the writing thread is in the middle of a frame.
    is_writing: bool,
    is_closed: bool,
}

impl Outbox {
    pub(super) fn new(stream: DataStream) -> Self {
        Self { stream, queue: Mutex::default(), changed: Condvar::new() }
    }

    /// Writes a frame or queues it, without waiting. `keep` gives the payload to keep if the socket did not take all of
    /// it. Gives the frame's bytes if it did.
    pub(super) fn send(
        &self,
        mut frame: Outgoing,
        payload: &[u8],
        keep: impl FnOnce() -> Payload,
    ) -> io::Result<Option<usize>> {
        let mut queue = lock(&self.queue);
        let is_first = queue.frames.is_empty() && !queue.is_writing;
        if is_first && frame.send(payload, &self.stream, false)? {
            return Ok(Some(frame.sent()));
        }
        queue.frames.push_back((frame, keep()));
        self.changed.notify_one();
        Ok(None)
    }

    /// Lets the writing thread end after what is queued.
    pub(super) fn close(&self) {
        lock(&self.queue).is_closed = true;
        self.changed.notify_one();
    }

    /// The writing thread: writes what is queued, until the outbox is closed. `done` gets the bytes of each frame and
    /// its payload.
    pub(super) fn write_queued(&self, mut done: impl FnMut(usize, Payload)) -> io::Result<()> {
        let mut queue = lock(&self.queue);
        loop {
            if let Some((mut frame, payload)) = queue.frames.pop_front() {
                queue.is_writing = true;
                drop(queue);
                frame.send(payload.as_bytes(), &self.stream, true)?;
                done(frame.sent(), payload);
                queue = lock(&self.queue);
                queue.is_writing = false;
            } else if queue.is_closed {
                return Ok(());
            } else {
                queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}
