//! Where two training states part, bit by bit: which tensor, which element, how many, how far.

use std::fmt;

use protocol::control::{ControlState, EpochSums};
use protocol::layout::{Progress, StateLayout};
use serde::Serialize;

use super::checkpoint::{TensorPlace, tensor_places};
use super::record_diff::Parted;
use super::state::StateImage;

/// How two states with the same tensors differ. Elements are compared by their bits: 0 and -0 differ, by nothing.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StateDiff {
    /// The first element that differs, in the order of the image; `None` if only `words` do.
    pub first: Option<Element>,
    /// The element with the largest absolute difference; the first of several.
    pub largest: Option<Element>,
    /// Elements that differ.
    pub differing: u64,
    /// All elements.
    pub elements: u64,
    /// All tensors, moments and recurrent state included, in the order of the image.
    pub tensors: Vec<TensorDiff>,
    /// What differs of progress and control state.
    pub words: Vec<Parted>,
}

/// One element of a tensor in both states.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Element {
    /// Name of the tensor.
    pub tensor: String,
    /// Its place: `[row, column]`.
    pub index: Vec<usize>,
    /// Value in the first state; `null` in JSON if it is not finite.
    pub a: f32,
    /// Value in the second.
    pub b: f32,
    /// The bits of `a`.
    pub a_bits: String,
    /// The bits of `b`.
    pub b_bits: String,
    /// |a - b|; infinite if one of them is not a number.
    pub difference: f64,
}

/// How a tensor differs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TensorDiff {
    /// Its name.
    pub name: String,
    /// Elements that differ.
    pub differing: u64,
    /// All its elements.
    pub elements: u64,
    /// Largest absolute difference; 0 if there is none.
    pub largest: f64,
}

/// Compares two states; `None` if every bit is the same.
///
/// # Errors
/// Why they cannot be compared: their tensors differ in name or shape.
pub fn state_diff(a: &StateImage, b: &StateImage) -> Result<Option<StateDiff>, String> {
    if let Some(reason) = tensors_differ(a.layout(), b.layout()) {
        return Err(reason);
    }
    if a.bytes() == b.bytes() {
        return Ok(None);
    }
    let mut diff = StateDiff {
        first: None,
        largest: None,
        differing: 0,
        elements: 0,
        tensors: vec![],
        words: words(a, b),
    };
    for place in tensor_places(a.layout()) {
        let mut tensor = TensorDiff { name: place.name.clone(), differing: 0, elements: 0, largest: 0.0 };
        let floats = |image: &StateImage| {
            let bytes = image.floats(place.floats.clone()).chunks_exact(4);
            bytes.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect::<Vec<f32>>()
        };
        for (offset, (a, b)) in floats(a).into_iter().zip(floats(b)).enumerate() {
            tensor.elements += 1;
            if a.to_bits() == b.to_bits() {
                continue;
            }
            tensor.differing += 1;
            let difference = distance(a, b);
            tensor.largest = tensor.largest.max(difference);
            if diff.largest.as_ref().is_none_or(|largest| difference > largest.difference) {
                let element = Element::new(&place, offset, a, b);
                diff.first.get_or_insert_with(|| element.clone());
                diff.largest = Some(element);
            }
        }
        diff.differing += tensor.differing;
        diff.elements += tensor.elements;
        diff.tensors.push(tensor);
    }
    Ok(Some(diff))
}

fn distance(a: f32, b: f32) -> f64 {
    let distance = (f64::from(a) - f64::from(b)).abs();
    if distance.is_nan() { f64::INFINITY } else { distance }
}

/// The first tensor in whose name or shape two layouts differ, in words. A batch size alone changes none where no
/// recurrent state is carried.
fn tensors_differ(a: &StateLayout, b: &StateLayout) -> Option<String> {
    let (places_a, places_b) = (tensor_places(a), tensor_places(b));
    for place in &places_a {
        match places_b.iter().find(|other| other.name == place.name) {
            Some(other) if other.shape == place.shape => {}
            Some(other) => {
                return Some(format!("{} is {:?} in A and {:?} in B", place.name, place.shape, other.shape));
            }
            None => return Some(format!("only A has {}", place.name)),
        }
    }
    let extra = places_b.iter().find(|place| places_a.iter().all(|other| other.name != place.name));
    extra.map(|place| format!("only B has {}", place.name))
}

/// What differs behind the floats.
fn words(a: &StateImage, b: &StateImage) -> Vec<Parted> {
    let pairs = named_words(a).into_iter().zip(named_words(b));
    pairs
        .filter(|((_, a, _), (_, b, _))| a != b)
        .map(|((name, _, a), (_, _, b))| Parted { name: name.to_owned(), a, b })
        .collect()
}

