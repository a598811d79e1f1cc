//! The step loop: shard slices → forward → backward → own shards along the tree → all-reduce → clip → optimizer →
//! report. One worker or many run the same lines.

use std::ops::Range;
use std::time::{Duration, Instant};

use failpoints::{Injected, Point, reach};
use model::device::{Device, DeviceError, Pass, Update};
use model::sample::{SampleOptions, Sampler};
use protocol::activity::Phase;
use protocol::batch::{Batch, DataShape};
use protocol::job::{Clip, JobSpec, NonFinite};
use protocol::learning_rate::learning_rate;
use protocol::message::{Form, PhaseSeconds, SampleRequest, StepReport, Stop, ToCoordinator};
use protocol::schedule::Work;
use protocol::slots::slots_of;
use protocol::sums::StepSums;
use protocol::tree::{self, Addition, TreeNode};

use crate::collective::{Collective, CollectiveError, Ticket};
use crate::feed::{Feed, FeedClosed};
use crate::metrics::Overhead;
use crate::outbox::Outbox;
use crate::replica::Replica;
use crate::sums_exchange::{Wish, exchange_sums};

/// Shards' sums of an evaluation that are exchanged together: few messages, each below a frame's limit.
const SUMS_PER_EXCHANGE: usize = 16_384;

/// A text that takes longer is cut off: the other workers wait meanwhile.
const SAMPLE_LIMIT: Duration = Duration::from_secs(2);

/// Why a generation's loop ended early.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// A peer was lost or the step was aborted.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// No more batches come.
    #[error(transparent)]
    Feed(#[from] FeedClosed),
}

/// The nodes whose gradients a device sums for these shards: those that cover them or, where shards are clipped, each of
/// them. Each gradient takes `P` floats.
pub fn summed_nodes(job: &JobSpec, shards: Range<u32>) -> Vec<TreeNode> {
    match job.clip {
        Clip::Shard => shards.map(|index| TreeNode { level: 0, index }).collect(),
        Clip::Global | Clip::None => tree::cover(job.shards, shards),
    }
}

/// One worker's part in one generation.
pub struct Generation<D: Device> {
    form: Form,
    rank: u32,
    job: JobSpec,
    data: DataShape,
    sample: Option<SampleRequest>,
    collective: Box<dyn Collective<D>>,
    feed: Feed,
    outbox: Outbox,
    /// The gradient's buckets in the order in which the backward pass finishes them.
    buckets: Vec<Range<usize>>,
    /// The nodes whose gradients the device sums: those that cover this worker's shards, or, where shards are clipped,
    /// each of its shards.
    nodes: Vec<TreeNode>,
    /// Their gradients, `[P]` each.
    sums: Vec<D::Buffer>,
    /// The nodes that cover this worker's shards, which is what it sends, each with the position of its sum.
    cover: Vec<(TreeNode, usize)>,
    /// The part of the recurrent state buffer that each rank computes.
    state_parts: Vec<Range<usize>>,
}

impl<D: Device> Generation<D> {
    /// Prepares all buffers for the member of this rank; after this no training step allocates on the device.
    ///
    /// # Errors
    /// The device has no room for the partial gradients.
    pub fn new(
        (form, rank): (Form, u32),
        job: JobSpec,
        data: DataShape,
        device: &D,
        replica: &Replica<D>,
        links: (Box<dyn Collective<D>>, Feed, Outbox),
    ) -> Result<Self, DeviceError> {
        let shards = form.members[rank as usize].shards.clone();
        let cover = tree::cover(job.shards, shards.clone());
        let nodes = summed_nodes(&job, shards);
        let first_shard = |node: TreeNode| node.range(job.shards).start;
        let place = |node| nodes.iter().position(|held| first_shard(*held) == first_shard(node));
        let cover = cover.into_iter().map(|node| (node, place(node).expect("it is held"))).collect();
        let state_size = replica.layout.shape.state_size();
        let state_parts = form
            .members
            .iter()
            .map(|member| slots_of(job.batch_size, job.shards, member.shards.clone()))
            .map(|slots| slots.start as usize * state_size..slots.end as usize * state_size)
            .collect();
        let sums =
            nodes.iter().map(|_| device.zeros(replica.layout.parameters())).collect::<Result<_, _>>()?;
        let buckets = replica.layout.buckets();
        let (collective, feed, outbox) = links;
        Ok(Self {
            form,
            rank,
            job,
            data,
            sample: None,
            collective,
            feed,
            outbox,
            buckets,
            nodes,
            sums,
            cover,
            state_parts,
        })
    }

    /// Has the network write a text at each epoch's end, if one is asked for and this worker is the one to do it.
    pub fn with_sample(self, request: Option<SampleRequest>) -> Self {
        Self { sample: request.filter(|_| self.rank == 0), ..self }
    }

