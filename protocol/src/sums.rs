//! What a step counts besides gradients, per shard and summed along the tree.

use bincode::{Decode, Encode};

use crate::random::mix64;
use crate::tree::{self, Addition};

/// The sums of one shard in one step, or of several shards added along the tree.
///
/// Sums, never means: the one division by [`weight`](Self::weight) happens after the tree.
#[derive(Debug, Clone, Copy, PartialEq, Default, Encode, Decode)]
pub struct StepSums {
    /// Summed loss in nats.
    pub loss: f64,
    /// Number of valid targets: what the loss and the gradient are divided by.
    pub weight: u64,
    /// Targets that the network ranked first.
    pub correct: u64,
    /// Rows handed to the kernel.
    pub rows: u64,
    /// Wrapping sum of [`row_hash`] over these rows: proves later which samples a step used.
    pub row_hash: u64,
    /// Whether a loss of these rows was infinite or not a number. (A gradient can be so behind a finite loss; its norm
    /// tells.)
    pub non_finite: bool,
}

impl StepSums {
    /// The sum of a left and a right operand of the tree. Only the loss rounds, so only its order matters.
    pub fn combine(self, right: Self) -> Self {
        Self {
            loss: self.loss + right.loss,
            weight: self.weight + right.weight,
            correct: self.correct + right.correct,
            rows: self.rows + right.rows,
            row_hash: self.row_hash.wrapping_add(right.row_hash),
            non_finite: self.non_finite | right.non_finite,
        }
    }

    /// The sums of all shards, added along the tree. `by_shard[s]` belongs to shard `s`.
    pub fn total(by_shard: &[Self]) -> Self {
        let mut places = by_shard.to_vec();
        for Addition { left, right } in tree::tree(by_shard.len() as u32) {
            places[left as usize] = places[left as usize].combine(places[right as usize]);
        }
        places.first().copied().unwrap_or_default()
    }

    /// Mean loss per valid target in nats; 0 when there was none.
    pub fn mean_loss(&self) -> f64 {
        if self.weight == 0 { 0.0 } else { self.loss / self.weight as f64 }
    }

    /// Whether a step with these sums and this norm of its mean gradient can be taken: nothing of it is infinite or not
    /// a number.
    pub fn is_finite(&self, gradient_norm: f64) -> bool {
        !self.non_finite && gradient_norm.is_finite()
    }

    /// Fraction of the targets that the network ranked first; 0 when there was none.
    pub fn accuracy(&self) -> f64 {
        if self.weight == 0 { 0.0 } else { self.correct as f64 / self.weight as f64 }
    }
}

/// What one row with this sample id adds to [`StepSums::row_hash`].
pub fn row_hash(sample_id: u64) -> u64 {
    mix64(sample_id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_total_adds_losses_along_the_tree() {
        let by_shard: Vec<StepSums> =
            [1e16, 1.0, 1.0, 1.0].map(|loss| StepSums { loss, weight: 1, ..Default::default() }).to_vec();
        // (1e16 + 1) + (1 + 1): the sequential sum would lose every one of the small addends.
        assert_eq!(StepSums::total(&by_shard).loss, 1e16 + 2.0);
        assert_eq!(StepSums::total(&by_shard).weight, 4);
        assert_eq!(StepSums::total(&[]), StepSums::default());
    }
}