/// Name, bits and text of each word of progress and control state.
fn named_words(image: &StateImage) -> Vec<(&'static str, u64, String)> {
    let count = |name, value: u64| (name, value, value.to_string());
    let number = |name, value: f64| (name, value.to_bits(), super::record_diff::number(value));
    let Progress { step, epoch, cursor } = image.progress();
    let ControlState {
        epoch: EpochSums { loss, weight, correct },
        first_epoch_loss,
        best_validation_loss,
        epochs_without_improvement,
        evaluated_epochs,
        learning_rate_scale,
        skipped_updates,
    } = image.control();
    vec![
        count("step", step),
        count("epoch", epoch),
        count("cursor", cursor),
        number("epoch's loss", loss),
        count("epoch's targets", weight),
        count("epoch's correct targets", correct),
        number("first epoch's loss", first_epoch_loss),
        number("best validation loss", best_validation_loss),
        count("epochs without improvement", epochs_without_improvement),
        count("evaluated epochs", evaluated_epochs),
        number("learning rate scale", learning_rate_scale),
        count("skipped updates", skipped_updates),
    ]
}

impl Element {
    fn new(place: &TensorPlace, offset: usize, a: f32, b: f32) -> Self {
        let mut rest = offset;
        let mut index: Vec<usize> = Vec::with_capacity(place.shape.len());
        for &size in place.shape.iter().rev() {
            index.push(rest % size);
            rest /= size;
        }
        index.reverse();
        let bits = |value: f32| format!("{:#010x}", value.to_bits());
        Self {
            tensor: place.name.clone(),
            index,
            a,
            b,
            a_bits: bits(a),
            b_bits: bits(b),
            difference: distance(a, b),
        }
    }
}

/// `head.weight [3, 17]: 0.5 (0x3f000000) in A, 0.25 (0x3e800000) in B`
impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tensor, index, a, b, a_bits, b_bits, .. } = self;
        write!(f, "{tensor} {index:?}: {a:?} ({a_bits}) in A, {b:?} ({b_bits}) in B")
    }
}

