//! A training state as one safetensors file.
//!
//! Tensors, all f32: the parameters under PyTorch's names, `adam.first_moment.NAME`, `adam.second_moment.NAME`, and
//! `recurrent_state` `[batch_size, state_size]` where the network carries one. Everything else is one metadata
//! key, `lockstep`, with JSON inside: one, because the format keeps its keys in a hash map and several would come in
//! any order. There is no time and no fleet in it, so equal states of equal jobs are equal files.
//!
//! Format ledger: 1 — first.

use std::collections::HashMap;
use std::ops::Range;

use protocol::control::ControlState;
use protocol::job::{JobFile, JobSpec};
use protocol::layout::{Input, ModelShape, Progress, StateLayout};
use protocol::problem::Problem;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use super::identity::Identity;
use super::state::StateImage;
use crate::hex::{hex, sha256_hex, unhex};

/// Version of the metadata and of the tensors' names.
pub const FORMAT: u32 = 1;

pub(super) const METADATA_KEY: &str = "lockstep";

/// A training state and what must be known to go on from it or to use it.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    /// The state.
    pub image: StateImage,
    /// What is computed.
    pub job: JobSpec,
    /// Identifies the data.
    pub data_digest: String,
    /// The characters of the text in the order of their token ids; `None` for images.
    pub vocabulary: Option<String>,
    /// Task `classify`: the label of each class.
    pub labels: Option<Vec<String>>,
}

impl Checkpoint {
    /// What it is of.
    pub fn identity(&self) -> Identity<'_> {
        Identity { job: &self.job, data_digest: &self.data_digest }
    }

    /// The content of the file. Equal checkpoints give equal bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let places = tensor_places(self.image.layout());
        let views: Vec<(String, TensorView<'_>)> = places
            .into_iter()
            .map(|place| {
                let data = self.image.floats(place.floats);
                let view = TensorView::new(Dtype::F32, place.shape, data);
                (place.name, view.expect("a tensor of the layout has as many floats as its shape"))
            })
            .collect();
        let metadata = HashMap::from([(METADATA_KEY.to_owned(), Metadata::of(self).to_json())]);
        safetensors::serialize(views, Some(metadata))
            .expect("a layout's header is far below the format's limit")
    }

    /// Reads the content of a file, whatever bytes it has, and checks it against the digest inside.
    ///
    /// # Errors
    /// Anything but a whole and undamaged checkpoint of a format that this program knows.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Problem> {
        let bad = |error: &dyn std::fmt::Display| Problem::failed(format!("not a safetensors file: {error}"));
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|error| bad(&error))?;
        let tensors = SafeTensors::deserialize(bytes).map_err(|error| bad(&error))?;
        let json = header.metadata().as_ref().and_then(|metadata| metadata.get(METADATA_KEY));
        let json = json.ok_or_else(|| Problem::failed(format!("it has no metadata key '{METADATA_KEY}'")))?;
        let metadata = Metadata::from_json(json)?;
        let job = metadata.job()?;
        let layout = stored_layout(&job, metadata.vocabulary.as_deref(), &tensors)?;
        let checkpoint = Self {
            image: stored_image(&layout, &tensors, &metadata)?,
            job,
            data_digest: metadata.data_digest.clone(),
            vocabulary: metadata.vocabulary.clone(),
            labels: metadata.labels.clone(),
        };
        if Metadata::of(&checkpoint).content_digest != metadata.content_digest {
            return Err(Problem::failed("its content does not have the digest that it records"));
        }
        Ok(checkpoint)
    }
}

/// What the metadata key holds.
#[derive(Serialize, Deserialize)]
struct Metadata {
    format: u32,
    /// `[job]` as TOML, whose numbers come back bit for bit; readers of JSON may round them.
    job: String,
    data_digest: String,
    vocabulary: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    labels: Option<Vec<String>>,
    step: u64,
    epoch: u64,
    cursor: u64,
    /// The 64 bytes of [`ControlState`] as hexadecimal digits: infinities have no number in JSON.
    control: String,
    /// The same for people; never read.
    #[serde(skip_deserializing)]
    control_readable: ReadableControl,
    /// SHA-256 over this object with an empty digest ‖ the state image. It makes a file that has lost its manifest
    /// verifiable on its own.
    content_digest: String,
}

#[derive(Serialize, Default)]
struct ReadableControl {
    epoch_mean_loss: Option<f64>,
    first_epoch_loss: Option<f64>,
    best_validation_loss: Option<f64>,
    epochs_without_improvement: u64,
    learning_rate_scale: Option<f64>,
    skipped_updates: u64,
}