    /// Trains until the schedule ends, the control state ends the run, the fleet pauses or drains, or something breaks.
    /// The replica is always in the state after some step; if it was cut off before the evaluation that belongs to it,
    /// the control state says so, and whoever goes on from there begins with that.
    ///
    /// # Errors
    /// An aborted or broken generation, a failed device.
    pub fn train(&mut self, device: &mut D, replica: &mut Replica<D>) -> Result<Stop, StepError> {
        let schedule = self.data.schedule;
        if self.form.owes_evaluation {
            self.evaluate(device, replica)?;
            self.outbox.after_step(device, replica, self.form.generation)?;
        }
        let mut wish = Wish::GoOn;
        loop {
            if let Some(stop) = replica.control.early_end(&self.job, replica.progress) {
                return Ok(stop);
            }
            if replica.progress.step >= schedule.total_steps {
                return Ok(Stop::Finished);
            }
            match wish {
                Wish::GoOn => {}
                Wish::Pause => return Ok(Stop::Paused),
                Wish::Drain => return Ok(Stop::Drained),
            }
            wish = match self.step(device, replica)? {
                Some(wish) => wish,
                None => return Ok(Stop::NonFinite),
            };
            if schedule.evaluates_after(replica.progress.step) {
                self.evaluate(device, replica)?;
            }
            self.outbox.after_step(device, replica, self.form.generation)?;
        }
    }

    /// One step. Gives what all workers do after it, or `None` if it is not finite and the job does not leave such steps
    /// out: it is then not done.
    fn step(&mut self, device: &mut D, replica: &mut Replica<D>) -> Result<Option<Wish>, StepError> {
        let started = Instant::now();
        let step = replica.progress.step;
        let steps_per_epoch = self.data.schedule.steps_per_epoch;
        let (epoch, index) = self.data.schedule.position(step);
        let batch = self.feed.next(Work::Train { step, epoch, index })?;
        let fed = self.enter(Phase::Compute, step);
        if let Some(Injected::Error) = reach(Point::Compute, step) {
            return Err(DeviceError("a failpoint".to_owned()).into());
        }

        let (parameters, state) = (&replica.parameters, &replica.state);
        device.step(Pass::Train { step }, parameters, &batch, state, &mut replica.next_state)?;
        let gathers = Instant::now();
        let states = self.collective.begin_gather(device, &replica.next_state, self.state_parts.clone())?;
        let mut gathering = gathers.elapsed();
        let (own_sums, tickets) = self.begin_gradient(device, &mut replica.gradient)?;
        let computed = self.enter(Phase::Reduce, step);
        reach(Point::Reduce, step);

        let wish = self.outbox.wish(self.form.generation);
        let (by_shard, wish) = exchange_sums(&mut *self.collective, &self.form.members, &[own_sums], wish)?;
        let sums = StepSums::total(&by_shard[0]);
        for ticket in tickets {
            self.collective.wait(device, ticket, &mut replica.gradient)?;
        }
        let gathers = Instant::now();
        self.collective.wait(device, states, &mut replica.next_state)?;
        gathering += gathers.elapsed();
        self.outbox.overhead(Overhead::RecurrentState, gathering);
        let reduced = self.enter(Phase::Update, step);

        let gradient_norm = device.mean_norm(&replica.gradient, sums.weight)?;
        let learning_rate = replica.control.learning_rate(learning_rate(&self.job, step, steps_per_epoch));
        if sums.is_finite(gradient_norm) {
            let update = Update::new(&self.job, replica.updates_done(), sums.weight, learning_rate);
            replica.update(device, &update, gradient_norm)?;
            replica.commit(steps_per_epoch);
        } else if self.job.non_finite == NonFinite::Skip {
            replica.skip(device, steps_per_epoch)?;
        } else {
            self.outbox.non_finite(step + 1, sums.mean_loss(), gradient_norm);
            return Ok(None);
        }
        replica.control.after_step(index, steps_per_epoch, &sums, gradient_norm);
        if let Some(Injected::Flip) = reach(Point::Update, step) {
            replica.flip_bit(device)?;
        }
        self.outbox.send(ToCoordinator::Step(StepReport {
            generation: self.form.generation,
            step: replica.progress.step,
            sums,
            gradient_norm,
            learning_rate,
            control: replica.control,
            seconds: PhaseSeconds {
                data: (fed - started).as_secs_f64(),
                compute: (computed - fed).as_secs_f64(),
                reduce: (reduced - computed).as_secs_f64(),
                update: reduced.elapsed().as_secs_f64(),
            },
        }));
        Ok(Some(wish))
    }

    /// Writes down what this thread does from now on.
    fn enter(&self, phase: Phase, step: u64) -> Instant {
        self.outbox.tracer().enter(phase, step);
        Instant::now()
    }

