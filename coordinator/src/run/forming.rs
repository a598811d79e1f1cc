//! The beginning of a generation: who takes part, from which state, and what each is sent for it.

use failpoints::{Point, reach};
use protocol::frame::encode_message;
use protocol::message::{Form, Member, StateSource, ToWorker, WorkerId};
use protocol::problem::Problem;

use super::Run;
use crate::epoch_clock::EpochClock;
use crate::feeder::Feeder;
use crate::membership::Source;
use crate::stage::Stage;
use crate::state_stream::{Arriving, send_image};
use crate::store::files::write_atomic;
use crate::store::journal::{MemberLine, Record};

impl Run {
    /// Forms a generation. What its members compute again, because the state they go on from is behind the records, has
    /// the same bits as before: records know each step once, and need not go back.
    pub(super) fn form(
        &mut self,
        generation: u64,
        members: &[Member],
        source: Source,
        reason: &str,
    ) -> Result<(), Problem> {
        if std::mem::take(&mut self.may_come_back) && source == Source::Disk {
            self.go_back()?;
        }
        (self.generation, self.places) = (generation, members.iter().map(|m| m.shards.clone()).collect());
        self.stopped.clear();
        self.furthest = None;
        (self.arriving, self.held) = (Arriving::default(), None);
        self.parts.records.journal(&Record::Generation {
            generation,
            members: members.iter().map(MemberLine::from).collect(),
            reason: reason.to_owned(),
            bits: self.membership.bits().map(str::to_owned),
        })?;
        self.parts.metrics.generation();
        let from_disk = match source {
            Source::Disk => self.newest_state()?,
            Source::Kept(_) | Source::Member(..) => None,
        };
        let (stage, state) = match (source, &from_disk) {
            (Source::Disk, None) => (Stage { step: 0, whole: true }, StateSource::Initial),
            (Source::Disk, Some((stage, _))) => (*stage, StateSource::Coordinator),
            (Source::Kept(stage), _) => (stage, StateSource::Kept),
            (Source::Member(rank, stage), _) => (stage, StateSource::Member(rank)),
        };
        self.digests.begin(stage.step);
        self.deadlines.begin();
        let shares = members.iter().map(|member| (member.worker_id, member.shards.len() as u32));
        self.paces.begin(self.started.elapsed(), shares);
        self.hangs.begin(generation);
        reach(Point::Recovery, stage.step);
        // It names all members: all links share its bytes.
        let form = encode_message(&ToWorker::Form(Form {
            generation,
            members: members.to_vec(),
            step: stage.step,
            owes_evaluation: !stage.whole,
            state,
            profile: self.profile.steps(stage.step),
        }));
        for member in members {
            let Some((link, _)) = self.workers.get(&member.worker_id) else { continue };
            link.send_frame(form.clone());
            if let Some((stage, image)) = &from_disk {
                reach(Point::StateTransfer, stage.step);
                send_image(link, generation, stage.step, image);
            }
            let (data, shards) = (self.parts.data.handle(), member.shards.clone());
            let first = self.schedule.after(stage.step, !stage.whole).next();
            let feeder = Feeder::start(data, self.schedule, first, generation, shards, link.clone());
            self.feeders.insert(member.worker_id, feeder);
        }
        self.show_generation(members.iter().map(|member| member.worker_id));
        self.parts.screen.notice(reason);
        if source == Source::Disk {
            self.epoch = EpochClock::new();
        }
        self.announce_checkpoint();
        Ok(())
    }

    /// The newest state on the disk: the one that the run went on from, if none was written since.
    pub(super) fn newest_state(&self) -> Result<Option<(Stage, Vec<u8>)>, Problem> {
        let resumed = self.parts.resumed.as_ref();
        let stage = resumed.map(|start| Stage { step: start.step, whole: !start.owes_evaluation });
        if self.parts.records.checkpoint <= stage {
            return Ok(stage.zip(resumed.map(|start| start.image.clone())));
        }
        let newest = self.parts.records.newest_state()?;
        Ok(newest.map(|image| (Stage::of(&image), image.bytes().to_vec())))
    }

    /// Says on the status page and in the ready file who trains.
    pub(super) fn show_generation(&mut self, members: impl Iterator<Item = WorkerId>) {
        let generation = self.generation;
        self.with_status(|status| {
            (status.phase, status.generation) = ("training", generation);
            for (id, shards) in members.zip(&self.places) {
                if let Some(worker) = status.workers.get_mut(&id) {
                    worker.shards = Some((shards.start, shards.end));
                }
            }
        });
        let Some((path, text)) = &self.parts.ready else { return };
        let text = format!("{text}generation={generation}\nstep={}\n", self.step);
        if let Err(problem) = write_atomic(path, text.as_bytes()) {
            self.parts.screen.notice(&problem.to_string());
        }
    }
}
