//! Control state: the few numbers besides tensors that decide how a run goes on.
//!
//! They are part of the replicated state, of the digest and of the checkpoint, and change only by functions of the
//! reduced sums, so every worker and every resumed run takes the same branch.

use bincode::{Decode, Encode};

use crate::job::{JobSpec, NonFinite};
use crate::layout::Progress;
use crate::message::Stop;
use crate::sums::StepSums;

/// A running epoch has so many steps before its mean loss is held against the first epoch's.
const STEPS_TO_JUDGE: u64 = 50;

/// Numbers that decide about the rest of the run.
#[derive(Debug, Clone, Copy, PartialEq, Encode, Decode)]
pub struct ControlState {
    /// Summed loss, valid targets and correct targets of the running epoch's steps so far, without those that were
    /// left out; the finished epoch's until the next one begins.
    pub epoch: EpochSums,
    /// Mean training loss in nats of the first epoch, or of the first that had a step that was not left out; infinite
    /// before its end.
    pub first_epoch_loss: f64,
    /// Lowest mean validation loss of all epochs so far in nats; infinite before the first.
    pub best_validation_loss: f64,
    /// Epochs since [`best_validation_loss`](Self::best_validation_loss) was reached.
    pub epochs_without_improvement: u64,
    /// Evaluations at epochs' ends that were taken in. One fewer than the epochs done: the last one is still due.
    pub evaluated_epochs: u64,
    /// Factor on the job's learning rate; 1 until somebody changes it.
    pub learning_rate_scale: f64,
    /// Steps that were left out because their loss or gradient was not finite; 0 where such a step ends the run.
    pub skipped_updates: u64,
}

