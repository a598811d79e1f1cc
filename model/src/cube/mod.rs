//! A device of cubecl's: a GPU through CUDA, or anything with Vulkan through wgpu.
//!
//! Parameters, gradients, moments and states stay on the device. A step uploads the tables of its batch ([`tables`]) and
//! downloads what its losses are made of; in between, kernels are enqueued one after the other: the batch on its way
//! through the layers and back ([`work`]), one direction's kernels ([`direction`]), then the gradients of the weights
//! ([`gradient`]). A trained network is read one step at a time by a batch of one row ([`reader`]).
//!
//! Its numbers are those of the CPU device but for roundings: sums run in another order. Among devices of one kind they
//! are equal bit by bit, however shards are spread: the row rule and the sum rule hold in every kernel.

mod direction;
mod gradient;
mod reader;
mod tables;
mod weights;
mod work;

use std::ops::Range;

use cubecl::prelude::*;
use kernels::cpu::optimizer::{AdamOptions, AdamStep, SgdStep};
use kernels::cube::buffer::{Buffer, DeviceFailure};
use kernels::cube::guard::abort_on_device_panic;
use kernels::cube::output::Dropout;
use kernels::cube::sequence::{Limits, Needs};
use kernels::cube::shards::Partials;
use kernels::cube::{elements, softmax};
use protocol::batch::{Batch, DataShape};
use protocol::job::{JobSpec, Precision};
use protocol::layout::{Head, LayerShape, ModelShape, StateLayout};
use protocol::random::{Purpose, keep_threshold, key};
use protocol::sums::StepSums;
use protocol::tree::TreeNode;

use crate::device::{Backend, CudaMemory, Device, DeviceError, Pass, Result, StepInput, Update, UpdateRule};
use crate::network::has_droppable_output;
use gradient::{Gradient, NodeSums};
use tables::Tables;
use weights::{Recipe, Weights};
use work::{Network, Work};

pub use reader::CubeReader;

/// Changes whenever a change of the code changes a bit of any result.
const NUMERICS_VERSION: u32 = 1;

impl From<DeviceFailure> for DeviceError {
    fn from(DeviceFailure(message): DeviceFailure) -> Self {
        Self(message)
    }
}

/// How a device's memory is reached from CUDA itself.
struct CudaAccess<R: Runtime> {
    ordinal: usize,
    address: fn(&ComputeClient<R>, &Buffer) -> Result<u64>,
}

impl<R: Runtime> Clone for CudaAccess<R> {
    fn clone(&self) -> Self {
        Self { ordinal: self.ordinal, address: self.address }
    }
}

/// Opens devices of one runtime.
#[derive(Clone)]
pub struct CubeBackend<R: Runtime> {
    device: R::Device,
    name: String,
    cuda: Option<CudaAccess<R>>,
}

impl<R: Runtime> CubeBackend<R> {
    /// A backend for this device. `name` is everything besides this program that its bits depend on: its model, its
    /// driver, its compiler.
    ///
    /// From now on a kernel that cannot be made ends the process, instead of being left out.
    pub fn new(device: R::Device, name: String) -> Self {
        abort_on_device_panic();
        Self { device, name, cuda: None }
    }
}

#[cfg(feature = "cuda")]
impl CubeBackend<cubecl::cuda::CudaRuntime> {
    /// A backend for the CUDA device at this position. `name` as for [`new`](Self::new).
    ///
    /// Whoever calls this knows that CUDA is there ([`kernels::cuda::Cuda::look`]): without it, opening panics.
    pub fn cuda(ordinal: usize, name: String) -> Self {
        let address = |client: &ComputeClient<cubecl::cuda::CudaRuntime>, buffer: &Buffer| {
            let place = client.get_resource(buffer.handle().clone());
            place.map(|place| place.resource().ptr).map_err(|error| DeviceError(format!("{error:?}")))
        };
        let device = cubecl::cuda::CudaDevice { index: ordinal };
        Self { cuda: Some(CudaAccess { ordinal, address }), ..Self::new(device, name) }
    }
}