#[derive(Serialize, Deserialize)]
struct JobSection {
    job: JobSpec,
}

#[derive(Deserialize)]
struct FormatOnly {
    format: u32,
}

impl Metadata {
    fn of(checkpoint: &Checkpoint) -> Self {
        let Progress { step, epoch, cursor } = checkpoint.image.progress();
        let control = checkpoint.image.control();
        let finite = |value: f64| value.is_finite().then_some(value);
        let job = JobSection { job: checkpoint.job.clone() };
        let mut metadata = Self {
            format: FORMAT,
            job: toml::to_string(&job).expect("a job that was read from TOML can be written as TOML"),
            data_digest: checkpoint.data_digest.clone(),
            vocabulary: checkpoint.vocabulary.clone(),
            labels: checkpoint.labels.clone(),
            step,
            epoch,
            cursor,
            control: hex(&control.to_bytes()),
            control_readable: ReadableControl {
                epoch_mean_loss: control.epoch.mean_loss().and_then(finite),
                first_epoch_loss: finite(control.first_epoch_loss),
                best_validation_loss: finite(control.best_validation_loss),
                epochs_without_improvement: control.epochs_without_improvement,
                learning_rate_scale: finite(control.learning_rate_scale),
                skipped_updates: control.skipped_updates,
            },
            content_digest: String::new(),
        };
        metadata.content_digest = sha256_hex([metadata.to_json().as_bytes(), checkpoint.image.bytes()]);
        metadata
    }

    fn to_json(&self) -> String {
        serde_json::to_string(self).expect("plain values can be written as JSON")
    }

    fn from_json(json: &str) -> Result<Self, Problem> {
        let bad = |error: serde_json::Error| Problem::failed(format!("its metadata is damaged: {error}"));
        let FormatOnly { format } = serde_json::from_str(json).map_err(bad)?;
        if format != FORMAT {
            return Err(Problem::usage(format!(
                "it has checkpoint format {format}, this program reads {FORMAT}"
            ))
            .hint("read it with the version of lockstep that wrote it"));
        }
        serde_json::from_str(json).map_err(bad)
    }

    /// The job, whose sizes are checked by the rules for any job: sizes of a damaged file could be enormous.
    fn job(&self) -> Result<JobSpec, Problem> {
        let bad = |what: &str| Problem::failed(format!("the job in its metadata is damaged: {what}"));
        let section: JobSection = toml::from_str(&self.job).map_err(|error| bad(error.message()))?;
        // Every key is given, so the preset fills in nothing; what counts is the check.
        JobFile::resolve("char-lstm", Some(&self.job), &[]).map_err(|problem| bad(&problem.sentence))?;
        Ok(section.job)
    }
}

/// One tensor of a checkpoint.
pub(super) struct TensorPlace {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    /// Its place in the state image.
    pub(super) floats: Range<usize>,
}

/// All tensors of a checkpoint in the order of the state image.
pub(super) fn tensor_places(layout: &StateLayout) -> Vec<TensorPlace> {
    let [parameters, first, second, recurrent] = layout.image_ranges();
    let groups = [("", parameters), ("adam.first_moment.", first), ("adam.second_moment.", second)];
    let mut places: Vec<TensorPlace> = groups
        .into_iter()
        .flat_map(|(prefix, group)| {
            layout.tensors.iter().map(move |tensor| TensorPlace {
                name: format!("{prefix}{}", tensor.name),
                shape: tensor.shape.clone(),
                floats: group.start + tensor.range.start..group.start + tensor.range.end,
            })
        })
        .collect();
    if !recurrent.is_empty() {
        let shape = vec![layout.batch_size, layout.shape.state_size()];
        places.push(TensorPlace { name: "recurrent_state".to_owned(), shape, floats: recurrent });
    }
    places
}

