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

    /// Whether the evaluation that belongs to its last step is done too.
    pub fn is_whole(&self) -> bool {
        !self.control().owes_evaluation(self.progress().epoch)
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
