//! The calls of the step loop on one device that has all shards: no feed, no collective, no coordinator.

use kernels::Simd;
use model::cpu::{CpuBackend, CpuDevice};
use model::device::{Backend, Device, DeviceError, Pass, Result, Update};
use protocol::job::Clip;
use protocol::sums::StepSums;
use protocol::tree::{self, Addition, TreeNode};
use worker::replica::Replica;
use worker::train::summed_nodes;

use crate::workload::Workload;

/// A CPU device with the state of a run.
pub struct Trainer<'a> {
    workload: &'a Workload,
    device: CpuDevice,
    replica: Replica<CpuDevice>,
    /// The nodes whose gradients the device sums: the root of the tree or, where shards are clipped, its leaves.
    nodes: Vec<TreeNode>,
    /// Their gradients, `[P]` each; the first is that of the batch after a step.
    sums: Vec<Vec<f32>>,
}

impl<'a> Trainer<'a> {
    /// A run at step 0.
    ///
    /// # Errors
    /// The device's threads cannot be started.
    pub fn new(workload: &'a Workload, simd: Simd, threads: usize) -> Result<Self> {
        let Workload { job, data, layout, .. } = workload;
        let device = CpuBackend::new(simd, threads).open(layout, job, data, false)?;
        let replica = Replica::initial(&device, layout.clone(), job)?;
        let nodes = summed_nodes(job, 0..job.shards);
        let sums = nodes.iter().map(|_| device.zeros(layout.parameters())).collect::<Result<_>>()?;
        Ok(Self { workload, device, replica, nodes, sums })
    }

    /// One whole training step: forward, backward, the tree over the shards, clip, optimizer. Gives the mean loss.
    ///
    /// # Errors
    /// The gradient is not finite, which no time should be reported of.
    pub fn step(&mut self) -> Result<f64> {
        let Self { workload, device, replica, nodes, sums } = self;
        let (job, step) = (&workload.job, replica.progress.step);
        let Replica { parameters, first_moment, second_moment, state, next_state, .. } = replica;

        device.step(Pass::Train { step }, parameters, workload.batch(step), state, next_state)?;
        let buckets = workload.layout.buckets();
        device.finish_buckets(0..buckets.len(), nodes, sums)?;
        let by_shard = device.read_sums()?.to_vec();
        if job.clip == Clip::Shard {
            for (gradient, of_shard) in sums.iter_mut().zip(&by_shard) {
                device.clip_shard(gradient, of_shard.weight, job.clip_norm)?;
            }
            add_shards(device, sums, &buckets)?;
        }
        let gradient = &sums[0];
        let sums = StepSums::total(&by_shard);
        let norm = device.mean_norm(gradient, sums.weight)?;
        if !sums.is_finite(norm) {
            return Err(DeviceError(format!("step {step} is not finite: gradient norm {norm}")));
        }
        let update = Update::new(job, step, sums.weight, job.learning_rate);
        device.update(&update, norm, gradient, parameters, first_moment, second_moment)?;
        replica.commit(workload.data.schedule.steps_per_epoch);
        Ok(sums.mean_loss())
    }
}

/// Adds all shards' gradients along the tree.
fn add_shards(device: &CpuDevice, shards: &mut [Vec<f32>], buckets: &[std::ops::Range<usize>]) -> Result<()> {
    for Addition { left, right } in tree::tree(shards.len() as u32) {
        let [destination, source] = shards
            .get_disjoint_mut([left as usize, right as usize])
            .expect("an addition has two distinct operands");
        for bucket in buckets {
            device.tree_add(destination, source, bucket.clone())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_move_the_parameters_alike_for_any_clip_and_thread_count() {
        let loss = |clip: &str, threads| {
            let settings = [("clip", clip), ("seq_len", "6"), ("hidden_size", "16")]
                .map(|(key, value)| (key.to_owned(), value.to_owned()));
            let workload = Workload::new("char-gru", &settings).unwrap();
            let mut trainer = Trainer::new(&workload, Simd::detect(), threads).unwrap();
            let losses = [(); 3].map(|()| trainer.step().unwrap());
            assert!(losses[0] != losses[1], "another batch, other parameters");
            losses
        };
        assert_eq!(loss("global", 1), loss("global", 2));
        // The norm is far below 5: no clipping acts, and both orders of calls add the same numbers.
        assert_eq!(loss("global", 1), loss("shard", 1));
    }
}
