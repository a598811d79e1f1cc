//! The end of a run whose replicas are no longer replicas: none of their states is gone on with, and some are written for
//! whoever looks for the cause.

use std::collections::VecDeque;

use protocol::message::{ToWorker, WorkerId};
use protocol::problem::Problem;

use super::Run;
use crate::store::diverged;

/// States that are written at most.
const STATES: usize = 4;

impl Run {
    /// Stops the run. All stop after the same step, so that their states can be compared; one of those that agree, if any
    /// do, and those that parted are asked for theirs.
    pub(super) fn replicas_differ(&mut self, step: u64, parted: &[WorkerId]) {
        if self.ending.as_ref().is_some_and(|ending| ending.has_diverged) {
            return;
        }
        let names: Vec<String> = parted.iter().map(|&id| self.name(id)).collect();
        let problem = Problem::failed(format!(
            "the replicas differ after step {step}: {} computed another state than the rest; their states are in {}",
            names.join(" and "),
            self.parts.records.dir.path().join(diverged::FOLDER).display()
        ));
        let hint = "check the memory of these machines; `lockstep diff` compares two of these files; the same command goes on from the newest checkpoint";
        let agrees = self.members().iter().copied().find(|id| !parted.contains(id));
        let suspects: VecDeque<_> = agrees.into_iter().chain(parted.iter().copied()).take(STATES).collect();
        self.send_all(&ToWorker::Drain);
        self.end(Err(problem.hint(hint)));
        self.distrust();
        if let Some(ending) = &mut self.ending {
            (ending.has_diverged, ending.suspects) = (true, suspects);
        }
    }

    /// The next of these that has stopped with a state, to be asked for it.
    pub(super) fn next_suspect(&mut self) -> Option<(WorkerId, u64)> {
        let ending = self.ending.as_mut()?;
        while let Some(id) = ending.suspects.pop_front() {
            if let Some(Some(stage)) = self.stopped.get(&id) {
                return Some((id, stage.step));
            }
        }
        None
    }

    /// Writes a state that was asked for.
    pub(super) fn write_suspect(&mut self, from: WorkerId, image: Vec<u8>) -> Result<(), Problem> {
        let name = self.name(from);
        let sentence = match self.parts.records.diverged(image, (from, &name)) {
            Ok(path) => format!("the state of worker {name} is in {}", path.display()),
            // The run fails with the sentence that matters.
            Err(problem) => format!("the state of worker {name} was not written: {problem}"),
        };
        self.parts.screen.notice(&sentence);
        Ok(())
    }
}
