//! A training step put together by hand from the calls of a [`Device`], for one device or for a fleet of them.

use std::ops::Range;

use kernels::Simd;
use model::cpu::{CpuBackend, CpuDevice};
use model::device::{Backend, Device, Pass, Update};
use protocol::batch::Batch;
use protocol::job::Clip;
use protocol::sums::StepSums;
use protocol::tree::{self, Addition, TreeNode};

use super::compare::bits;
use super::setup::{Setup, State};

impl Setup {
    /// One CPU device with `threads` threads for each range of shards.
    pub(crate) fn fleet(&self, simd: Simd, threads: usize, split: &[Range<u32>]) -> Fleet<CpuDevice> {
        self.fleet_with(simd, threads, split, false)
    }

    /// The same, of devices that may compute the forward pass again for the backward pass.
    pub(crate) fn fleet_with(
        &self,
        simd: Simd,
        threads: usize,
        split: &[Range<u32>],
        recompute: bool,
    ) -> Fleet<CpuDevice> {
        let backend = CpuBackend::new(simd, threads);
        let open = |shards: &Range<u32>| Worker {
            device: backend.open(&self.layout, &self.job, &self.data, recompute).unwrap(),
            shards: shards.clone(),
        };
        Fleet { setup: self.clone(), workers: split.iter().map(open).collect() }
    }

    /// One device of cubecl's for each range of shards.
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    pub(crate) fn fleet_on<R: cubecl::Runtime>(
        &self,
        device: &R::Device,
        split: &[Range<u32>],
    ) -> Fleet<model::cube::CubeDevice<R>> {
        kernels::cube::guard::abort_on_device_panic();
        let open = |shards: &Range<u32>| {
            let device = model::cube::CubeDevice::new(R::client(device), self.layout.clone(), &self.job);
            Worker { device, shards: shards.clone() }
        };
        Fleet { setup: self.clone(), workers: split.iter().map(open).collect() }
    }

    /// One CPU device with one thread for all shards, at the widest level.
    pub(crate) fn alone(&self) -> Fleet<CpuDevice> {
        self.fleet(Simd::detect(), 1, &self.split(1))
    }
}

/// What one pass over a batch gives.
#[derive(Debug, Clone)]
pub(crate) struct Outcome {
    /// Gradient of each shard's summed loss, before any clipping; empty after an evaluation.
    pub(crate) partials: Vec<Vec<f32>>,
    /// Sums of each shard.
    pub(crate) sums: Vec<StepSums>,
    /// All shards' gradients, clipped if the job clips shards, added along the tree.
    pub(crate) gradient: Vec<f32>,
    /// The recurrent state by slot; where a slot had no row it is what it was.
    pub(crate) recurrent: Vec<f32>,
    /// Norm of the mean gradient before the update; 0 after an evaluation.
    pub(crate) norm: f64,
}

impl Outcome {
    /// The bits of everything, to compare.
    pub(crate) fn bits(&self) -> OutcomeBits {
        OutcomeBits {
            partials: self.partials.iter().map(|partial| bits(partial)).collect(),
            losses: self.sums.iter().map(|sums| sums.loss.to_bits()).collect(),
            counts: self
                .sums
                .iter()
                .map(|sums| (sums.weight, sums.correct, sums.rows, sums.row_hash, sums.non_finite))
                .collect(),
            gradient: bits(&self.gradient),
            recurrent: bits(&self.recurrent),
            norm: self.norm.to_bits(),
        }
    }
}

/// [`Outcome`] as bits.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct OutcomeBits {
    partials: Vec<Vec<u32>>,
    losses: Vec<u64>,
    counts: Vec<(u64, u64, u64, u64, bool)>,
    gradient: Vec<u32>,
    recurrent: Vec<u32>,
    norm: u64,
}

/// Nodes of the tree with their values: what a worker sends.
type Nodes = Vec<(TreeNode, Vec<f32>)>;

/// One device and the shards it computes.
pub(crate) struct Worker<D> {
    pub(crate) device: D,
    pub(crate) shards: Range<u32>,
}

/// Devices that share the work of a job, and the fleet's collectives as plain copies.
pub(crate) struct Fleet<D> {
    pub(crate) setup: Setup,
    pub(crate) workers: Vec<Worker<D>>,
}

impl<D: Device> Fleet<D> {
    /// One training step, as the step loop does it; `step` steps were done before.
    pub(crate) fn train(&mut self, step: u64, state: &mut State, batch: &Batch) -> Outcome {
        let mut outcome = self.pass(Pass::Train { step }, state, batch);
        let weight = StepSums::total(&outcome.sums).weight;
        let update = Update::new(&self.setup.job, step, weight, self.setup.job.learning_rate);
        let device = &mut self.workers[0].device;
        let gradient = on(device, &outcome.gradient);
        let mut parameters = on(device, &state.parameters);
        let mut first = on(device, &state.first_moment);
        let mut second = on(device, &state.second_moment);
        outcome.norm = device.mean_norm(&gradient, weight).unwrap();
        device.update(&update, outcome.norm, &gradient, &mut parameters, &mut first, &mut second).unwrap();
        state.parameters = off(device, &parameters, state.parameters.len());
        state.first_moment = off(device, &first, state.first_moment.len());
        state.second_moment = off(device, &second, state.second_moment.len());
        state.recurrent.clone_from(&outcome.recurrent);
        outcome
    }

