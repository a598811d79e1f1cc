//! Ending a generation from outside, whatever its training thread waits for.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use crate::collective::AbortHandle;

/// Set once; wakes the thread in the mesh's forming or in the collective's waiting. Clones share it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Abort {
    flag: Arc<AtomicBool>,
    collective: Arc<Mutex<Option<AbortHandle>>>,
}

impl Abort {
    /// The flag that the forming mesh looks at.
    pub(crate) fn flag(&self) -> &AtomicBool {
        &self.flag
    }

    /// From now on an abort also ends this collective's waiting; at once if there was one already.
    pub(crate) fn attach(&self, handle: AbortHandle) {
        let mut collective = self.collective.lock().expect("no holder of this lock can panic");
        if self.flag.load(Ordering::Acquire) {
            handle.abort();
        }
        *collective = Some(handle);
    }

    /// Ends the generation.
    pub(crate) fn abort(&self) {
        let collective = self.collective.lock().expect("no holder of this lock can panic");
        self.flag.store(true, Ordering::Release);
        if let Some(handle) = &*collective {
            handle.abort();
        }
    }
}