/// The layout of the tensors of a file. Width of the input and number of classes are what the tensors have: only
/// the data set knows them otherwise.
fn stored_layout(
    job: &JobSpec,
    vocabulary: Option<&str>,
    tensors: &SafeTensors<'_>,
) -> Result<StateLayout, Problem> {
    let width = |name: &str, dimension: usize, [rows, columns]: [Option<usize>; 2]| {
        let tensor = tensors.tensor(name).map_err(|_| Problem::failed(format!("it has no tensor {name}")))?;
        let fits = tensor.shape().len() == 2
            && rows.is_none_or(|rows| tensor.shape()[0] == rows)
            && columns.is_none_or(|columns| tensor.shape()[1] == columns);
        match tensor.shape().get(dimension) {
            Some(&size) if fits && size > 0 => Ok(size),
            _ => Err(Problem::failed(format!(
                "tensor {name} has shape {:?}, which does not fit {}",
                tensor.shape(),
                job.network()
            ))),
        }
    };
    // With one side fixed and above zero, the length of the file bounds the other.
    let network = ModelShape::of(job, 1, 1);
    let input_size = match network.input {
        Input::Embedding { size, .. } => width("embedding.weight", 0, [None, Some(size)])?,
        _ => width("rnn.weight_ih_l0", 1, [Some(network.layer(0).gate_size()), None])?,
    };
    let classes = width("head.weight", 0, [None, Some(network.output_width())])?;
    let reset = vocabulary.and_then(|known| known.chars().position(|c| Some(c) == job.reset_character()));
    let shape = ModelShape {
        reset_token: reset.map(|token| token as u16),
        ..ModelShape::of(job, input_size, classes)
    };
    let layout = StateLayout::new(shape, job.batch_size as usize);
    let places = tensor_places(&layout);
    for place in &places {
        let tensor = tensors
            .tensor(&place.name)
            .map_err(|_| Problem::failed(format!("it has no tensor {}", place.name)))?;
        if tensor.shape() != place.shape || tensor.dtype() != Dtype::F32 {
            return Err(Problem::failed(format!(
                "tensor {} is {:?} {:?}, expected F32 {:?}",
                place.name,
                tensor.dtype(),
                tensor.shape(),
                place.shape
            )));
        }
    }
    if tensors.len() != places.len() {
        return Err(Problem::failed(format!("it has {} tensors, expected {}", tensors.len(), places.len())));
    }
    Ok(layout)
}

