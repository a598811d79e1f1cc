//! The training state as bytes: as a worker streams it, as a checkpoint keeps it, as it is hashed.

use std::ops::Range;

use protocol::control::ControlState;
use protocol::layout::{Progress, StateLayout};
use protocol::problem::Problem;

use crate::hex::sha256_hex;

/// Parameters ‖ first moment ‖ second moment ‖ recurrent state by slot (f32, little-endian) ‖ [`Progress`] ‖
/// [`ControlState`].
#[derive(Debug, Clone, PartialEq)]
pub struct StateImage {
    layout: StateLayout,
    bytes: Vec<u8>,
}

impl StateImage {
    /// Takes the bytes of a state that has this layout.
    ///
    /// # Errors
    /// Another number of bytes than the layout asks for.
    pub fn new(layout: &StateLayout, bytes: Vec<u8>) -> Result<Self, Problem> {
        if bytes.len() != layout.image_bytes() {
            return Err(Problem::failed(format!(
                "state image has {} bytes, expected {} ({} parameters, {} floats of recurrent state)",
                bytes.len(),
                layout.image_bytes(),
                layout.parameters(),
                layout.recurrent()
            )));
        }
        Ok(Self { layout: layout.clone(), bytes })
    }

    /// The state at step 0 with these parameters `[P]`: moments and recurrent state are zeros.
    pub fn initial(layout: &StateLayout, parameters: &[f32]) -> Self {
        assert_eq!(parameters.len(), layout.parameters(), "initial: one number per parameter");
        let mut bytes = Vec::with_capacity(layout.image_bytes());
        bytes.extend(parameters.iter().flat_map(|value| value.to_le_bytes()));
        bytes.resize(layout.image_bytes() - Progress::BYTES - ControlState::BYTES, 0);
        bytes.extend(Progress::default().to_bytes());
        bytes.extend(ControlState::default().to_bytes());
        Self { layout: layout.clone(), bytes }
    }

    /// Names, shapes and places of what is inside.
    pub fn layout(&self) -> &StateLayout {
        &self.layout
    }

    /// The whole image.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The whole image, to be streamed to a worker.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// The bytes of a range of floats, counted from the start of the image.
    pub fn floats(&self, range: Range<usize>) -> &[u8] {
        &self.bytes[4 * range.start..4 * range.end]
    }

    /// The flat parameter buffer `[P]`.
    pub fn parameters(&self) -> Vec<f32> {
        let [parameters, ..] = self.layout.image_ranges();
        let (floats, _) = self.floats(parameters).as_chunks::<4>();
        floats.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
    }

    /// How far the run is.
    pub fn progress(&self) -> Progress {
        Progress::from_bytes(self.tail(0))
    }

    /// The few numbers that decide how it goes on.
    pub fn control(&self) -> ControlState {
        ControlState::from_bytes(self.tail(Progress::BYTES))
    }

    /// Replaces these numbers.
    pub fn set_control(&mut self, control: &ControlState) {
        let start = self.bytes.len() - ControlState::BYTES;
        self.bytes[start..].copy_from_slice(&control.to_bytes());
    }

    /// Whether the evaluation that belongs to its last step is done too.
    pub fn is_whole(&self) -> bool {
        !self.control().owes_evaluation(self.progress().epoch)
    }

    /// Steps done at the end of the epoch with the lowest validation loss so far; `None` before there is one.
    pub fn best_step(&self) -> Option<u64> {
        let (Progress { step, epoch, cursor }, control) = (self.progress(), self.control());
        let steps_per_epoch = step.saturating_sub(cursor).checked_div(epoch)?;
        let has_best = control.best_validation_loss.is_finite() && control.best_epoch() > 0;
        has_best.then(|| steps_per_epoch.saturating_mul(control.best_epoch()))
    }

    /// Hash of the flat parameter buffer, 64 lower-case hexadecimal digits.
    pub fn parameter_sha256(&self) -> String {
        let [parameters, ..] = self.layout.image_ranges();
        sha256_hex([self.floats(parameters)])
    }

    /// Hash of the whole image, 64 lower-case hexadecimal digits.
    pub fn state_sha256(&self) -> String {
        sha256_hex([self.bytes()])
    }

    /// `N` bytes that start `offset` bytes after the last float.
    fn tail<const N: usize>(&self, offset: usize) -> &[u8; N] {
        let start = self.layout.image_bytes() - Progress::BYTES - ControlState::BYTES + offset;
        self.bytes[start..start + N].try_into().expect("the length was checked when the image was made")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::testing;

    #[test]
    fn the_tail_is_progress_and_control() {
        let image = testing::checkpoint(17, 1).image;
        assert_eq!(image.progress(), Progress::after(17, 5));
        assert_eq!(image.control(), testing::control(1));
    }

    #[test]
    fn an_initial_state_has_its_parameters_and_else_zeros() {
        let layout = testing::checkpoint(0, 0).image.layout().clone();
        let parameters: Vec<f32> = (0..layout.parameters()).map(|i| i as f32 - 0.5).collect();
        let image = StateImage::initial(&layout, &parameters);
        assert_eq!(image.floats(0..1), (-0.5_f32).to_le_bytes());
        let [_, first, _, recurrent] = layout.image_ranges();
        assert!(image.floats(first.start..recurrent.end).iter().all(|&byte| byte == 0));
        assert_eq!((image.progress(), image.control()), Default::default());
        assert!(image.is_whole());
        assert_eq!(StateImage::new(&layout, image.bytes().to_vec()).unwrap(), image);
    }

    #[test]
    fn control_is_replaced_and_nothing_else() {
        let mut image = testing::checkpoint(17, 1).image;
        let before = image.clone();
        let control = ControlState { learning_rate_scale: 0.25, ..image.control() };
        image.set_control(&control);
        assert_eq!(image.control(), control);
        image.set_control(&before.control());
        assert_eq!(image, before);
    }

    #[test]
    fn the_best_step_is_the_end_of_the_best_epoch() {
        let of = |step, control: ControlState| {
            let mut image = testing::checkpoint(step, 1).image;
            image.set_control(&control);
            image.best_step()
        };
        let control = testing::control(1);
        assert_eq!(of(17, control), None, "no evaluation was finite");
        // Epochs have five steps, and the second of three was the best.
        let control = ControlState { best_validation_loss: 1.5, evaluated_epochs: 3, ..control };
        assert_eq!([of(15, control), of(17, control), of(3, control)], [Some(10), Some(10), None]);
    }

    #[test]
    fn hashes_cover_what_they_promise() {
        let image = testing::checkpoint(17, 1).image;
        let layout = image.layout().clone();
        let parameter_bytes = 4 * layout.parameters();
        for at in [0, parameter_bytes - 1, parameter_bytes, image.bytes().len() - 1] {
            let mut bytes = image.bytes().to_vec();
            bytes[at] ^= 1;
            let other = StateImage::new(&layout, bytes).unwrap();
            assert_ne!(other.state_sha256(), image.state_sha256(), "byte {at}");
            let same_parameters = other.parameter_sha256() == image.parameter_sha256();
            assert_eq!(same_parameters, at >= parameter_bytes, "byte {at}");
        }
    }

    #[test]
    fn another_length_is_refused_with_both_lengths() {
        let image = testing::checkpoint(17, 1).image;
        let layout = image.layout().clone();
        let mut bytes = image.into_bytes();
        bytes.pop();
        let problem = StateImage::new(&layout, bytes).unwrap_err();
        let expected = layout.image_bytes();
        let start = format!("state image has {} bytes, expected {expected} (", expected - 1);
        assert!(problem.sentence.starts_with(&start), "{problem}");
    }
}
