//! The order of work of a run, as a pure function of its lengths. Coordinator and workers both follow it, so they
//! never need to agree about what comes next.
//!
//! A state "after step `n`" is the state when `n` steps are done *and* the evaluation that belongs to the n-th one,
//! if any, is done too. Checkpoints, drains and digests only ever see such states.

use bincode::{Decode, Encode};

/// One batch of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub enum Work {
    /// Train on batch `index` of `epoch`; afterwards `step + 1` steps are done.
    Train {
        /// Steps done before this one, from 0 over the whole run.
        step: u64,
        /// The pass over the data, from 0.
        epoch: u64,
        /// Position in the epoch, from 0.
        index: u64,
    },
    /// Evaluate batch `index` of the validation data; `step` steps are done.
    Evaluate {
        /// Steps done.
        step: u64,
        /// Position in the validation data, from 0.
        index: u64,
    },
}

/// The lengths of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Schedule {
    /// Steps of one pass over the training data, at least 1.
    pub steps_per_epoch: u64,
    /// Batches of the validation data; 0 when there is none.
    pub evaluation_batches: u64,
    /// Steps after which the run is done.
    pub total_steps: u64,
}

impl Schedule {
    /// The work that follows when `done` steps are done, in order, to the end of the run. It begins with the
    /// evaluation of these steps if that is still `owed`.
    pub fn after(self, done: u64, owed: bool) -> impl Iterator<Item = Work> {
        let due = if owed { done } else { 0 };
        self.evaluation(due).chain((done..self.total_steps).flat_map(move |step| {
            let (epoch, index) = self.position(step);
            let train = Work::Train { step, epoch, index };
            std::iter::once(train).chain(self.evaluation(step + 1))
        }))
    }

    /// This work and all that follows it.
    pub fn from(self, work: Work) -> impl Iterator<Item = Work> {
        let (done, owed, skipped) = match work {
            Work::Train { step, .. } => (step, false, 0),
            Work::Evaluate { step, index } => (step, true, index),
        };
        self.after(done, owed).skip(skipped as usize)
    }

    /// The evaluation that belongs to the state after `done` steps: at each epoch's end and at the run's end.
    pub fn evaluation(self, done: u64) -> impl Iterator<Item = Work> {
        let batches = if self.evaluates_after(done) { self.evaluation_batches } else { 0 };
        (0..batches).map(move |index| Work::Evaluate { step: done, index })
    }

    /// Epoch and position in it of the step that follows `done` steps, both from 0.
    pub fn position(self, done: u64) -> (u64, u64) {
        (done / self.steps_per_epoch, done % self.steps_per_epoch)
    }

    /// Whether the validation data is evaluated when `done` steps are done.
    pub fn evaluates_after(self, done: u64) -> bool {
        self.ends_epoch(done) || done == self.total_steps
    }

    /// Whether all workers send a digest of the state after `done` steps: at each multiple of `digest_steps`, if that
    /// is not 0, and wherever there is an evaluation. States are only written where digests are compared.
    pub fn digests_after(self, done: u64, digest_steps: u64) -> bool {
        (digest_steps > 0 && done.is_multiple_of(digest_steps)) || self.evaluates_after(done)
    }

    /// Whether `done` steps are whole epochs. Only then does an evaluation enter the control state, so that a run
    /// stopped in the middle of an epoch and continued later has the same state as one that never stopped.
    pub fn ends_epoch(self, done: u64) -> bool {
        done > 0 && done.is_multiple_of(self.steps_per_epoch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn evaluation_follows_each_epoch_and_the_end() {
        let schedule = Schedule { steps_per_epoch: 2, evaluation_batches: 1, total_steps: 5 };
        let work: Vec<String> = schedule
            .after(1, false)
            .map(|work| match work {
                Work::Train { step, epoch, index } => format!("t{step}:{epoch}.{index}"),
                Work::Evaluate { step, index } => format!("e{step}.{index}"),
            })
            .collect();
        assert_eq!(work.join(" "), "t1:0.1 e2.0 t2:1.0 t3:1.1 e4.0 t4:2.0 e5.0");
    }

    #[test]
    fn the_work_that_follows_can_be_taken_up_anywhere() {
        let schedule = Schedule { steps_per_epoch: 2, evaluation_batches: 3, total_steps: 5 };
        let all: Vec<Work> = schedule.after(0, false).collect();
        for (at, &work) in all.iter().enumerate() {
            assert_eq!(schedule.from(work).collect::<Vec<_>>(), all[at..], "from {work:?}");
        }
    }

    #[test]
    fn nothing_follows_the_end() {
        let schedule = Schedule { steps_per_epoch: 2, evaluation_batches: 1, total_steps: 5 };
        assert_eq!(schedule.after(5, false).count(), 0);
        assert_eq!(schedule.after(5, true).collect::<Vec<_>>(), [Work::Evaluate { step: 5, index: 0 }]);
        assert_eq!(schedule.after(4, true).next(), Some(Work::Evaluate { step: 4, index: 0 }));
        assert!(!schedule.ends_epoch(5) && schedule.evaluates_after(5));
    }
}
