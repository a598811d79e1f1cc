//! The replicated training state of one worker: after each step every worker holds all of it, bit for bit.

use std::ops::Range;

use model::device::{Device, DeviceError, Result, Update};
use model::init::initial_parameters;
use protocol::control::ControlState;
use protocol::job::JobSpec;
use protocol::layout::{Progress, StateLayout};
use protocol::random::mix64;

use crate::collective::{Collective, CollectiveError};

/// Parameters, moments, recurrent state, progress and control state on a device.
pub struct Replica<D: Device> {
    /// Names, shapes and places of everything.
    pub layout: StateLayout,
    /// `[P]`
    pub parameters: D::Buffer,
    /// Adam's first moment, or the velocity of gradient descent, `[P]`.
    pub first_moment: D::Buffer,
    /// Adam's second moment, `[P]`; zeros for gradient descent.
    pub second_moment: D::Buffer,
    /// Recurrent state by slot, `[B, state_size]`, after the last finished step.
    pub state: D::Buffer,
    /// The same after the step under way; becomes [`state`](Self::state) when the step is committed.
    pub next_state: D::Buffer,
    /// The summed gradient of the step under way, `[P]`.
    pub gradient: D::Buffer,
    /// Steps done.
    pub progress: Progress,
    /// The numbers that decide how the run goes on.
    pub control: ControlState,
}

impl<D: Device> Replica<D> {
    /// The state at step 0, a function of the job alone.
    ///
    /// # Errors
    /// The device has no room.
    pub fn initial(device: &D, layout: StateLayout, job: &JobSpec) -> Result<Self> {
        let mut replica = Self::zeros(device, layout)?;
        let values = initial_parameters(&replica.layout, job);
        device.import(&mut replica.parameters, 0, &values)?;
        Ok(replica)
    }

    /// The state of an image, as [`image`](Self::image) gives it.
    ///
    /// # Errors
    /// The image has another length than the layout's, or the device has no room.
    pub fn from_image(device: &D, layout: StateLayout, image: &[u8]) -> Result<Self> {
        if image.len() != layout.image_bytes() {
            return Err(DeviceError(format!(
                "a state of {} bytes arrived, the job's has {}",
                image.len(),
                layout.image_bytes()
            )));
        }
        let mut replica = Self::zeros(device, layout)?;
        let floats = |range: Range<usize>| -> Vec<f32> {
            let bytes = &image[4 * range.start..4 * range.end];
            bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
        };
        let [parameters, first, second, state] = replica.layout.image_ranges();
        let tail = &image[4 * state.end..];
        device.import(&mut replica.parameters, 0, &floats(parameters))?;
        device.import(&mut replica.first_moment, 0, &floats(first))?;
        device.import(&mut replica.second_moment, 0, &floats(second))?;
        device.import(&mut replica.state, 0, &floats(state))?;
        let (progress, control) = tail.split_at(Progress::BYTES);
        replica.progress = Progress::from_bytes(progress.try_into().expect("the length was checked"));
        replica.control = ControlState::from_bytes(control.try_into().expect("the length was checked"));
        Ok(replica)
    }

    /// Becomes the state that the worker of rank `source` holds. Whoever holds the same already gets it once more, which is
    /// simpler than to ask.
    ///
    /// # Errors
    /// The generation broke. What has arrived by then is no state, unless it was that of the same step before: then it is
    /// as it was.
    pub fn become_that_of(
        &mut self,
        source: u32,
        device: &D,
        collective: &mut dyn Collective<D>,
    ) -> std::result::Result<(), CollectiveError> {
        let [parameters, first, second, state] = self.layout.image_ranges().map(|range| range.len());
        let buffers = [
            (&mut self.parameters, parameters),
            (&mut self.first_moment, first),
            (&mut self.second_moment, second),
            (&mut self.state, state),
        ];
        for (buffer, len) in buffers {
            let part = |rank| if rank == source { 0..len } else { 0..0 };
            let parts = (0..collective.world_size()).map(part).collect();
            let ticket = collective.begin_gather(device, buffer, parts)?;
            collective.wait(device, ticket, buffer)?;
        }
        let own: Vec<u8> = [&self.progress.to_bytes()[..], &self.control.to_bytes()].concat();
        let everybodys = collective.exchange(&own)?;
        let words = everybodys[source as usize].split_first_chunk().and_then(|(progress, control)| {
            Some((Progress::from_bytes(progress), ControlState::from_bytes(control.try_into().ok()?)))
        });
        let (progress, control) =
            words.ok_or_else(|| DeviceError("another worker sent a state that is cut short".to_owned()))?;
        (self.progress, self.control) = (progress, control);
        Ok(())
    }

