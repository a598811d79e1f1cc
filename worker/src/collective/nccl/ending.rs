//! A communicator that can be aborted from any thread, without making that thread wait.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle};

use kernels::nccl::Communicator;

use super::super::lock;

/// A communicator and, once it was told to abort, the thread on which it does.
pub(super) struct Ending<C> {
    communicator: C,
    is_ending: AtomicBool,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl<C: Communicator> Ending<C> {
    pub(super) fn new(communicator: C) -> Self {
        Self { communicator, is_ending: AtomicBool::new(false), thread: Mutex::default() }
    }

    pub(super) fn get(&self) -> &C {
        &self.communicator
    }

    /// Whether it was told to abort.
    pub(super) fn is_ending(&self) -> bool {
        self.is_ending.load(Ordering::Acquire)
    }

    /// Aborts it, beside whatever runs; once.
    pub(super) fn abort(self: &Arc<Self>) {
        let mut thread = lock(&self.thread);
        if self.is_ending.swap(true, Ordering::AcqRel) {
            return;
        }
        let this = self.clone();
        match Builder::new().name("nccl-abort".to_owned()).spawn(move || this.communicator.abort()) {
            Ok(started) => *thread = Some(started),
            Err(_) => self.communicator.abort(),
        }
    }

    /// Waits until the abort is done, if there is one.
    pub(super) fn wait(&self) {
        let thread = lock(&self.thread).take();
        if let Some(thread) = thread {
            // One that panicked has said so on stderr.
            let _ = thread.join();
        }
    }
}