impl fmt::Display for StateDiff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Parted { name, a, b } in &self.words {
            writeln!(f, "{name}: {a} in A, {b} in B")?;
        }
        let (Some(first), Some(largest)) = (&self.first, &self.largest) else {
            return writeln!(f, "all {} elements are equal", self.elements);
        };
        writeln!(f, "first difference: {first}")?;
        writeln!(f, "{} of {} elements differ", self.differing, self.elements)?;
        writeln!(
            f,
            "largest difference: {:.3e} at {} {:?}",
            largest.difference, largest.tensor, largest.index
        )?;
        let width = self.tensors.iter().map(|tensor| tensor.name.len()).max().unwrap_or(0);
        writeln!(f, "\n{:<width$}  {:>10}  {:>10}  largest difference", "tensor", "differing", "elements")?;
        for TensorDiff { name, differing, elements, largest } in &self.tensors {
            writeln!(f, "{name:<width$}  {differing:>10}  {elements:>10}  {largest:.3e}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::testing;

    /// The image with the bits at `at` of its floats changed.
    fn with_bits(image: &StateImage, at: usize, change: impl Fn(u32) -> u32) -> StateImage {
        let mut bytes = image.bytes().to_vec();
        let place = &mut bytes[4 * at..4 * at + 4];
        let bits = u32::from_le_bytes(place.try_into().unwrap());
        place.copy_from_slice(&change(bits).to_le_bytes());
        StateImage::new(image.layout(), bytes).unwrap()
    }

    /// A state without numbers that are none.
    fn zeros() -> StateImage {
        let image = testing::checkpoint(17, 1).image;
        let mut bytes = image.bytes().to_vec();
        let floats = 3 * image.layout().parameters() + image.layout().recurrent();
        bytes[..4 * floats].fill(0);
        StateImage::new(image.layout(), bytes).unwrap()
    }

    #[test]
    fn equal_states_do_not_differ() {
        let image = testing::checkpoint(17, 1).image;
        assert_eq!(state_diff(&image, &image.clone()), Ok(None));
    }

    #[test]
    fn one_bit_is_found_wherever_it_is() {
        let zeros = zeros();
        let parameters = zeros.layout().parameters();
        // The first tensor is [6, 5], the second [6, 2]; the last parameter is the fifth of head.bias.
        let cases = [
            (0, "rnn.weight_ih_l0", vec![0, 0]),
            (29, "rnn.weight_ih_l0", vec![5, 4]),
            (30, "rnn.weight_hh_l0", vec![0, 0]),
            (33, "rnn.weight_hh_l0", vec![1, 1]),
            (parameters - 1, "head.bias", vec![4]),
            (parameters + 7, "adam.first_moment.rnn.weight_ih_l0", vec![1, 2]),
            (2 * parameters, "adam.second_moment.rnn.weight_ih_l0", vec![0, 0]),
            (3 * parameters + 5, "recurrent_state", vec![2, 1]),
        ];
        for (at, tensor, index) in cases {
            let diff = state_diff(&zeros, &with_bits(&zeros, at, |bits| bits ^ 1)).unwrap().unwrap();
            let first = diff.first.clone().unwrap();
            assert_eq!((&*first.tensor, &first.index), (tensor, &index));
            assert_eq!((&*first.a_bits, &*first.b_bits), ("0x00000000", "0x00000001"));
            assert_eq!((diff.differing, diff.elements), (1, 3 * parameters as u64 + 6));
            assert_eq!(diff.largest, Some(first));
            for counted in &diff.tensors {
                assert_eq!(counted.differing, u64::from(counted.name == tensor), "{}", counted.name);
            }
        }
    }

    #[test]
    fn the_largest_difference_is_not_the_first() {
        let zeros = zeros();
        let other = with_bits(&zeros, 3, |_| 0.25_f32.to_bits());
        let other = with_bits(&other, 40, |_| (-2.0_f32).to_bits());
        let other = with_bits(&other, 41, |_| 0x8000_0000);
        let diff = state_diff(&zeros, &other).unwrap().unwrap();
        assert_eq!(diff.differing, 3);
        assert_eq!(
            diff.first.as_ref().unwrap().to_string(),
            "rnn.weight_ih_l0 [0, 3]: 0.0 (0x00000000) in A, 0.25 (0x3e800000) in B"
        );
        let largest = diff.largest.as_ref().unwrap();
        assert_eq!(
            (&*largest.tensor, &largest.index, largest.difference),
            ("rnn.weight_hh_l0", &vec![5, 0], 2.0)
        );
        let diff = state_diff(&zeros, &with_bits(&other, 60, |_| f32::NAN.to_bits())).unwrap().unwrap();
        assert_eq!(diff.largest.unwrap().difference, f64::INFINITY);
    }

    #[test]
    fn minus_zero_is_another_state() {
        let zeros = zeros();
        let diff = state_diff(&zeros, &with_bits(&zeros, 8, |_| 0x8000_0000)).unwrap().unwrap();
        let first = diff.first.unwrap();
        assert_eq!((first.index, first.difference, diff.differing), (vec![1, 3], 0.0, 1));
    }

    #[test]
    fn what_differs_behind_the_floats_is_named() {
        let a = testing::checkpoint(17, 1).image;
        let mut bytes = a.bytes().to_vec();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        let b = StateImage::new(a.layout(), bytes).unwrap();
        let diff = state_diff(&a, &b).unwrap().unwrap();
        assert_eq!((diff.first, diff.differing), (None, 0));
        assert_eq!(diff.words.len(), 1);
        assert_eq!((&*diff.words[0].name, &*diff.words[0].a), ("skipped updates", "2"));
    }

    #[test]
    fn states_of_other_shapes_are_not_compared() {
        let [text, images] = [testing::checkpoint(17, 1), testing::rows_checkpoint(3)].map(|c| c.image);
        let reason = state_diff(&text, &images).unwrap_err();
        assert_eq!(reason, "rnn.weight_ih_l0 is [6, 5] in A and [2, 28] in B");
    }
    #[test]
    fn another_batch_size_is_no_other_shape_without_recurrent_state() {
        let [text, images] = [testing::checkpoint(17, 1), testing::rows_checkpoint(3)].map(|c| c.image);
        let layout = StateLayout::new(images.layout().shape.clone(), 7);
        let same = StateImage::new(&layout, images.bytes().to_vec()).unwrap();
        assert_eq!(state_diff(&images, &same), Ok(None));
        let layout = StateLayout::new(text.layout().shape.clone(), 2);
        let fewer = StateImage::new(&layout, text.bytes()[..layout.image_bytes()].to_vec()).unwrap();
        let reason = state_diff(&text, &fewer).unwrap_err();
        assert_eq!(reason, "recurrent_state is [3, 2] in A and [2, 2] in B");
    }
}
