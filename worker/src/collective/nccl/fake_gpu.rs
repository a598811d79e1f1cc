//! A device whose memory is not the host's: buffers have addresses, and its work runs when somebody waits for it, not
//! before. Whoever reads its memory without waiting finds what was there earlier.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use model::device::{CudaMemory, Device, DeviceError, Pass, Result, StepInput, Update};
use protocol::batch::Batch;
use protocol::sums::StepSums;
use protocol::tree::TreeNode;

use super::super::lock;

/// The memories of all devices of a test, by address of the first number.
#[derive(Clone, Default)]
pub(super) struct Memories(Arc<Mutex<Allocated>>);

struct Allocated {
    buffers: BTreeMap<u64, Vec<f32>>,
    next: u64,
}

impl Default for Allocated {
    fn default() -> Self {
        Self { buffers: BTreeMap::new(), next: 1 << 40 }
    }
}

impl Memories {
    fn allocate(&self, len: usize) -> u64 {
        let mut allocated = lock(&self.0);
        let address = allocated.next;
        // Nothing adjoins: a range that leaves its buffer is found out.
        allocated.next += 4 * len as u64 + 4096;
        allocated.buffers.insert(address, vec![0.0; len]);
        address
    }

    /// Runs something on the numbers at an address; `None` if they are not all of one buffer.
    pub(super) fn at<T>(&self, address: u64, len: usize, run: impl FnOnce(&mut [f32]) -> T) -> Option<T> {
        let mut allocated = lock(&self.0);
        let (start, values) = allocated.buffers.range_mut(..=address).next_back()?;
        let first = ((address - start) / 4) as usize;
        values.get_mut(first..first + len).map(run)
    }
}

pub(super) struct FakeBuffer {
    memories: Memories,
    address: u64,
    len: usize,
}

impl Drop for FakeBuffer {
    fn drop(&mut self) {
        lock(&self.memories.0).buffers.remove(&self.address);
    }
}

type Work = Box<dyn FnOnce(&Memories) + Send>;

pub(super) struct FakeGpu {
    memories: Memories,
    queue: Mutex<Vec<Work>>,
}

impl FakeGpu {
    pub(super) fn new(memories: &Memories) -> Self {
        Self { memories: memories.clone(), queue: Mutex::default() }
    }

    fn enqueue(&self, work: impl FnOnce(&Memories) + Send + 'static) {
        lock(&self.queue).push(Box::new(work));
    }

    fn run_all(&self) {
        let works = std::mem::take(&mut *lock(&self.queue));
        works.into_iter().for_each(|work| work(&self.memories));
    }
}

impl CudaMemory<FakeBuffer> for FakeGpu {
    fn ordinal(&self) -> usize {
        0
    }

    fn address(&self, buffer: &FakeBuffer) -> Result<u64> {
        Ok(buffer.address)
    }

    fn synchronize(&self) -> Result<()> {
        self.run_all();
        Ok(())
    }
}

fn cannot<T>() -> Result<T> {
    Err(DeviceError("a memory cannot compute".to_owned()))
}

impl Device for FakeGpu {
    type Buffer = FakeBuffer;
    type Reader = ();

    fn zeros(&self, len: usize) -> Result<FakeBuffer> {
        let address = self.memories.allocate(len);
        self.enqueue(move |memories| {
            memories.at(address, len, |values| values.fill(0.0)).unwrap_or_default()
        });
        Ok(FakeBuffer { memories: self.memories.clone(), address, len })
    }

    fn import(&self, buffer: &mut FakeBuffer, at: usize, values: &[f32]) -> Result<()> {
        let (address, values) = (buffer.address + 4 * at as u64, values.to_vec());
        self.enqueue(move |memories| {
            memories.at(address, values.len(), |to| to.copy_from_slice(&values)).expect("it fits");
        });
        Ok(())
    }

    fn export(&self, buffer: &FakeBuffer, range: Range<usize>, into: &mut [f32]) -> Result<()> {
        self.run_all();
        assert!(range.end <= buffer.len);
        let copied = self.memories.at(buffer.address + 4 * range.start as u64, range.len(), |values| {
            into.copy_from_slice(values);
        });
        copied.ok_or_else(|| DeviceError("no such numbers".to_owned()))
    }

    fn cuda(&self) -> Option<&dyn CudaMemory<FakeBuffer>> {
        Some(self)
    }

    fn tree_add(&self, destination: &mut FakeBuffer, source: &FakeBuffer, range: Range<usize>) -> Result<()> {
        let [destination, source] =
            [&*destination, source].map(|buffer| buffer.address + 4 * range.start as u64);
        self.enqueue(move |memories| {
            let addends = memories.at(source, range.len(), |values| values.to_vec()).expect("it is there");
            let add =
                |sums: &mut [f32]| sums.iter_mut().zip(addends).for_each(|(sum, addend)| *sum += addend);
            memories.at(destination, range.len(), add).expect("it is there");
        });
        Ok(())
    }

    fn step(&mut self, _: Pass, _: &FakeBuffer, _: &Batch, _: &FakeBuffer, _: &mut FakeBuffer) -> Result<()> {
        cannot()
    }

    fn reader(&mut self, _: &FakeBuffer) -> Result<()> {
        cannot()
    }

    fn read(&mut self, (): &mut (), _: StepInput<'_>, _: &mut [f32]) -> Result<()> {
        cannot()
    }

    fn finish_buckets(&mut self, _: Range<usize>, _: &[TreeNode], _: &mut [FakeBuffer]) -> Result<()> {
        cannot()
    }

    fn read_sums(&mut self) -> Result<&[StepSums]> {
        cannot()
    }

    fn clip_shard(&self, _: &mut FakeBuffer, _: u64, _: f64) -> Result<()> {
        cannot()
    }

    fn mean_norm(&self, _: &FakeBuffer, _: u64) -> Result<f64> {
        cannot()
    }

    fn update(
        &mut self,
        _: &Update,
        _: f64,
        _: &FakeBuffer,
        _: &mut FakeBuffer,
        _: &mut FakeBuffer,
        _: &mut FakeBuffer,
    ) -> Result<()> {
        cannot()
    }

    fn digest(&self, _: &FakeBuffer, _: usize) -> Result<u64> {
        cannot()
    }
}