/// The part of [`StepSums`] that an epoch accumulates.
#[derive(Debug, Clone, Copy, PartialEq, Default, Encode, Decode)]
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

    /// Fraction of the targets that the network ranked first, `None` before the first step.
    pub fn accuracy(&self) -> Option<f64> {
        (self.weight > 0).then(|| self.correct as f64 / self.weight as f64)
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

    /// The learning rate where the job's is `of_job`, in its `[job]` or as it decays, after what has changed it.
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

    /// Takes in the step at position `index` of its epoch, of which there are the reduced sums and the norm of the mean
    /// gradient. One that is not finite is counted as left out.
    pub fn after_step(&mut self, index: u64, steps_per_epoch: u64, sums: &StepSums, gradient_norm: f64) {
        if index == 0 {
            self.epoch = EpochSums::default();
        }
        if sums.is_finite(gradient_norm) {
            self.epoch.loss += sums.loss;
            self.epoch.weight += sums.weight;
            self.epoch.correct += sums.correct;
        } else {
            self.skipped_updates += 1;
        }
        if self.first_epoch_loss.is_infinite() && index + 1 == steps_per_epoch {
            self.first_epoch_loss = self.epoch.mean_loss().unwrap_or(f64::INFINITY);
        }
    }

    /// Why a run of this job that is in this state, after whole steps, ends whatever its schedule says. It is a function
    /// of the state alone, so a run that has ended like this has ended for good.
    pub fn early_end(&self, job: &JobSpec, progress: Progress) -> Option<Stop> {
        let can_be_judged = progress.cursor == 0 || progress.cursor >= STEPS_TO_JUDGE;
        let most = job.divergence_factor * self.first_epoch_loss;
        let has_diverged = self.epoch.mean_loss().is_some_and(|loss| loss > most);
        if job.non_finite == NonFinite::Skip && self.skipped_updates >= job.skip_limit {
            Some(Stop::SkipLimit)
        } else if job.divergence_factor > 0.0 && can_be_judged && has_diverged {
            Some(Stop::Diverged)
        } else if job.patience > 0 && self.epochs_without_improvement >= job.patience {
            Some(Stop::NoImprovement)
        } else {
            None
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

    /// The epoch, from 1, with the lowest validation loss so far; 0 before there is one.
    pub fn best_epoch(&self) -> u64 {
        self.evaluated_epochs.saturating_sub(self.epochs_without_improvement)
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
    use crate::job::JobFile;

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

    fn sums(loss: f64) -> StepSums {
        StepSums { loss, weight: 2, non_finite: !loss.is_finite(), ..Default::default() }
    }

    fn job(settings: &[(&str, &str)]) -> JobSpec {
        let owned: Vec<_> =
            settings.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
        JobFile::resolve("char-lstm", None, &owned).unwrap().job
    }

    #[test]
    fn an_epoch_starts_from_zero_and_the_first_is_remembered() {
        let mut control = ControlState::default();
        control.after_step(0, 2, &sums(3.0), 1.0);
        control.after_step(1, 2, &sums(5.0), 1.0);
        assert_eq!(control.first_epoch_loss, 2.0);
        control.after_step(0, 2, &sums(1.0), 1.0);
        control.after_step(1, 2, &sums(1.0), 1.0);
        assert_eq!(control.epoch.mean_loss(), Some(0.5));
        assert_eq!((control.first_epoch_loss, control.skipped_updates), (2.0, 0));
    }

    #[test]
    fn a_step_that_is_not_finite_is_counted_and_leaves_no_trace_in_the_sums() {
        for (loss, norm) in
            [(f64::NAN, 1.0), (f64::INFINITY, f64::NAN), (3.0, f64::NAN), (3.0, f64::INFINITY)]
        {
            // The epoch's first step begins it anew, whether it is taken or not.
            let mut control = ControlState::default();
            control.after_step(0, 3, &sums(7.0), 1.0);
            control.after_step(0, 3, &sums(loss), norm);
            assert_eq!((control.epoch, control.skipped_updates), (EpochSums::default(), 1), "{loss} {norm}");
            control.after_step(1, 3, &sums(3.0), 1.0);
            control.after_step(2, 3, &sums(loss), norm);
            let expected = EpochSums { loss: 3.0, weight: 2, correct: 0 };
            assert_eq!((control.epoch, control.skipped_updates), (expected, 2), "{loss} {norm}");
            assert_eq!(control.first_epoch_loss, 1.5);
        }
        // An epoch of which nothing is left is no measure for the next ones.
        let mut control = ControlState::default();
        control.after_step(0, 1, &sums(f64::NAN), f64::NAN);
        assert_eq!(control.first_epoch_loss, f64::INFINITY);
        control.after_step(0, 1, &sums(4.0), 1.0);
        assert_eq!(control.first_epoch_loss, 2.0);
    }

    #[test]
    fn as_many_steps_are_left_out_as_the_job_allows() {
        let control = |skipped_updates| ControlState { skipped_updates, ..ControlState::default() };
        let job = job(&[("non_finite", "skip"), ("skip_limit", "3")]);
        let ends = [0, 2, 3, 4].map(|skipped| control(skipped).early_end(&job, Progress::after(9, 20)));
        assert_eq!(ends, [None, None, Some(Stop::SkipLimit), Some(Stop::SkipLimit)]);
    }

    #[test]
    fn an_epoch_that_is_much_worse_than_the_first_has_diverged() {
        let per_epoch = 60;
        let after = |step| Progress::after(step, per_epoch);
        let guarded = job(&[("divergence_factor", "1.5")]);
        let mut control = ControlState::default();
        for index in 0..per_epoch {
            control.after_step(index, per_epoch, &sums(if index < 55 { 9.0 } else { 1.0 }), 1.0);
            assert_eq!(control.early_end(&guarded, after(index + 1)), None, "the first epoch is the measure");
        }
        let first = control.first_epoch_loss;
        let worse = 2.0 * 1.51 * first;
        for index in 0..per_epoch {
            control.after_step(index, per_epoch, &sums(worse), 1.0);
            let end = (index + 1 >= 50).then_some(Stop::Diverged);
            assert_eq!(control.early_end(&guarded, after(per_epoch + index + 1)), end, "step {index}");
        }
        let unguarded = job(&[("divergence_factor", "0")]);
        assert_eq!(control.early_end(&unguarded, after(2 * per_epoch)), None);
        // It is the mean that counts, and it must exceed the limit.
        control.epoch = EpochSums { loss: 1.5 * first, weight: 1, correct: 0 };
        assert_eq!(control.early_end(&guarded, after(2 * per_epoch)), None);
        // Where an epoch has fewer steps, it is judged at its end.
        control.epoch = EpochSums { loss: 1.6 * first, weight: 1, correct: 0 };
        let ends = [1, 9, 10].map(|step| control.early_end(&guarded, Progress::after(step, 10)));
        assert_eq!(ends, [None, None, Some(Stop::Diverged)]);
    }

    #[test]
    fn patience_ends_a_run_that_no_longer_improves() {
        let (patient, endless) = (job(&[("patience", "2")]), job(&[]));
        let mut control = ControlState::default();
        let mut ends = Vec::new();
        for (loss, epoch) in [2.0, 1.0, 1.5, 0.5, 0.6, 0.5].into_iter().zip(1..) {
            control.after_epoch(&sums(loss));
            ends.push(control.early_end(&patient, Progress::after(4 * epoch, 4)));
            assert_eq!(control.early_end(&endless, Progress::after(4 * epoch, 4)), None);
        }
        assert_eq!(ends, [None, None, None, None, None, Some(Stop::NoImprovement)]);
        assert_eq!((control.best_epoch(), control.best_validation_loss), (4, 0.25));
        assert_eq!(ControlState::default().best_epoch(), 0);
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