#[cfg(feature = "wgpu")]
impl CubeBackend<cubecl::wgpu::WgpuRuntime> {
    /// A backend for a device of wgpu's. To be called once for each device in a process.
    pub fn wgpu(device: &cubecl::wgpu::WgpuDevice) -> Self {
        use cubecl::wgpu::{AutoGraphicsApi, init_setup};
        let info = init_setup::<AutoGraphicsApi>(device, Default::default()).adapter.get_info();
        Self::new(device.clone(), format!("wgpu {}, {} {}", info.name, info.driver, info.driver_info))
    }
}

impl<R: Runtime> Backend for CubeBackend<R> {
    type Device = CubeDevice<R>;

    fn describe(&self) -> String {
        self.name.clone()
    }

    fn bits(&self) -> String {
        format!("{} numerics {NUMERICS_VERSION}", self.name)
    }

    fn threads(&self) -> usize {
        1
    }

    fn has(&self, _: Precision) -> bool {
        true
    }

    fn open(&self, layout: &StateLayout, job: &JobSpec, _: &DataShape, _: bool) -> Result<CubeDevice<R>> {
        #[cfg(feature = "cuda")]
        if self.cuda.is_some() && job.precision != Precision::F32 {
            kernels::cuda::tensor_headers().map_err(|missing| DeviceError(missing.to_string()))?;
        }
        let client = R::client(&self.device);
        check_shared_memory(&layout.shape, Limits::of(&client))?;
        let device = CubeDevice::new(client, layout.clone(), job);
        Ok(CubeDevice { cuda: self.cuda.clone(), ..device })
    }
}

/// Whether a cube can hold what a step of one run needs, in every layer.
fn check_shared_memory(shape: &ModelShape, limits: Limits) -> Result<()> {
    for LayerShape { hidden_size, output_size, .. } in shape.layers() {
        let needs = Needs::of(shape.cell, shape.options.reset, hidden_size, output_size);
        let (needed, given) = (needs.least_shared(limits), limits.shared);
        if needed > given {
            return Err(DeviceError(format!(
                "a layer of {hidden_size} units needs {} bytes of shared memory, the device gives a cube {}",
                needed * size_of::<f32>(),
                given * size_of::<f32>()
            )));
        }
    }
    Ok(())
}

/// A device with its queue.
pub struct CubeDevice<R: Runtime> {
    client: ComputeClient<R>,
    /// Where it is a CUDA device.
    cuda: Option<CudaAccess<R>>,
    layout: StateLayout,
    seed: u64,
    keep_probs: Vec<f32>,
    variational: bool,
    /// Shards of the job.
    shards: u32,
    recipe: Recipe,
    weights: Weights,
    /// Of the last batch.
    tables: Option<Tables>,
    /// Of training batches and of those of an evaluation.
    works: [Option<Work>; 2],
    dropout: Vec<Option<Dropout>>,
    /// Parameters of the last training step.
    parameters: Option<Buffer>,
    /// Which work the last batch is in.
    last: usize,
    /// The shards' parts of one bucket, `[shards][longest bucket]`.
    partials: Option<Buffer>,
    nodes: Option<NodeSums>,
    sums: Option<Vec<StepSums>>,
}

impl<R: Runtime> CubeDevice<R> {
    /// A device for one job.
    pub fn new(client: ComputeClient<R>, layout: StateLayout, job: &JobSpec) -> Self {
        let recipe = Recipe::new(&client, &layout);
        let weights = recipe.weights(&client, &layout.shape);
        Self {
            recipe,
            weights,
            client,
            cuda: None,
            seed: job.seed,
            keep_probs: job.layer_keep_probs(),
            variational: job.variational_dropout,
            shards: job.shards,
            dropout: vec![None; layout.shape.num_layers()],
            layout,
            tables: None,
            works: [None, None],
            parameters: None,
            last: 0,
            partials: None,
            nodes: None,
            sums: None,
        }
    }

    /// Dropout of each layer's output in a training step.
    fn dropout_of(&self, step: u64) -> Vec<Option<Dropout>> {
        let shape = &self.layout.shape;
        let directions = 1 + u32::from(shape.bidirectional);
        let layers = shape.num_layers() as u32;
        let of_layer = |(index, &keep): (usize, &f32)| {
            (keep < 1.0 && has_droppable_output(shape, index)).then(|| Dropout {
                key: key(self.seed, Purpose::Dropout),
                step: step as u32,
                threshold: keep_threshold(keep),
                scale: 1.0 / keep,
                step_stride: if self.variational { 0 } else { layers * directions },
                position: index as u32 * directions,
            })
        };
        self.keep_probs.iter().enumerate().map(of_layer).collect()
    }

