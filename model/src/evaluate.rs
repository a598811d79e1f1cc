//! The sums of a network over validation data, on one device: the bits that a fleet of any size computes in training.

use protocol::batch::Batch;
use protocol::layout::StateLayout;
use protocol::sums::StepSums;

use crate::device::{Device, Pass, Result};

/// Evaluates batches of all shards, which must be the validation data's in order, with these parameters `[P]`.
///
/// The recurrent state starts from zeros and is carried from batch to batch. Sums of shards are added along the tree,
/// those of batches one after another.
///
/// # Errors
/// The device failed.
pub fn evaluate<D: Device>(
    device: &mut D,
    layout: &StateLayout,
    parameters: &D::Buffer,
    batches: impl Iterator<Item = Batch>,
) -> Result<StepSums> {
    let mut state = device.zeros(layout.recurrent())?;
    let mut next_state = device.zeros(layout.recurrent())?;
    let mut sums = StepSums::default();
    for batch in batches {
        device.step(Pass::Evaluate, parameters, &batch, &state, &mut next_state)?;
        std::mem::swap(&mut state, &mut next_state);
        sums = sums.combine(StepSums::total(device.read_sums()?));
    }
    Ok(sums)
}
