//! Workers that have lost a coordinator and come back: what they hold is of use, and how they go on.

use protocol::message::{Generation, Held, Hello, Holding, WorkerId};
use protocol::problem::Problem;

use super::Run;
use crate::feeder::Feeder;
use crate::membership::Holds;
use crate::stage::Stage;
use crate::store::journal::Record;

impl Run {
    /// What a worker holds that the run can go on with. It must be able to tell of all steps that are not on record: a
    /// machine that went down may have lost the last lines of journal and metrics.
    pub(super) fn use_of(&self, hello: &Hello) -> Holds {
        let Some(held) = &hello.held else { return Holds::Nothing };
        let is_usable = self.is_usable(held, &hello.bits);
        match &held.holding {
            Holding::Place { rank, shards, .. }
                if is_usable
                    && held.generation == self.generation
                    && self.places.get(*rank as usize) == Some(shards) =>
            {
                Holds::Place(*rank)
            }
            Holding::State(state) if is_usable => {
                Holds::State(Stage { step: state.step, whole: !state.owes_evaluation })
            }
            Holding::Place { .. } | Holding::State(_) => Holds::Nothing,
        }
    }

    fn is_usable(&self, held: &Held, bits: &str) -> bool {
        held.run_id == self.parts.records.run_id
            && self.counts(held.generation)
            && self.parts.records.last_bits().is_none_or(|recorded| recorded == bits)
            && held.reports_from <= self.wholly_on_record() + 1
    }

    /// Whether the run could go on with the state of a worker that is no member and had a place when it came back.
    pub(super) fn can_rejoin(&self, id: WorkerId) -> bool {
        let Some((_, hello)) = self.workers.get(&id) else { return false };
        hello.held.as_ref().is_some_and(|held| self.is_usable(held, &hello.bits))
    }

    /// Whether what was done in a generation is part of the run as it is now.
    pub(super) fn counts(&self, generation: Generation) -> bool {
        generation > self.parts.records.fence && generation <= self.generation
    }

    /// Steps on record, with the evaluation of the last one.
    fn wholly_on_record(&self) -> u64 {
        let is_due = self.schedule.evaluates_after(self.step) && self.evaluated_at != Some(self.step);
        if is_due { self.step.saturating_sub(1) } else { self.step }
    }

    /// Sends a worker the batches that it lacks in its old place.
    pub(super) fn feed_again(&mut self, id: WorkerId) {
        let Some((link, hello)) = self.workers.get(&id) else { return };
        let Some(Holding::Place { shards, next, window, .. }) = hello.held.as_ref().map(|held| &held.holding)
        else {
            return;
        };
        let (data, shards) = (self.parts.data.handle(), shards.clone());
        let feeder = Feeder::start(data, self.schedule, *next, self.generation, shards, link.clone());
        feeder.grant(*window);
        self.feeders.insert(id, feeder);
    }

    /// All members of the last generation are back and go on.
    pub(super) fn adopt(
        &mut self,
        generation: Generation,
        members: &[WorkerId],
        reason: &str,
    ) -> Result<(), Problem> {
        debug_assert_eq!(generation, self.generation);
        self.may_come_back = false;
        self.stopped.clear();
        if let Some((step, parted)) = self.digests.compare_kept(members) {
            self.replicas_differ(step, &parted);
        }
        let shares = members.iter().copied().zip(self.places.iter().map(|shards| shards.len() as u32));
        self.paces.begin(self.started.elapsed(), shares);
        self.parts.records.journal(&Record::Event { text: reason.to_owned() })?;
        self.show_generation(members.iter().copied());
        self.parts.screen.notice(reason);
        self.announce_checkpoint();
        // One may have become due meanwhile.
        let digest_steps = self.parts.file.run.digest_steps.max(1);
        self.ask_state((self.step + 1).next_multiple_of(digest_steps));
        Ok(())
    }

    /// Nobody has come back: the run goes on from what the disk has, and so do its records.
    pub(super) fn go_back(&mut self) -> Result<(), Problem> {
        let (step, control) = self.parts.on_disk();
        let notices = self.parts.records.rewind(step)?;
        self.parts.losses.reread(&self.parts.records.dir.metrics_path())?;
        notices.iter().for_each(|notice| self.parts.screen.notice(notice));
        (self.step, self.on_record) = (step, step);
        (self.control, self.evaluated_at) = (control, None);
        self.validation = self.parts.records.evaluation_at(step);
        let epoch = self.schedule.position(step).0 + 1;
        self.with_status(|status| (status.step, status.epoch) = (step, epoch));
        Ok(())
    }
}
