//! The replicated training state of one worker: after each step every worker holds all of it, bit for bit.

use std::ops::Range;

use model::device::{Device, DeviceError, Result};
use model::init::initial_parameters;
use protocol::control::ControlState;
use protocol::job::JobSpec;
use protocol::layout::{Progress, StateLayout};
use protocol::random::mix64;

/// Parameters, moments, recurrent state, progress and control state on a device.
pub struct Replica<D: Device> {
    /// Names, shapes and places of everything.
    pub layout: StateLayout,
    /// `[P]`
    pub parameters: D::Buffer,
    /// Adam's first moment, `[P]`.
    pub first_moment: D::Buffer,
    /// Adam's second moment, `[P]`.
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

    fn zeros(device: &D, layout: StateLayout) -> Result<Self> {
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

    /// Makes the recurrent state of the step under way the current one and counts the step.
    pub fn commit(&mut self, steps_per_epoch: u64) {
        std::mem::swap(&mut self.state, &mut self.next_state);
        self.progress = Progress::after(self.progress.step + 1, steps_per_epoch);
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
