//! Control state: the few numbers besides tensors that decide how a run goes on.
//!
//! They are part of the replicated state, of the digest and of the checkpoint, and change only by functions of the
//! reduced sums, so every worker and every resumed run takes the same branch.

use crate::sums::StepSums;

/// Numbers that decide about the rest of the run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ControlState {
    /// Summed loss, valid targets and correct targets of the running epoch's steps so far; the finished epoch's
    /// until the next one begins.
    pub epoch: EpochSums,
    /// Mean training loss of the first epoch in nats; infinite before its end.
    pub first_epoch_loss: f64,
    /// Lowest mean validation loss of all epochs so far in nats; infinite before the first.
    pub best_validation_loss: f64,
    /// Epochs since [`best_validation_loss`](Self::best_validation_loss) was reached.
    pub epochs_without_improvement: u64,
    /// Evaluations at epochs' ends that were taken in. One fewer than the epochs done: the last one is still due.
    pub evaluated_epochs: u64,
    /// Factor on the job's learning rate; 1 until somebody changes it.
    pub learning_rate_scale: f64,
    /// Steps whose update was left out because the gradient was not finite; 0 while such a step ends the run.
    pub skipped_updates: u64,
}

/// The part of [`StepSums`] that an epoch accumulates.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct EpochSums {
    /// Summed loss in nats.
    pub loss: f64,
    /// Valid targets.
    pub weight: u64,
    /// Correct targets.
    pub correct: u64,
}

impl EpochSums {
    /// Mean loss per valid target in nats, `None` before the first step.
    pub fn mean_loss(&self) -> Option<f64> {
        (self.weight > 0).then(|| self.loss / self.weight as f64)
    }
}

impl Default for ControlState {
    fn default() -> Self {
        Self {
            epoch: EpochSums::default(),
            first_epoch_loss: f64::INFINITY,
            best_validation_loss: f64::INFINITY,
            epochs_without_improvement: 0,
            evaluated_epochs: 0,
            learning_rate_scale: 1.0,
            skipped_updates: 0,
        }
    }
}

impl ControlState {
    /// Whether the evaluation of the last of `epochs` whole epochs is still due: the state is that of a run that was
    /// cut off between an epoch's last step and the end of its evaluation.
    pub fn owes_evaluation(&self, epochs: u64) -> bool {
        self.evaluated_epochs < epochs
    }

    /// The learning rate of a job with this one in its `[job]`, after what has changed it.
    pub fn learning_rate(&self, of_job: f64) -> f64 {
        of_job * self.learning_rate_scale
    }

    /// Makes [`learning_rate`](Self::learning_rate) of the job `wanted`; to the last bit, where some factor does.
    pub fn change_learning_rate(&mut self, of_job: f64, wanted: f64) {
        let quotient = wanted / of_job;
        let near = [quotient, quotient.next_up(), quotient.next_down()];
        let exact = near.into_iter().find(|factor| of_job * factor == wanted);
        self.learning_rate_scale = exact.unwrap_or(quotient);
    }

    /// Size of [`to_bytes`](Self::to_bytes).
    pub const BYTES: usize = 9 * 8;

    /// Takes in the reduced sums of the step at position `index` of `epoch`.
    pub fn after_step(&mut self, epoch: u64, index: u64, steps_per_epoch: u64, sums: &StepSums) {
        if index == 0 {
            self.epoch = EpochSums::default();
        }
        self.epoch.loss += sums.loss;
        self.epoch.weight += sums.weight;
        self.epoch.correct += sums.correct;
        if epoch == 0 && index + 1 == steps_per_epoch {
            self.first_epoch_loss = self.epoch.mean_loss().unwrap_or(f64::INFINITY);
        }
    }

    /// Takes in an evaluation at the end of an epoch. Without validation data there is nothing to wait to improve.
    pub fn after_epoch(&mut self, validation: &StepSums) {
        self.evaluated_epochs += 1;
        if validation.weight == 0 {
            return;
        }
        if validation.mean_loss() < self.best_validation_loss {
            self.best_validation_loss = validation.mean_loss();
            self.epochs_without_improvement = 0;
        } else {
            self.epochs_without_improvement += 1;
        }
    }

    /// Nine little-endian 64-bit words in the order of the fields.
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let words = [
            self.epoch.loss.to_bits(),
            self.epoch.weight,
            self.epoch.correct,
            self.first_epoch_loss.to_bits(),
            self.best_validation_loss.to_bits(),
            self.epochs_without_improvement,
            self.evaluated_epochs,
            self.learning_rate_scale.to_bits(),
            self.skipped_updates,
        ];
        let mut bytes = [0; Self::BYTES];
        for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// The inverse of [`to_bytes`](Self::to_bytes).
    pub fn from_bytes(bytes: &[u8; Self::BYTES]) -> Self {
        let word = |i: usize| u64::from_le_bytes(std::array::from_fn(|b| bytes[8 * i + b]));
        let real = |i| f64::from_bits(word(i));
        Self {
            epoch: EpochSums { loss: real(0), weight: word(1), correct: word(2) },
            first_epoch_loss: real(3),
            best_validation_loss: real(4),
            epochs_without_improvement: word(5),
            evaluated_epochs: word(6),
            learning_rate_scale: real(7),
            skipped_updates: word(8),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back() {
        let control = ControlState {
            epoch: EpochSums { loss: 1.5, weight: 2, correct: 3 },
            first_epoch_loss: 4.5,
            best_validation_loss: f64::INFINITY,
            epochs_without_improvement: 6,
            evaluated_epochs: 7,
            learning_rate_scale: 0.5,
            skipped_updates: 8,
        };
        assert_eq!(ControlState::from_bytes(&control.to_bytes()), control);
    }

    #[test]
    fn an_epoch_starts_from_zero_and_the_first_is_remembered() {
        let mut control = ControlState::default();
        let sums = |loss| StepSums { loss, weight: 2, ..Default::default() };
        control.after_step(0, 0, 2, &sums(3.0));
        control.after_step(0, 1, 2, &sums(5.0));
        assert_eq!(control.first_epoch_loss, 2.0);
        control.after_step(1, 0, 2, &sums(1.0));
        assert_eq!(control.epoch.mean_loss(), Some(0.5));
        assert_eq!(control.first_epoch_loss, 2.0);
    }

    #[test]
    fn a_changed_learning_rate_is_the_one_asked_for() {
        let mut control = ControlState::default();
        for wanted in [0.0005, 0.0003, 1e-5, 0.7, 0.001] {
            control.change_learning_rate(0.001, wanted);
            assert_eq!(control.learning_rate(0.001), wanted);
        }
        assert_eq!(control, ControlState::default());
    }

    #[test]
    fn patience_counts_epochs_since_the_best() {
        let mut control = ControlState::default();
        for (loss, since) in [(2.0, 0), (1.0, 0), (1.0, 1), (1.5, 2), (0.5, 0)] {
            control.after_epoch(&StepSums { loss, weight: 1, ..Default::default() });
            assert_eq!(control.epochs_without_improvement, since);
        }
        control.after_epoch(&StepSums { loss: f64::NAN, weight: 1, ..Default::default() });
        assert_eq!((control.best_validation_loss, control.epochs_without_improvement), (0.5, 1));
        control.after_epoch(&StepSums::default());
        assert_eq!((control.epochs_without_improvement, control.evaluated_epochs), (1, 7));
    }
}
