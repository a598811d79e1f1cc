//! How far a state is.

use crate::store::state::StateImage;

/// Steps done, and whether the evaluation that belongs to the last one is done too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stage {
    /// Steps done.
    pub step: u64,
    /// Nothing that belongs to them is still due.
    pub whole: bool,
}

impl Stage {
    /// That of an image.
    pub fn of(image: &StateImage) -> Self {
        Self { step: image.progress().step, whole: image.is_whole() }
    }
}