    fn drops(&self) -> bool {
        self.keep_probs.iter().any(|&keep| keep < 1.0)
    }
}

impl<R: Runtime> Device for CubeDevice<R> {
    type Buffer = Buffer;
    type Reader = CubeReader;

    fn zeros(&self, len: usize) -> Result<Buffer> {
        Ok(Buffer::from_floats(&self.client, &vec![0.0; len]))
    }

    fn import(&self, buffer: &mut Buffer, at: usize, values: &[f32]) -> Result<()> {
        let values = Buffer::from_floats(&self.client, values);
        elements::copy(&self.client, &values, 0..values.len(), buffer, at);
        Ok(())
    }

    fn export(&self, buffer: &Buffer, range: Range<usize>, into: &mut [f32]) -> Result<()> {
        into.copy_from_slice(&buffer.read_floats(&self.client, range)?);
        Ok(())
    }

    fn cuda(&self) -> Option<&dyn CudaMemory<Buffer>> {
        self.cuda.is_some().then_some(self as _)
    }

    fn copy(&self, destination: &mut Buffer, source: &Buffer, range: Range<usize>) -> Result<()> {
        let start = range.start;
        elements::copy(&self.client, source, range, destination, start);
        Ok(())
    }

    fn step(
        &mut self,
        pass: Pass,
        parameters: &Buffer,
        batch: &Batch,
        state_in: &Buffer,
        state_out: &mut Buffer,
    ) -> Result<()> {
        let backward = pass != Pass::Evaluate;
        if batch.rows() == 0 {
            // All rows of an evaluation's last batch may be another worker's.
            assert!(!backward, "step: a training batch without rows");
            self.sums = Some(vec![StepSums::default(); batch.shards.len()]);
            return Ok(());
        }
        self.dropout = match pass {
            Pass::Train { step } => self.dropout_of(step),
            Pass::Evaluate => vec![None; self.layout.shape.num_layers()],
        };
        let tables = Tables::of_batch(&self.client, &self.layout.shape, batch);
        self.last = usize::from(!backward);
        let mut work = match self.works[self.last].take() {
            Some(work) if work.fits(&tables) => work,
            _ => {
                let size = (tables.extent, tables.rows);
                Work::new(&self.client, &self.layout, size, backward, backward && self.drops())
            }
        };
        self.recipe.derive(&self.client, parameters, &self.weights);
        let network = Network {
            client: &self.client,
            layout: &self.layout,
            parameters,
            weights: &self.weights,
            dropout: &self.dropout,
        };
        work.load_state(&network, &tables, state_in);
        work.forward(&network, &tables, backward);
        work.store_state(&network, &tables, batch.first_slot as usize, state_out);
        if backward {
            work.backward(&network, &tables);
            self.parameters = Some(parameters.clone());
        }
        self.works[self.last] = Some(work);
        self.tables = Some(tables);
        self.sums = None;
        Ok(())
    }

    fn reader(&mut self, parameters: &Buffer) -> Result<CubeReader> {
        if self.layout.shape.bidirectional {
            return Err(DeviceError(
                "a bidirectional network reads whole rows, not one step at a time".to_owned(),
            ));
        }
        Ok(CubeReader::new(&self.client, &self.layout, &self.recipe, parameters))
    }

    fn read(&mut self, reader: &mut CubeReader, input: StepInput<'_>, logits: &mut [f32]) -> Result<()> {
        reader.read(&self.client, &self.layout, input, logits)
    }