    /// Completes the gradient and begins to reduce it to `into`, bucket by bucket: each travels while the next is computed,
    /// unless there is nobody to send it to, or shards are clipped, for which all of it must be known. Gives the sums of
    /// this worker's shards too.
    fn begin_gradient(
        &mut self,
        device: &mut D,
        into: &mut D::Buffer,
    ) -> Result<(Vec<StepSums>, Vec<Ticket>), StepError> {
        let buckets = 0..self.buckets.len();
        let clip_shards = self.job.clip == Clip::Shard;
        let mut tickets = Vec::with_capacity(buckets.len());
        if clip_shards || self.form.members.len() == 1 {
            device.finish_buckets(buckets.clone(), &self.nodes, &mut self.sums)?;
            if clip_shards {
                let own_sums = device.read_sums()?.to_vec();
                self.clip_shards(device, &own_sums)?;
            }
            for bucket in buckets {
                tickets.push(self.begin_reduce(device, bucket, into)?);
            }
        } else {
            for bucket in buckets {
                device.finish_buckets(bucket..bucket + 1, &self.nodes, &mut self.sums)?;
                tickets.push(self.begin_reduce(device, bucket, into)?);
            }
        }
        Ok((device.read_sums()?.to_vec(), tickets))
    }

    /// Clips each shard's gradient and adds them along the tree; each node's sum is then in the place of its first shard.
    fn clip_shards(&mut self, device: &D, own_sums: &[StepSums]) -> Result<(), StepError> {
        for (gradient, sums) in self.sums.iter_mut().zip(own_sums) {
            device.clip_shard(gradient, sums.weight, self.job.clip_norm)?;
        }
        let shards = self.form.members[self.rank as usize].shards.clone();
        for Addition { left, right } in tree::subtree(self.job.shards, shards.clone()) {
            let places = [left, right].map(|shard| (shard - shards.start) as usize);
            let [sum, addend] =
                self.sums.get_disjoint_mut(places).expect("an addition has two distinct operands");
            for bucket in &self.buckets {
                device.tree_add(sum, addend, bucket.clone())?;
            }
        }
        Ok(())
    }

    /// Begins to reduce one bucket.
    fn begin_reduce(&mut self, device: &D, bucket: usize, into: &mut D::Buffer) -> Result<Ticket, StepError> {
        let nodes: Vec<(TreeNode, &D::Buffer)> =
            self.cover.iter().map(|&(node, place)| (node, &self.sums[place])).collect();
        let ticket = self.collective.begin_reduce(device, self.buckets[bucket].clone(), &nodes, into)?;
        self.outbox.tracer().bucket_left(bucket as u32);
        Ok(ticket)
    }

    /// Evaluates the validation data with the same shards, rules and sums. Only an epoch's end enters the control
    /// state.
    fn evaluate(&mut self, device: &mut D, replica: &mut Replica<D>) -> Result<(), StepError> {
        let step = replica.progress.step;
        let mut state = device.zeros(replica.layout.recurrent())?;
        let mut next_state = device.zeros(replica.layout.recurrent())?;
        let mut own = Vec::new();
        let mut sums = StepSums::default();
        let batches = self.data.schedule.evaluation_batches;
        for work in self.data.schedule.evaluation(step) {
            let batch: Batch = self.feed.next(work)?;
            self.enter(Phase::Evaluate, step);
            device.step(Pass::Evaluate, &replica.parameters, &batch, &state, &mut next_state)?;
            std::mem::swap(&mut state, &mut next_state);
            own.push(device.read_sums()?.to_vec());
            reach(Point::Evaluation, step);
            let Work::Evaluate { index, .. } = work else {
                unreachable!("an evaluation has no training steps")
            };
            if own.len() >= SUMS_PER_EXCHANGE / self.job.shards as usize || index + 1 == batches {
                self.enter(Phase::Reduce, step);
                let (by_batch, _) =
                    exchange_sums(&mut *self.collective, &self.form.members, &own, Wish::GoOn)?;
                own.clear();
                sums =
                    by_batch.iter().map(|by_shard| StepSums::total(by_shard)).fold(sums, StepSums::combine);
            }
        }
        let ends_epoch = self.data.schedule.ends_epoch(step);
        if ends_epoch {
            replica.control.after_epoch(&sums);
            reach(Point::EpochEnd, step);
        }
        let (generation, control) = (self.form.generation, replica.control);
        self.outbox.send(ToCoordinator::Evaluation { generation, step, sums, control });
        if let Some(request) = self.sample.as_ref().filter(|_| ends_epoch) {
            self.enter(Phase::Sample, step);
            reach(Point::Sampling, step);
            let tokens = write_sample(device, replica, request)?;
            self.outbox.send(ToCoordinator::Sample { generation: self.form.generation, step, tokens });
        }
        Ok(())
    }
}

/// What the network writes after so much training. Reads the parameters and nothing else of the replica.
fn write_sample<D: Device>(
    device: &mut D,
    replica: &Replica<D>,
    request: &SampleRequest,
) -> Result<Vec<u32>, DeviceError> {
    let started = Instant::now();
    let options = SampleOptions { temperature: request.temperature, top_n: None, seed: request.seed };
    Sampler::new(device, &replica.layout.shape, &replica.parameters, &request.prime, options)?
        .take(request.length as usize)
        .take_while(|_| started.elapsed() < SAMPLE_LIMIT)
        .collect()
}