    /// A state of zeros, to be filled.
    ///
    /// # Errors
    /// The device has no room.
    pub fn zeros(device: &D, layout: StateLayout) -> Result<Self> {
        let (parameters, recurrent) = (layout.parameters(), layout.recurrent());
        Ok(Self {
            layout,
            parameters: device.zeros(parameters)?,
            first_moment: device.zeros(parameters)?,
            second_moment: device.zeros(parameters)?,
            state: device.zeros(recurrent)?,
            next_state: device.zeros(recurrent)?,
            gradient: device.zeros(parameters)?,
            progress: Progress::default(),
            control: ControlState::default(),
        })
    }

    /// Applies the gradient of the step under way to the parameters.
    ///
    /// # Errors
    /// The device failed.
    pub fn update(&mut self, device: &mut D, update: &Update, gradient_norm: f64) -> Result<()> {
        let Self { gradient, parameters, first_moment, second_moment, .. } = self;
        device.update(update, gradient_norm, gradient, parameters, first_moment, second_moment)
    }

    /// Makes the recurrent state of the step under way the current one and counts the step.
    pub fn commit(&mut self, steps_per_epoch: u64) {
        std::mem::swap(&mut self.state, &mut self.next_state);
        self.progress = Progress::after(self.progress.step + 1, steps_per_epoch);
    }

    /// Counts the step under way without taking it: the recurrent state stays the one that the step began with, which at
    /// an epoch's start is the network's initial state.
    ///
    /// # Errors
    /// The device failed.
    pub fn skip(&mut self, device: &D, steps_per_epoch: u64) -> Result<()> {
        if self.progress.cursor == 0 {
            let initial = self.initial_state(device)?;
            device.import(&mut self.state, 0, &initial)?;
        }
        self.progress = Progress::after(self.progress.step + 1, steps_per_epoch);
        Ok(())
    }

    /// The recurrent state of all slots at the start of a pass over the data.
    fn initial_state(&self, device: &D) -> Result<Vec<f32>> {
        let layout = &self.layout;
        let mut slot = Vec::with_capacity(layout.shape.state_size());
        for (layer, shape) in layout.shape.layers().enumerate() {
            for ranges in layout.layer(layer) {
                let parts = [(&ranges.initial_h, shape.output_size), (&ranges.initial_c, shape.cell_size)];
                for (learnt, width) in parts {
                    let mut values = vec![0.0; width];
                    if let Some(range) = learnt {
                        device.export(&self.parameters, range.clone(), &mut values)?;
                    }
                    slot.append(&mut values);
                }
            }
        }
        Ok(slot.into_iter().cycle().take(layout.recurrent()).collect())
    }

    /// Updates done: a step that was left out has none.
    pub fn updates_done(&self) -> u64 {
        self.progress.step.saturating_sub(self.control.skipped_updates)
    }

    /// Whether the evaluation of the last whole epoch is still due.
    pub fn owes_evaluation(&self) -> bool {
        self.control.owes_evaluation(self.progress.epoch)
    }

    /// The four float parts of the state, in the order of the image.
    fn parts(&self) -> [&D::Buffer; 4] {
        [&self.parameters, &self.first_moment, &self.second_moment, &self.state]
    }

