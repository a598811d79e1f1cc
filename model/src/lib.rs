//! Lockstep model.