fn stored_image(
    layout: &StateLayout,
    tensors: &SafeTensors<'_>,
    metadata: &Metadata,
) -> Result<StateImage, Problem> {
    let mut bytes = Vec::with_capacity(layout.image_bytes());
    for place in tensor_places(layout) {
        bytes.extend_from_slice(tensors.tensor(&place.name).expect("its shape was just checked").data());
    }
    let control = unhex::<{ ControlState::BYTES }>(&metadata.control)
        .ok_or_else(|| Problem::failed("its metadata is damaged: control is not 128 hexadecimal digits"))?;
    let progress = Progress { step: metadata.step, epoch: metadata.epoch, cursor: metadata.cursor };
    bytes.extend(progress.to_bytes());
    bytes.extend(control);
    StateImage::new(layout, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::testing;
    use proptest::prelude::*;

    #[test]
    fn a_checkpoint_comes_back_bit_for_bit() {
        for checkpoint in [testing::checkpoint(17, 1), testing::rows_checkpoint(3)] {
            let read = Checkpoint::from_bytes(&checkpoint.to_bytes()).unwrap();
            // Images hold arbitrary bit patterns, not-a-numbers included, and are compared as bytes.
            assert_eq!(read, checkpoint);
        }
    }

    #[test]
    fn equal_states_are_equal_files() {
        let bytes = testing::checkpoint(17, 1).to_bytes();
        for _ in 0..20 {
            assert!(
                testing::checkpoint(17, 1).to_bytes() == bytes,
                "a second file of the same state differs"
            );
        }
        assert!(testing::checkpoint(18, 1).to_bytes() != bytes);
    }

    #[test]
    fn other_programs_find_the_tensors_by_pytorchs_names() {
        let checkpoint = testing::checkpoint(17, 1);
        let bytes = checkpoint.to_bytes();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let shape = |name: &str| tensors.tensor(name).unwrap().shape().to_vec();
        assert_eq!(shape("rnn.weight_ih_l0"), [6, 5]);
        assert_eq!(shape("adam.second_moment.head.bias"), [5]);
        assert_eq!(shape("recurrent_state"), [3, 2]);
        assert_eq!(tensors.len(), 3 * 6 + 1);
        let weight = tensors.tensor("rnn.weight_ih_l0").unwrap().data();
        assert_eq!(weight, checkpoint.image.floats(0..30));

        let bytes = testing::rows_checkpoint(3).to_bytes();
        assert!(SafeTensors::deserialize(&bytes).unwrap().tensor("recurrent_state").is_err());
    }

    /// Rewrites the metadata of a valid file, with the tensors as they are.
    fn with_metadata(change: impl Fn(&mut serde_json::Value)) -> Vec<u8> {
        let bytes = testing::checkpoint(17, 1).to_bytes();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let mut json = serde_json::from_str(&header.metadata().as_ref().unwrap()[METADATA_KEY]).unwrap();
        change(&mut json);
        let metadata = HashMap::from([(METADATA_KEY.to_owned(), json.to_string())]);
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        safetensors::serialize(tensors.tensors(), Some(metadata)).unwrap()
    }

    #[test]
    fn metadata_that_was_changed_is_refused_with_the_reason() {
        type Change = fn(&mut serde_json::Value);
        let job = |from: &'static str, to: &'static str| {
            move |json: &mut serde_json::Value| {
                let job = json["job"].as_str().unwrap();
                assert!(job.contains(from), "{job}");
                json["job"] = job.replace(from, to).into();
            }
        };
        let cases: [(Vec<u8>, &str); 9] = [
            (
                with_metadata((|j| j["format"] = 2.into()) as Change),
                "checkpoint format 2, this program reads 1",
            ),
            (with_metadata((|j| j["step"] = 18.into()) as Change), "does not have the digest"),
            (with_metadata((|j| j["vocabulary"] = "abc".into()) as Change), "does not have the digest"),
            (with_metadata((|j| j["control"] = "00".into()) as Change), "128 hexadecimal digits"),
            (with_metadata((|j| j["job"] = "".into()) as Change), "the job in its metadata is damaged"),
            (
                with_metadata(job("hidden_size = 2", "hidden_size = 4294967295")),
                "the most supported is 16384",
            ),
            (with_metadata(job("hidden_size = 2", "hidden_size = 3")), "does not fit 1 × gru 3"),
            (with_metadata(job("num_layers = 1", "num_layers = 2")), "it has no tensor rnn.weight_ih_l1"),
            (
                with_metadata(job("batch_size = 3", "batch_size = 2")),
                "recurrent_state is F32 [3, 2], expected F32 [2, 2]",
            ),
        ];
        for (bytes, reason) in cases {
            let problem = Checkpoint::from_bytes(&bytes).unwrap_err();
            assert!(problem.sentence.contains(reason), "'{problem}' does not say '{reason}'");
        }
        // What people read is derived from the rest, and may be anything.
        let bytes = with_metadata(|json| json["control_readable"] = 1.into());
        assert_eq!(Checkpoint::from_bytes(&bytes).unwrap(), testing::checkpoint(17, 1));
    }

    #[test]
    fn tensors_of_no_size_are_refused() {
        let bytes = testing::checkpoint(17, 1).to_bytes();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        for shape in [vec![6, 0], vec![0, usize::MAX], vec![], vec![0; 3]] {
            let empty = TensorView::new(Dtype::F32, shape.clone(), &[]);
            let Ok(empty) = empty else { continue };
            let mut tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
            for (name, view) in &mut tensors {
                if name == "rnn.weight_ih_l0" {
                    *view = empty.clone();
                }
            }
            let bytes = safetensors::serialize(tensors, header.metadata().clone()).unwrap();
            let problem = Checkpoint::from_bytes(&bytes).unwrap_err();
            assert!(problem.sentence.contains("rnn.weight_ih_l0 has shape"), "{shape:?}: {problem}");
        }
    }

    /// Without a manifest, a damaged file may only be accepted where the damage changed nothing of the content.
    fn refused_or_unchanged(bytes: &[u8]) {
        if let Ok(read) = Checkpoint::from_bytes(bytes) {
            assert_eq!(read, testing::checkpoint(17, 1));
        }
    }

    #[test]
    fn no_changed_byte_changes_what_is_read() {
        let mut bytes = testing::checkpoint(17, 1).to_bytes();
        for at in 0..bytes.len() {
            for mask in [0x01, 0x20, 0xff] {
                bytes[at] ^= mask;
                refused_or_unchanged(&bytes);
                bytes[at] ^= mask;
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn no_bytes_make_the_reader_panic(
            at in 0.0..1.0f64, removed in 0usize..300, inserted in prop::collection::vec(any::<u8>(), 0..40),
        ) {
            let mut bytes = testing::checkpoint(17, 1).to_bytes();
            let start = (at * bytes.len() as f64) as usize;
            let end = (start + removed).min(bytes.len());
            bytes.splice(start..end, inserted.iter().copied());
            refused_or_unchanged(&bytes);
            refused_or_unchanged(&inserted);
        }
    }
}
