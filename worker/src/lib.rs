//! Lockstep worker.