    /// One pass over a batch, without the update.
    pub(crate) fn pass(&mut self, pass: Pass, state: &State, batch: &Batch) -> Outcome {
        let Self { setup, workers } = self;
        let mut all = Outcome {
            partials: Vec::new(),
            sums: Vec::new(),
            gradient: Vec::new(),
            recurrent: state.recurrent.clone(),
            norm: 0.0,
        };
        // What travels: the values of the tree nodes that cover each worker's shards, by their leftmost leaf.
        let mut nodes: Vec<TreeNode> = Vec::new();
        let mut places: Vec<Option<Vec<f32>>> = vec![None; setup.job.shards as usize];
        for worker in workers {
            let part = setup.part(batch, worker.shards.clone());
            all.sums.extend(worker.step(setup, pass, state, &part, &mut all.recurrent));
            if pass == Pass::Evaluate {
                continue;
            }
            let (partials, sent) = worker.gradient(setup, &all.sums[worker.shards.start as usize..]);
            all.partials.extend(partials);
            for (node, value) in sent {
                places[node.range(setup.job.shards).start as usize] = Some(value);
                nodes.push(node);
            }
        }
        if pass != Pass::Evaluate {
            let device = &self.workers[0].device;
            for Addition { left, right } in tree::remaining(self.setup.job.shards, &nodes) {
                let source = places[right as usize].take().expect("the right operand has arrived");
                let destination = places[left as usize].as_mut().expect("the left operand has arrived");
                *destination = tree_add(device, destination, &source);
            }
            all.gradient = places[0].take().expect("the tree has a root");
        }
        all
    }
}

impl<D: Device> Worker<D> {
    /// The step itself; gives the shards' sums and writes the new state of the part's slots.
    fn step(
        &mut self,
        setup: &Setup,
        pass: Pass,
        state: &State,
        part: &Batch,
        recurrent: &mut [f32],
    ) -> Vec<StepSums> {
        let device = &mut self.device;
        let parameters = on(device, &state.parameters);
        let state_in = on(device, &state.recurrent);
        // A mark in every place shows what the step writes.
        const MARK: f32 = 12345.0;
        let mut state_out = on(device, &vec![MARK; state.recurrent.len()]);
        device.step(pass, &parameters, part, &state_in, &mut state_out).unwrap();
        let sums = device.read_sums().unwrap().to_vec();
        assert_eq!(sums.len(), part.shards.len());
        let kept = off(device, &state_in, state.recurrent.len());
        assert_eq!(bits(&kept), bits(&state.recurrent), "a step must leave state_in alone");
        let written = off(device, &state_out, state.recurrent.len());
        let size = setup.layout.shape.state_size();
        let first = part.first_slot as usize * size;
        let own = first..first + part.rows() * size;
        for (at, &value) in written.iter().enumerate() {
            assert_eq!(
                value != MARK,
                own.contains(&at),
                "place {at} of state_out, the step's own are {own:?}"
            );
        }
        recurrent[own.clone()].copy_from_slice(&written[own]);
        sums
    }

    /// The shards' gradients as they left the device, and the values of the nodes that cover them.
    fn gradient(&mut self, setup: &Setup, sums: &[StepSums]) -> (Vec<Vec<f32>>, Nodes) {
        let (shards, len) = (setup.job.shards, setup.layout.parameters());
        let device = &mut self.device;
        let leaves = self.shards.clone().map(|index| TreeNode { level: 0, index });
        let cover = tree::cover(shards, self.shards.clone());
        let nodes: Vec<TreeNode> = leaves.chain(cover.iter().copied()).collect();
        // Old numbers must not shine through.
        let old = vec![f32::NAN; len];
        let mut gradients: Vec<D::Buffer> = nodes.iter().map(|_| on(device, &old)).collect();
        for bucket in 0..setup.layout.buckets().len() {
            device.finish_buckets(bucket..bucket + 1, &nodes, &mut gradients).unwrap();
        }
        let of_cover = gradients.split_off(self.shards.len());
        let unclipped = gradients.iter().map(|gradient| off(device, gradient, len)).collect();
        if setup.job.clip == Clip::Shard {
            for (gradient, sums) in gradients.iter_mut().zip(sums) {
                device.clip_shard(gradient, sums.weight, setup.job.clip_norm).unwrap();
            }
        }
        let place = |shard: u32| (shard - self.shards.start) as usize;
        for Addition { left, right } in tree::subtree(shards, self.shards.clone()) {
            let [left, right] = gradients.get_disjoint_mut([place(left), place(right)]).unwrap();
            for range in setup.layout.buckets() {
                device.tree_add(left, right, range).unwrap();
            }
        }
        let added = |node: &TreeNode| off(device, &gradients[place(node.range(shards).start)], len);
        let added: Nodes = cover.iter().map(|node| (*node, added(node))).collect();
        if setup.job.clip != Clip::Shard {
            for ((node, added), own) in added.iter().zip(&of_cover) {
                assert_eq!(
                    bits(&off(device, own, len)),
                    bits(added),
                    "{node:?} is not the sum of its shards"
                );
            }
        }
        (unclipped, added)
    }
}

/// Numbers in a new buffer of the device.
pub(crate) fn on<D: Device>(device: &D, values: &[f32]) -> D::Buffer {
    let mut buffer = device.zeros(values.len()).unwrap();
    device.import(&mut buffer, 0, values).unwrap();
    buffer
}

/// The first `len` numbers of a buffer.
pub(crate) fn off<D: Device>(device: &D, buffer: &D::Buffer, len: usize) -> Vec<f32> {
    let mut values = vec![f32::NAN; len];
    device.export(buffer, 0..len, &mut values).unwrap();
    values
}

fn tree_add<D: Device>(device: &D, destination: &[f32], source: &[f32]) -> Vec<f32> {
    let mut sum = on(device, destination);
    device.tree_add(&mut sum, &on(device, source), 0..source.len()).unwrap();
    off(device, &sum, source.len())
}