    /// The whole state as bytes: what is streamed, hashed and written to checkpoints. Parameters, moments and
    /// recurrent state as little-endian f32, then progress, then control state.
    ///
    /// # Errors
    /// The device could not hand out its numbers.
    pub fn image(&self, device: &D) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(self.layout.image_bytes());
        let mut floats = Vec::new();
        for (buffer, range) in self.parts().into_iter().zip(self.layout.image_ranges()) {
            floats.resize(range.len(), 0.0);
            device.export(buffer, 0..range.len(), &mut floats)?;
            bytes.extend(floats.iter().flat_map(|value| value.to_le_bytes()));
        }
        bytes.extend(self.progress.to_bytes());
        bytes.extend(self.control.to_bytes());
        Ok(bytes)
    }

    /// Turns one bit of the first moment's mantissas, as a fault of the memory might.
    ///
    /// # Errors
    /// The device could not hand out its numbers.
    pub(crate) fn flip_bit(&mut self, device: &D) -> Result<()> {
        let at = self.layout.parameters() / 2;
        let mut value = [0.0];
        device.export(&self.first_moment, at..at + 1, &mut value)?;
        let flipped = [f32::from_bits(value[0].to_bits() ^ 1)];
        device.import(&mut self.first_moment, at, &flipped)
    }

    /// A 64-bit digest of the whole state. Replicas with different digests have parted.
    ///
    /// # Errors
    /// The device failed.
    pub fn digest(&self, device: &D) -> Result<u64> {
        let mut digest = 0u64;
        for (buffer, range) in self.parts().into_iter().zip(self.layout.image_ranges()) {
            digest = digest.wrapping_add(device.digest(buffer, range.start)?);
        }
        let tail = [&self.progress.to_bytes()[..], &self.control.to_bytes()].concat();
        for (index, word) in tail.chunks_exact(8).enumerate() {
            let word = u64::from_le_bytes(std::array::from_fn(|b| word[b]));
            digest = digest.wrapping_add(mix64(word ^ mix64(index as u64)));
        }
        Ok(digest)
    }
}

#[cfg(test)]
mod tests {
    use kernels::Simd;
    use model::cpu::{CpuBackend, CpuDevice};
    use model::device::Backend;
    use protocol::batch::DataShape;
    use protocol::job::JobFile;
    use protocol::layout::ModelShape;
    use protocol::schedule::Schedule;

    use super::*;

    const PER_EPOCH: u64 = 4;

    fn replica(settings: &[(&str, &str)]) -> (CpuDevice, Replica<CpuDevice>) {
        let settings: Vec<_> = [("hidden_size", "3")].iter().chain(settings).collect();
        let owned: Vec<_> =
            settings.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
        let job = JobFile::resolve("char-lstm", None, &owned).unwrap().job;
        let model = ModelShape::of(&job, 5, 5);
        let schedule = Schedule { steps_per_epoch: PER_EPOCH, evaluation_batches: 0, total_steps: 9 };
        let layout = StateLayout::new(model.clone(), job.batch_size as usize);
        let data = DataShape { model, seq_len: 7, schedule };
        let device = CpuBackend::new(Simd::detect(), 1).open(&layout, &job, &data, false).unwrap();
        let replica = Replica::initial(&device, layout, &job).unwrap();
        (device, replica)
    }

    #[test]
    fn a_step_that_is_left_out_leaves_the_state_that_it_began_with() {
        for (done, stays) in [(0, 0.0), (1, 0.5), (3, 0.5), (4, 0.0)] {
            let (device, mut replica) = replica(&[]);
            replica.progress = Progress::after(done, PER_EPOCH);
            replica.state.fill(0.5);
            replica.next_state.fill(f32::NAN);
            let parameters = replica.parameters.clone();
            replica.skip(&device, PER_EPOCH).unwrap();
            assert_eq!(replica.state, vec![stays; replica.layout.recurrent()], "after {done} steps");
            assert_eq!(replica.progress, Progress::after(done + 1, PER_EPOCH));
            assert_eq!(replica.parameters, parameters);
            replica.control.skipped_updates = 1;
            assert_eq!(replica.updates_done(), done, "a step that is left out is no update");
        }
    }

    #[test]
    fn an_epoch_whose_first_step_is_left_out_begins_in_the_learnt_state() {
        let settings = [("initial_state", "learnt"), ("hidden_sizes", "[3, 2]"), ("projection", "2")];
        let (device, mut replica) = replica(&settings);
        let mut slot = Vec::new();
        for layer in 0..2 {
            let ranges = &replica.layout.layer(layer)[0];
            for range in [ranges.initial_h.clone(), ranges.initial_c.clone()].map(Option::unwrap) {
                for at in range {
                    slot.push(at as f32);
                    replica.parameters[at] = at as f32;
                }
            }
        }
        assert_eq!(slot.len(), replica.layout.shape.state_size());
        replica.state.fill(0.5);
        replica.skip(&device, PER_EPOCH).unwrap();
        assert_eq!(replica.state, slot.repeat(replica.layout.batch_size));
    }
}
