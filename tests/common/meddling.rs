//! A device that hands other rows to the kernels than the coordinator sent, in one step; or breaks what comes out of
//! some steps; or says that it computes other bits. Everything else is the CPU's.

use std::ops::Range;
use std::time::Duration;

use kernels::Simd;
use model::cpu::{CpuBackend, CpuDevice};
use model::device::{Backend, Device, Pass, Result, StepInput, Update};
use protocol::batch::{Batch, DataShape, Inputs};
use protocol::job::{JobSpec, Precision};
use protocol::layout::StateLayout;
use protocol::sums::StepSums;
use protocol::tree::TreeNode;

/// Which rows the kernels get; all rows of such tests have one length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rows {
    /// Those that were sent.
    AsSent,
    /// In this step (the first is 1) all but the last of this worker.
    DropOneIn(u64),
    /// In this step this worker's first row twice, and not its second.
    RepeatOneIn(u64),
}

/// What is not finite that comes out of some training steps (the first is 1), besides the recurrent state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Broken {
    /// Nothing.
    Nothing,
    /// Losses and gradients.
    Losses(&'static [u64]),
    /// Gradients behind finite losses.
    Gradients(&'static [u64]),
}

/// Opens such devices.
#[derive(Debug, Clone)]
pub(crate) struct Meddling {
    pub(crate) rows: Rows,
    pub(crate) broken: Broken,
    /// How much longer than necessary it takes for a training step.
    pub(crate) delay: Duration,
    /// What its bits depend on, if it is to say something else than the CPU.
    pub(crate) bits: Option<&'static str>,
}

impl Meddling {
    /// A device that does what it should.
    pub(crate) const HONEST: Self =
        Self { rows: Rows::AsSent, broken: Broken::Nothing, delay: Duration::ZERO, bits: None };

    fn cpu() -> CpuBackend {
        CpuBackend::new(Simd::detect(), 1)
    }
}

impl Backend for Meddling {
    type Device = MeddlingDevice;

    fn describe(&self) -> String {
        format!("{self:?}")
    }

    fn bits(&self) -> String {
        self.bits.map_or_else(|| Self::cpu().bits(), str::to_owned)
    }

    fn threads(&self) -> usize {
        Self::cpu().threads()
    }

    fn has(&self, precision: Precision) -> bool {
        Self::cpu().has(precision)
    }

    fn open(
        &self,
        layout: &StateLayout,
        job: &JobSpec,
        data: &DataShape,
        recompute: bool,
    ) -> Result<MeddlingDevice> {
        Ok(MeddlingDevice {
            rows: self.rows,
            broken: self.broken,
            delay: self.delay,
            state_size: layout.shape.state_size(),
            cpu: Self::cpu().open(layout, job, data, recompute)?,
            breaks_gradients: false,
            sums: Vec::new(),
        })
    }
}

pub(crate) struct MeddlingDevice {
    rows: Rows,
    broken: Broken,
    delay: Duration,
    state_size: usize,
    cpu: CpuDevice,
    /// In the step under way.
    breaks_gradients: bool,
    /// The sums of the step under way.
    sums: Vec<StepSums>,
}

impl Device for MeddlingDevice {
    type Buffer = <CpuDevice as Device>::Buffer;
    type Reader = <CpuDevice as Device>::Reader;

    fn step(
        &mut self,
        pass: Pass,
        parameters: &Self::Buffer,
        batch: &Batch,
        state_in: &Self::Buffer,
        state_out: &mut Self::Buffer,
    ) -> Result<()> {
        let changed = match (pass, self.rows) {
            (Pass::Train { step }, Rows::DropOneIn(bad)) if step + 1 == bad => without_last_row(batch),
            (Pass::Train { step }, Rows::RepeatOneIn(bad)) if step + 1 == bad => with_first_row_twice(batch),
            _ => batch.clone(),
        };
        self.cpu.step(pass, parameters, &changed, state_in, state_out)?;
        if let Pass::Train { .. } = pass {
            std::thread::sleep(self.delay);
        }
        self.sums = self.cpu.read_sums()?.to_vec();
        let (steps, breaks_losses) = match self.broken {
            Broken::Nothing => (&[][..], false),
            Broken::Losses(steps) => (steps, true),
            Broken::Gradients(steps) => (steps, false),
        };
        self.breaks_gradients = matches!(pass, Pass::Train { step } if steps.contains(&(step + 1)));
        if self.breaks_gradients {
            let first = batch.first_slot as usize * self.state_size;
            state_out[first..first + batch.rows() * self.state_size].fill(f32::NAN);
            for sums in self.sums.iter_mut().filter(|_| breaks_losses) {
                (sums.loss, sums.non_finite) = (f64::INFINITY, true);
            }
        }
        Ok(())
    }

    fn zeros(&self, len: usize) -> Result<Self::Buffer> {
        self.cpu.zeros(len)
    }

    fn import(&self, buffer: &mut Self::Buffer, at: usize, values: &[f32]) -> Result<()> {
        self.cpu.import(buffer, at, values)
    }

    fn export(&self, buffer: &Self::Buffer, range: Range<usize>, into: &mut [f32]) -> Result<()> {
        self.cpu.export(buffer, range, into)
    }

    fn reader(&mut self, parameters: &Self::Buffer) -> Result<Self::Reader> {
        self.cpu.reader(parameters)
    }

    fn read(&mut self, reader: &mut Self::Reader, input: StepInput<'_>, logits: &mut [f32]) -> Result<()> {
        self.cpu.read(reader, input, logits)
    }

    fn finish_buckets(
        &mut self,
        buckets: Range<usize>,
        nodes: &[TreeNode],
        sums: &mut [Self::Buffer],
    ) -> Result<()> {
        self.cpu.finish_buckets(buckets, nodes, sums)?;
        for sum in sums.iter_mut().filter(|_| self.breaks_gradients) {
            sum.fill(f32::NAN);
        }
        Ok(())
    }

    fn read_sums(&mut self) -> Result<&[StepSums]> {
        Ok(&self.sums)
    }

    fn tree_add(
        &self,
        destination: &mut Self::Buffer,
        source: &Self::Buffer,
        range: Range<usize>,
    ) -> Result<()> {
        self.cpu.tree_add(destination, source, range)
    }

    fn clip_shard(&self, partial: &mut Self::Buffer, weight: u64, clip_norm: f64) -> Result<()> {
        self.cpu.clip_shard(partial, weight, clip_norm)
    }

    fn mean_norm(&self, gradient: &Self::Buffer, weight: u64) -> Result<f64> {
        self.cpu.mean_norm(gradient, weight)
    }

    fn update(
        &mut self,
        update: &Update,
        norm: f64,
        gradient: &Self::Buffer,
        parameters: &mut Self::Buffer,
        first_moment: &mut Self::Buffer,
        second_moment: &mut Self::Buffer,
    ) -> Result<()> {
        self.cpu.update(update, norm, gradient, parameters, first_moment, second_moment)
    }

    fn digest(&self, buffer: &Self::Buffer, at: usize) -> Result<u64> {
        self.cpu.digest(buffer, at)
    }
}

fn without_last_row(batch: &Batch) -> Batch {
    let mut batch = batch.clone();
    let rows = batch.rows() - 1;
    batch.sample_ids.pop();
    batch.shards.last_mut().unwrap().rows.end = rows;
    batch.lengths.pop();
    batch.paddings.pop();
    match &mut batch.inputs {
        Inputs::Tokens(tokens) => tokens.truncate(tokens.len() / (rows + 1) * rows),
        Inputs::LabelledTokens { .. } => unreachable!("no audited run here classifies text"),
        Inputs::Bytes { bytes, labels } => {
            bytes.truncate(bytes.len() / (rows + 1) * rows);
            labels.pop();
        }
    }
    batch
}

fn with_first_row_twice(batch: &Batch) -> Batch {
    let mut batch = batch.clone();
    let rows = batch.rows();
    batch.sample_ids[1] = batch.sample_ids[0];
    match &mut batch.inputs {
        Inputs::LabelledTokens { .. } => unreachable!("no audited run here classifies text"),
        Inputs::Tokens(tokens) => {
            let row = tokens.len() / rows;
            tokens.copy_within(0..row, row);
        }
        Inputs::Bytes { bytes, labels } => {
            let row = bytes.len() / rows;
            bytes.copy_within(0..row, row);
            labels[1] = labels[0];
        }
    }
    batch
}