    fn finish_buckets(
        &mut self,
        buckets: Range<usize>,
        nodes: &[TreeNode],
        sums: &mut [Buffer],
    ) -> Result<()> {
        assert_eq!(nodes.len(), sums.len(), "finish_buckets: one buffer for each node");
        let tables = self.tables.take().expect("finish_buckets: no training step was done");
        let first_shard = tables.first_shard();
        let node_sums = match self.nodes.take() {
            Some(held) if held.is_of(nodes, first_shard) => held,
            _ => NodeSums::new(&self.client, self.shards, nodes, first_shard),
        };
        let ranges = self.layout.buckets();
        let stride = ranges.iter().map(|bucket| bucket.len()).max().unwrap_or(0);
        let needed = tables.pairs.shards() * stride;
        let room = match self.partials.take() {
            Some(room) if room.len() >= needed => room,
            _ => Buffer::new(&self.client, needed),
        };
        let partials = Partials { buffer: self.partials.insert(room), stride, at: 0 };
        let gradient = Gradient {
            network: Network {
                client: &self.client,
                layout: &self.layout,
                parameters: self.parameters.as_ref().expect("a training step was done"),
                weights: &self.weights,
                dropout: &self.dropout,
            },
            work: self.works[0].as_ref().expect("a training step was done"),
            tables: &tables,
        };
        for bucket in buckets {
            gradient.of_bucket(bucket, partials);
            node_sums.add_up(&self.client, partials, &ranges[bucket], sums);
        }
        self.nodes = Some(node_sums);
        self.tables = Some(tables);
        Ok(())
    }

    fn read_sums(&mut self) -> Result<&[StepSums]> {
        if self.sums.is_none() {
            let tables = self.tables.as_ref().expect("read_sums: no step was done");
            let results = &self.works[self.last].as_ref().expect("a step was done").results;
            let targets = match self.layout.shape.head {
                Head::EveryStep => tables.extent.places(),
                Head::Final => tables.rows,
            };
            let results = results.read_floats(&self.client, 0..softmax::RESULT * targets)?;
            self.sums = Some(tables.add_up(&results));
        }
        Ok(self.sums.as_deref().expect("they were just read"))
    }

    fn tree_add(&self, destination: &mut Buffer, source: &Buffer, range: Range<usize>) -> Result<()> {
        elements::add(&self.client, destination, source, range);
        Ok(())
    }

    fn clip_shard(&self, gradient: &mut Buffer, weight: u64, clip_norm: f64) -> Result<()> {
        let norm = self.mean_norm(gradient, weight)?;
        if norm > clip_norm {
            elements::scale(&self.client, gradient, (clip_norm / norm) as f32);
        }
        Ok(())
    }

    fn mean_norm(&self, gradient: &Buffer, weight: u64) -> Result<f64> {
        Ok(elements::squared_norm(&self.client, gradient)?.sqrt() / weight as f64)
    }

    fn update(
        &mut self,
        update: &Update,
        norm: f64,
        gradient: &Buffer,
        parameters: &mut Buffer,
        first_moment: &mut Buffer,
        second_moment: &mut Buffer,
    ) -> Result<()> {
        let gradient_scale = update.gradient_scale(norm);
        match update.rule {
            UpdateRule::Adam { updates_done, beta1, beta2, epsilon, placement } => {
                let options = AdamOptions { lr: update.learning_rate, beta1, beta2, epsilon, placement };
                let step = AdamStep::new(options, updates_done + 1, gradient_scale);
                elements::adam(&self.client, &step, gradient, parameters, first_moment, second_moment);
            }
            UpdateRule::Sgd { momentum } => {
                let (learning_rate, momentum) = (update.learning_rate as f32, momentum as f32);
                let step = SgdStep { gradient_scale, learning_rate, momentum };
                elements::sgd(&self.client, &step, gradient, parameters, first_moment);
            }
        }
        Ok(())
    }

    fn digest(&self, buffer: &Buffer, at: usize) -> Result<u64> {
        Ok(elements::digest(&self.client, buffer, at as u64)?)
    }
}

impl<R: Runtime> CubeDevice<R> {
    fn access(&self) -> &CudaAccess<R> {
        self.cuda.as_ref().expect("only a CUDA device is asked for its memory")
    }
}

impl<R: Runtime> CudaMemory<Buffer> for CubeDevice<R> {
    fn ordinal(&self) -> usize {
        self.access().ordinal
    }

    fn address(&self, buffer: &Buffer) -> Result<u64> {
        (self.access().address)(&self.client, buffer)
    }

    fn synchronize(&self) -> Result<()> {
        Ok(kernels::cube::buffer::synchronize(&self.client)?)
    }
}
