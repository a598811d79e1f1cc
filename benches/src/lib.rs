//! Lockstep benches.
