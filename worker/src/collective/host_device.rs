//! A device that only holds numbers: for the collective's tests.

use std::ops::Range;

use model::device::{Device, DeviceError, Pass, Result, StepInput, Update};
use protocol::batch::Batch;
use protocol::sums::StepSums;
use protocol::tree::TreeNode;

/// Host memory as a device; it cannot compute.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct HostDevice;

fn cannot<T>(what: &str) -> Result<T> {
    Err(DeviceError(format!("host memory cannot {what}")))
}

impl Device for HostDevice {
    type Buffer = Vec<f32>;
    type Reader = ();

    fn zeros(&self, len: usize) -> Result<Vec<f32>> {
        Ok(vec![0.0; len])
    }

    fn import(&self, buffer: &mut Vec<f32>, at: usize, values: &[f32]) -> Result<()> {
        buffer[at..at + values.len()].copy_from_slice(values);
        Ok(())
    }

    fn export(&self, buffer: &Vec<f32>, range: Range<usize>, into: &mut [f32]) -> Result<()> {
        into.copy_from_slice(&buffer[range]);
        Ok(())
    }

    fn host<'a>(&self, buffer: &'a Vec<f32>) -> Option<&'a [f32]> {
        Some(buffer)
    }

    fn host_mut<'a>(&self, buffer: &'a mut Vec<f32>) -> Option<&'a mut [f32]> {
        Some(buffer)
    }

    fn step(&mut self, _: Pass, _: &Vec<f32>, _: &Batch, _: &Vec<f32>, _: &mut Vec<f32>) -> Result<()> {
        cannot("run a network")
    }

    fn reader(&mut self, _: &Vec<f32>) -> Result<()> {
        cannot("run a network")
    }

    fn read(&mut self, (): &mut (), _: StepInput<'_>, _: &mut [f32]) -> Result<()> {
        cannot("run a network")
    }

    fn finish_buckets(&mut self, _: Range<usize>, _: &[TreeNode], _: &mut [Vec<f32>]) -> Result<()> {
        cannot("run a network")
    }

    fn read_sums(&mut self) -> Result<&[StepSums]> {
        cannot("run a network")
    }

    fn tree_add(&self, destination: &mut Vec<f32>, source: &Vec<f32>, range: Range<usize>) -> Result<()> {
        for (sum, addend) in destination[range.clone()].iter_mut().zip(&source[range]) {
            *sum += addend;
        }
        Ok(())
    }

    fn clip_shard(&self, _: &mut Vec<f32>, _: u64, _: f64) -> Result<()> {
        cannot("clip")
    }

    fn mean_norm(&self, _: &Vec<f32>, _: u64) -> Result<f64> {
        cannot("take a norm")
    }

    fn update(
        &mut self,
        _: &Update,
        _: f64,
        _: &Vec<f32>,
        _: &mut Vec<f32>,
        _: &mut Vec<f32>,
        _: &mut Vec<f32>,
    ) -> Result<()> {
        cannot("update")
    }

    fn digest(&self, _: &Vec<f32>, _: usize) -> Result<u64> {
        cannot("digest")
    }
}
