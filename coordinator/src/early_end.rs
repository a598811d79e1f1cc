//! A run that its own control state ends before its schedule does: what the user is told.

use protocol::control::ControlState;
use protocol::job::JobSpec;
use protocol::layout::Progress;
use protocol::message::Stop;
use protocol::problem::{Exit, Problem};

use crate::screen::fixed;

/// Why a run has ended for good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct EarlyEnd {
    /// What happened, with the numbers that decided it.
    pub(crate) sentence: String,
    /// How to go on nevertheless.
    pub(crate) hint: &'static str,
    is_failure: bool,
}

impl EarlyEnd {
    /// What `stop` means for a run of this job that is in this state; `None` if it is no such end.
    pub(crate) fn of(stop: &Stop, job: &JobSpec, control: &ControlState, progress: Progress) -> Option<Self> {
        match stop {
            Stop::SkipLimit => Some(Self {
                sentence: format!(
                    "{} steps were left out because they were not finite, as many as skip_limit allows",
                    control.skipped_updates
                ),
                hint: "a new run may do better with a smaller learning_rate or clip_norm; this one is over",
                is_failure: true,
            }),
            Stop::Diverged => Some(Self {
                sentence: format!(
                    "the run has diverged: the mean loss of epoch {} is {}, more than {} times the first epoch's {}",
                    progress.epoch + u64::from(progress.cursor > 0),
                    control.epoch.mean_loss().map_or_else(String::new, |loss| fixed(loss, 4)),
                    job.divergence_factor,
                    fixed(control.first_epoch_loss, 4)
                ),
                hint: "start a new run with a smaller learning_rate, or with --set divergence_factor=0 if it is to go on \
                       whatever its loss; this one is over",
                is_failure: true,
            }),
            Stop::NoImprovement => Some(Self {
                sentence: no_improvement(control),
                hint: "a run's patience is fixed: a new run can have another, and begin here with --init-from",
                is_failure: false,
            }),
            Stop::Finished
            | Stop::Drained
            | Stop::Paused
            | Stop::Aborted
            | Stop::Broken(_)
            | Stop::NonFinite => None,
        }
    }

    /// How the run ends.
    pub(crate) fn result(&self) -> Result<Exit, Problem> {
        match self.is_failure {
            true => Err(Problem::for_good(self.sentence.clone()).hint(self.hint)),
            false => Ok(Exit::Done),
        }
    }
}

fn no_improvement(control: &ControlState) -> String {
    let epochs = epochs(control.epochs_without_improvement);
    match control.best_epoch() {
        0 => format!("the validation loss was not finite for {epochs}"),
        best => format!(
            "the validation loss has not become lower for {epochs}, the best was {} nats after epoch {best}",
            fixed(control.best_validation_loss, 4)
        ),
    }
}

/// So many epochs, in words.
pub(crate) fn epochs(count: u64) -> String {
    format!("{count} epoch{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use protocol::control::EpochSums;
    use protocol::job::JobFile;

    use super::*;

    #[test]
    fn each_end_names_the_numbers_that_decided_it() {
        let job = JobFile::resolve("char-lstm", None, &[]).unwrap().job;
        let control = ControlState {
            epoch: EpochSums { loss: 30.0, weight: 4, correct: 0 },
            first_epoch_loss: 2.25,
            best_validation_loss: 1.5,
            epochs_without_improvement: 2,
            evaluated_epochs: 5,
            skipped_updates: 100,
            ..ControlState::default()
        };
        let end = |stop, step| EarlyEnd::of(&stop, &job, &control, Progress::after(step, 10)).unwrap();
        let diverged = |epoch: u64| {
            format!(
                "the run has diverged: the mean loss of epoch {epoch} is 7.5000, more than 3 times the first epoch's \
                 2.2500"
            )
        };
        for (step, epoch) in [(20, 2), (21, 3), (29, 3), (30, 3)] {
            let problem = end(Stop::Diverged, step).result().unwrap_err();
            assert_eq!((problem.sentence, problem.exit), (diverged(epoch), Exit::Final));
            assert!(problem.hint.unwrap().contains("--set divergence_factor=0"));
        }
        let skipped = end(Stop::SkipLimit, 25);
        assert!(skipped.sentence.starts_with("100 steps were left out"), "{}", skipped.sentence);
        assert_eq!(skipped.result().unwrap_err().exit, Exit::Final);
        let stopped = end(Stop::NoImprovement, 50);
        assert_eq!(
            stopped.sentence,
            "the validation loss has not become lower for 2 epochs, the best was 1.5000 nats after epoch 3"
        );
        assert_eq!(stopped.result(), Ok(Exit::Done));
        assert_eq!(EarlyEnd::of(&Stop::Finished, &job, &control, Progress::default()), None);
    }

    #[test]
    fn a_run_without_any_finite_validation_loss_has_no_best_epoch() {
        let control =
            ControlState { evaluated_epochs: 1, epochs_without_improvement: 1, ..ControlState::default() };
        assert_eq!(no_improvement(&control), "the validation loss was not finite for 1 epoch");
    }
}
