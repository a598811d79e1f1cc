//! Checkpoints of a run under way: when a state is asked for, when it may be written, and what came of it.

use failpoints::{Point, reach};
use protocol::message::{ToWorker, WorkerId};
use protocol::problem::Problem;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::Instant;

use super::Run;
use crate::records::CheckpointWriter;
use crate::stage::Stage;
use crate::store::journal::Record;

pub(super) type WrittenCheckpoint = Result<(Stage, String), Problem>;

impl Run {
    /// Asks the first member for its state at the next epoch's end, at the run's, or after so many steps as the job
    /// wants between two checkpoints, whichever comes first.
    pub(super) fn announce_checkpoint(&mut self) {
        let next = |interval: u64| (self.step / interval + 1) * interval;
        let run = &self.parts.file.run;
        self.announced = next(self.schedule.steps_per_epoch).min(self.schedule.total_steps);
        if run.checkpoint_steps > 0 {
            // States are only written where digests are compared.
            let compared = next(run.checkpoint_steps).checked_next_multiple_of(run.digest_steps.max(1));
            self.announced = self.announced.min(compared.unwrap_or(u64::MAX));
        }
        self.ask_state(self.announced);
    }

    pub(super) fn ask_state(&mut self, at_step: u64) {
        if let Some(&first) = self.members().first() {
            self.send(first, &ToWorker::SendState { at_step });
        }
    }

    /// A whole state has arrived.
    pub(super) fn hold_checkpoint(
        &mut self,
        from: WorkerId,
        step: u64,
        image: Vec<u8>,
    ) -> Result<(), Problem> {
        reach(Point::Checkpoint, step);
        self.checkpoint_asked = Instant::now();
        self.ending_goes_on();
        if let Some(ending) = &mut self.ending
            && ending.state_from == Some(from)
        {
            // Asked for when all that are left had stopped and their digests were compared. (Who was cut off inside an
            // evaluation has none.)
            ending.state_from = None;
            if ending.has_diverged {
                return self.write_suspect(from, image);
            }
            return self.write_checkpoint(image);
        }
        self.held = Some((step, image));
        self.write_agreed()
    }

    /// Hands the held state to the writer, if all members' digests of it agree or it has none.
    pub(super) fn write_agreed(&mut self) -> Result<(), Problem> {
        let (agreed, digest_steps) = (self.digests.agreed(), self.parts.file.run.digest_steps);
        let may_be_written = |step: u64| agreed >= step || !self.schedule.digests_after(step, digest_steps);
        match self.held.take_if(|(step, _)| may_be_written(*step)) {
            Some((_, image)) => self.write_checkpoint(image),
            None => Ok(()),
        }
    }

    pub(super) fn write_checkpoint(&mut self, image: Vec<u8>) -> Result<(), Problem> {
        self.writing += 1;
        self.images.send(image).map_err(|_| Problem::failed("the writer of checkpoints has ended"))
    }

    pub(super) fn checkpoint_written(&mut self, result: WrittenCheckpoint) -> Result<(), Problem> {
        self.writing -= 1;
        self.ending_goes_on();
        match result {
            Ok((stage, file)) => {
                self.parts.metrics.checkpoint(Some(stage.step));
                self.with_status(|status| status.checkpoint_step = Some(stage.step));
                self.parts.records.checkpoint_written(stage, file)?;
            }
            Err(problem) => {
                self.parts.metrics.checkpoint(None);
                let sentence = format!("the checkpoint was not written: {problem}");
                self.parts.screen.notice(&sentence);
                if self.ending.is_some() {
                    // Asking again would most likely meet the same obstacle.
                    self.distrust();
                    self.end(Err(problem));
                }
                self.parts.records.journal(&Record::Event { text: sentence })?;
            }
        }
        if self.ending.is_none() && self.writing == 0 && self.step >= self.announced {
            self.announce_checkpoint();
        }
        Ok(())
    }
}

/// Starts the thread that writes checkpoints, one after another; it ends when the sender is dropped.
pub(super) fn write_in_order(
    mut writer: CheckpointWriter,
) -> (std::sync::mpsc::Sender<Vec<u8>>, UnboundedReceiver<WrittenCheckpoint>) {
    let (images, to_write) = std::sync::mpsc::channel();
    let (written, checkpoints) = unbounded_channel();
    std::thread::spawn(move || {
        for image in to_write {
            if written.send(writer.write(image)).is_err() {
                break;
            }
        }
    });
    (images, checkpoints)
}
