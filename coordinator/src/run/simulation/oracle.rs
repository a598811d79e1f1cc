//! What must hold while a run is under way and in the end.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use protocol::message::{Form, Generation, StateSource};
use protocol::schedule::Work;
use protocol::sums::StepSums;

use super::network::Process;
use super::replica::{Job, Replica};
use super::worker::BATCHES_AHEAD;
use crate::store::checkpoint_dir::CheckpointDir;
use crate::store::journal::Replay;
use crate::store::metrics_log::{self, MetricLine};

/// An undisturbed run.
pub(super) struct Expected {
    /// The state after each step, from 0: before the evaluation that belongs to it, and after it.
    states: Vec<[Replica; 2]>,
    /// The sums of each step, from 1.
    sums: Vec<StepSums>,
    last_image: Vec<u8>,
}

impl Expected {
    /// One worker holds all shards and nothing happens to it.
    pub(super) fn of(job: &Job) -> Self {
        let mut data = job.data.handle();
        let shards = 0..job.file.job.shards;
        let mut replica = Replica::initial();
        let mut states = vec![[replica.clone(), replica.clone()]];
        let mut sums = Vec::new();
        for step in 0..job.schedule.total_steps {
            let (epoch, index) = job.schedule.position(step);
            let batch = data.batch(Work::Train { step, epoch, index }, shards.clone());
            sums.push(replica.take_step(job.schedule, &replica.clone().parts(&batch)).0);
            let owing = replica.clone();
            let evaluation = job.schedule.evaluation(replica.step);
            let batches: Vec<_> =
                evaluation.map(|work| replica.parts(&data.batch(work, shards.clone()))).collect();
            if !batches.is_empty() {
                replica.take_evaluation(job.schedule, &batches);
            }
            states.push([owing, replica.clone()]);
        }
        Self { states, sums, last_image: replica.image(job) }
    }

    /// Watches the workers of one run.
    pub(super) fn watch(&self) -> Watch<'_> {
        Watch {
            expected: self,
            newest: 0,
            formed_by: BTreeMap::new(),
            from_disk: 0,
            late_steps: HashMap::new(),
        }
    }

    /// What is wrong with the records of a run that is done.
    pub(super) fn compare(&self, job: &Job, dir: &Path) -> Result<(), String> {
        let newest = CheckpointDir::new(dir).newest_verified().map_err(|problem| problem.to_string())?;
        let image = newest.map(|newest| newest.checkpoint.image.into_bytes());
        if image.as_ref() != Some(&self.last_image) {
            let found = image.map(|image| Replica::from_image(&image));
            return Err(format!("the last checkpoint is not the undisturbed run's: {found:?}"));
        }
        let replay = Replay::read(&dir.join("journal")).map_err(|problem| problem.to_string())?;
        let ledger: Vec<_> =
            replay.ledger.iter().map(|(&step, line)| (step, line.rows, line.row_hash)).collect();
        let of_step = |(sums, step): (&StepSums, u64)| (step, sums.rows, sums.row_hash);
        let expected: Vec<_> = self.sums.iter().zip(1..).map(of_step).collect();
        if ledger != expected {
            return Err(format!("the ledger is {ledger:?}, not {expected:?}"));
        }
        let lines = metrics_log::read(&dir.join("metrics.jsonl")).map_err(|problem| problem.to_string())?;
        let (mut steps, mut epochs) = (Vec::new(), Vec::new());
        for line in lines {
            match line {
                MetricLine::Step(line) => steps.push((line.step, line.train_loss)),
                MetricLine::Epoch(line) => epochs.push(line.epoch),
                MetricLine::Sample(_) => {}
            }
        }
        let expected: Vec<_> =
            self.sums.iter().zip(1..).map(|(sums, step)| (step, sums.mean_loss())).collect();
        if steps != expected {
            return Err(format!("the metrics have steps {steps:?}"));
        }
        let whole_epochs = job.schedule.total_steps / job.schedule.steps_per_epoch;
        if epochs != Vec::from_iter(1..=whole_epochs) {
            return Err(format!("the metrics have epochs {epochs:?}"));
        }
        Ok(())
    }
}

/// Compares each state that a worker comes to.
pub(super) struct Watch<'a> {
    expected: &'a Expected,
    /// The newest generation that was formed.
    newest: Generation,
    /// The coordinator of each.
    formed_by: BTreeMap<Generation, Process>,
    /// What was done in older ones does not count: the run went on from what the disk had.
    from_disk: Generation,
    /// Steps that each worker has done of an older one.
    late_steps: HashMap<Process, u32>,
}

impl Watch<'_> {
    /// A generation was formed. Its members hold the states after so many steps, of these generations.
    pub(super) fn formed(
        &mut self,
        by: Process,
        form: &Form,
        held: &[(Generation, u64)],
    ) -> Result<(), String> {
        self.formed_by.insert(form.generation, by);
        if form.generation <= self.newest {
            return Ok(());
        }
        self.newest = form.generation;
        self.late_steps.clear();
        let counts = held.iter().filter(|(generation, _)| *generation >= self.from_disk);
        let most = counts.map(|&(_, step)| step).max();
        if matches!(form.state, StateSource::Coordinator | StateSource::Initial) {
            self.from_disk = form.generation;
        }
        match most {
            Some(most) if most > form.step => {
                Err(format!("a member holds the state after step {most}, and all go on from {}", form.step))
            }
            _ => Ok(()),
        }
    }

    /// The run has stopped, and its records are in order: who has missed that holds nothing of use.
    pub(super) fn stopped(&mut self) {
        self.from_disk = self.newest + 1;
    }

    /// A worker has done a step, or the evaluation that belongs to it.
    pub(super) fn advanced(
        &mut self,
        who: Process,
        generation: Generation,
        replica: &Replica,
    ) -> Result<(), String> {
        let name = who.node;
        if !self.expected.states[replica.step as usize].contains(replica) {
            let step = replica.step;
            return Err(format!("{name} has another state than it should after step {step}: {replica:?}"));
        }
        if generation < self.newest {
            // All that such a step needs may have been on its way when the worker was lost; that is so for one step, and its
            // evaluation. Members that a new coordinator does not know of do all for which they have batches.
            let is_its_own = self.formed_by.get(&generation) == self.formed_by.get(&self.newest);
            let late = self.late_steps.entry(who).or_default();
            *late += 1;
            if *late > if is_its_own { 2 } else { BATCHES_AHEAD } {
                return Err(format!(
                    "{name} goes on in generation {generation}, while there is generation {}",
                    self.newest
                ));
            }
        }
        Ok(())
    }
}
