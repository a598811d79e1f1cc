//! Parameters without the rest of a training state for PyTorch: a safetensors file under PyTorch's names.
//!
//! Its one metadata key, `network`, holds JSON: what [`Network`] says. What comes from PyTorch is read by
//! [`weights`](super::weights).

use std::borrow::Cow;
use std::collections::HashMap;

use protocol::cell::{Activation, Cell, RecurrentActivation, Reset};
use protocol::job::JobSpec;
use protocol::layout::Tensor;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};

use super::checkpoint::Checkpoint;
use super::state::StateImage;

pub(super) const NETWORK_KEY: &str = "network";

/// What a file for PyTorch says about its network.
#[derive(Serialize, Deserialize)]
pub(super) struct Network {
    cell: Cell,
    num_layers: usize,
    /// Of the first layer.
    hidden_size: usize,
    /// Of each layer.
    #[serde(default)]
    hidden_sizes: Vec<usize>,
    #[serde(default)]
    bidirectional: bool,
    #[serde(default)]
    embedding_size: u32,
    #[serde(default)]
    projection: u32,
    /// Of an RNN.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) activation: Option<Activation>,
    /// Of an LSTM or a GRU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) recurrent_activation: Option<RecurrentActivation>,
    /// Of a GRU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) reset: Option<Reset>,
    /// Of an LSTM; 0: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) cell_clip: Option<f64>,
    /// How much of an LSTM's `bias_ih` is the job's `forget_bias`, which PyTorch has no other place for.
    #[serde(default)]
    forget_bias_in_bias_ih: f64,
    /// What PyTorch's layers cannot do; [`beyond_pytorch`].
    #[serde(default)]
    beyond_pytorch: Vec<String>,
    /// The characters in the order of their token ids; null for images.
    pub(super) vocabulary: Option<String>,
    /// The label of each class, where classes have labels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) labels: Option<Vec<String>>,
}

/// The settings of a job that PyTorch's layers have no counterpart for, as TOML.
pub fn beyond_pytorch(job: &JobSpec) -> Vec<String> {
    let sizes = job.layer_sizes();
    let settings = [
        (job.reset == Reset::Before, "reset = \"before\"".to_owned()),
        (
            job.recurrent_activation == RecurrentActivation::HardSigmoid,
            "recurrent_activation = \"hard_sigmoid\"".to_owned(),
        ),
        (job.peepholes, "peepholes = true".to_owned()),
        (job.cell_clip > 0.0, format!("cell_clip = {}", job.cell_clip)),
        (
            job.projection > 0 && sizes.iter().any(|&size| size <= job.projection as usize),
            format!("projection = {}", job.projection),
        ),
        (sizes.iter().any(|&size| size != sizes[0]), format!("hidden_sizes = {:?}", job.hidden_sizes)),
    ];
    settings.into_iter().filter(|(is_set, _)| *is_set).map(|(_, setting)| setting).collect()
}

/// The parameters of a checkpoint as the content of a file for PyTorch. Equal parameters of equal networks give equal
/// bytes.
pub fn to_torch(checkpoint: &Checkpoint) -> Vec<u8> {
    let Checkpoint { image, job, vocabulary, labels, .. } = checkpoint;
    let tensors: Vec<_> =
        image.layout().tensors.iter().map(|tensor| (tensor, bytes_of(tensor, image, job))).collect();
    let views = tensors.iter().map(|(Tensor { name, shape, .. }, bytes)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes);
        (name.clone(), view.expect("a tensor of the layout has as many floats as its shape"))
    });
    let sizes = job.layer_sizes();
    let network = Network {
        cell: job.cell,
        num_layers: sizes.len(),
        hidden_size: sizes[0],
        hidden_sizes: sizes,
        bidirectional: job.bidirectional,
        embedding_size: job.embedding_size,
        projection: job.projection,
        activation: (job.cell == Cell::Rnn).then_some(job.activation),
        recurrent_activation: (job.cell != Cell::Rnn).then_some(job.recurrent_activation),
        reset: (job.cell == Cell::Gru).then_some(job.reset),
        cell_clip: (job.cell == Cell::Lstm).then_some(job.cell_clip),
        forget_bias_in_bias_ih: job.forget_bias,
        beyond_pytorch: beyond_pytorch(job),
        vocabulary: vocabulary.clone(),
        labels: labels.clone(),
    };
    let json = serde_json::to_string(&network).expect("plain values can be written as JSON");
    safetensors::serialize(views, Some(HashMap::from([(NETWORK_KEY.to_owned(), json)])))
        .expect("a layout's header is far below the format's limit")
}

/// A tensor's numbers as PyTorch has them: what the job adds to the forget gate at every step is part of the bias.
fn bytes_of<'a>(tensor: &Tensor, image: &'a StateImage, job: &JobSpec) -> Cow<'a, [u8]> {
    let stored = image.floats(tensor.range.clone());
    if job.forget_bias == 0.0 || job.cell != Cell::Lstm || !tensor.name.starts_with("rnn.bias_ih") {
        return Cow::Borrowed(stored);
    }
    let mut bytes = stored.to_vec();
    // i, f, g, o
    let gate = bytes.len() / Cell::Lstm.gates();
    for word in bytes[gate..2 * gate].as_chunks_mut::<4>().0 {
        *word = ((f64::from(f32::from_le_bytes(*word)) + job.forget_bias) as f32).to_le_bytes();
    }
    Cow::Owned(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::testing;
    use protocol::layout::StateLayout;
    use safetensors::SafeTensors;

    #[test]
    fn a_file_for_pytorch_holds_its_names_shapes_and_numbers_and_nothing_else() {
        let checkpoint = testing::finite_checkpoint();
        let bytes = to_torch(&checkpoint);
        assert_eq!(bytes, to_torch(&checkpoint));
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let mut tensors: Vec<_> =
            file.iter().map(|(name, view)| (name.to_owned(), view.shape().to_vec(), view.dtype())).collect();
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        // torch.nn.GRU(5, 2) and torch.nn.Linear(2, 5).
        let expected: [(&str, &[usize]); 6] = [
            ("head.bias", &[5]),
            ("head.weight", &[5, 2]),
            ("rnn.bias_hh_l0", &[6]),
            ("rnn.bias_ih_l0", &[6]),
            ("rnn.weight_hh_l0", &[6, 2]),
            ("rnn.weight_ih_l0", &[6, 5]),
        ];
        assert_eq!(tensors, expected.map(|(name, shape)| (name.to_owned(), shape.to_vec(), Dtype::F32)));
        for Tensor { name, range, .. } in &checkpoint.image.layout().tensors {
            assert_eq!(file.tensor(name).unwrap().data(), checkpoint.image.floats(range.clone()), "{name}");
        }
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let json = serde_json::json!({
            "cell": "gru",
            "num_layers": 1,
            "hidden_size": 2,
            "hidden_sizes": [2],
            "bidirectional": false,
            "embedding_size": 0,
            "projection": 0,
            "recurrent_activation": "sigmoid",
            "reset": "after",
            "forget_bias_in_bias_ih": 0.0,
            "beyond_pytorch": [],
            "vocabulary": "ab\n\"é",
        });
        let metadata = header.metadata().clone().unwrap();
        assert_eq!(metadata.keys().collect::<Vec<_>>(), ["network"]);
        assert_eq!(serde_json::from_str::<serde_json::Value>(&metadata["network"]).unwrap(), json);
    }

    /// A checkpoint of an LSTM with these settings, all of whose parameters are 0.25.
    fn lstm(settings: &[(&str, &str)]) -> Checkpoint {
        let job = testing::job_file("char-lstm", settings).job;
        let layout = StateLayout::of(&job, 5, 5);
        let image = StateImage::initial(&layout, &vec![0.25; layout.parameters()]);
        Checkpoint { image, job, data_digest: "d".to_owned(), vocabulary: None, labels: None }
    }

    #[test]
    fn the_forget_bias_that_is_added_at_every_step_is_part_of_the_bias_for_pytorch() {
        let bytes = to_torch(&lstm(&[("forget_bias", "1.5"), ("num_layers", "2")]));
        let file = SafeTensors::deserialize(&bytes).unwrap();
        for (name, view) in file.iter() {
            let values: Vec<f32> =
                view.data().as_chunks::<4>().0.iter().map(|&word| f32::from_le_bytes(word)).collect();
            let [i, f, g, o] = [0, 1, 2, 3].map(|gate| values.get(2 * gate..2 * gate + 2));
            match name.starts_with("rnn.bias_ih") {
                true => {
                    assert_eq!([i, f, g, o].map(Option::unwrap), [[0.25; 2], [1.75; 2], [0.25; 2], [0.25; 2]])
                }
                false => assert!(values.iter().all(|&value| value == 0.25), "{name}"),
            }
        }
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        assert!(header.metadata().as_ref().unwrap()["network"].contains("\"forget_bias_in_bias_ih\":1.5"));
    }

    #[test]
    fn what_pytorch_cannot_run_is_named() {
        let settings = [("peepholes", "true"), ("cell_clip", "3"), ("recurrent_activation", "hard_sigmoid")];
        let beyond = beyond_pytorch(&lstm(&settings).job);
        assert_eq!(beyond, ["recurrent_activation = \"hard_sigmoid\"", "peepholes = true", "cell_clip = 3"]);
        let sizes = lstm(&[("num_layers", "2"), ("hidden_sizes", "[3, 2]"), ("projection", "1")]);
        assert_eq!(beyond_pytorch(&sizes.job), ["hidden_sizes = [3, 2]"]);
        let gru = testing::job_file("char-gru", &[("reset", "before")]).job;
        assert_eq!(beyond_pytorch(&gru), ["reset = \"before\""]);
        assert_eq!(beyond_pytorch(&lstm(&[("forget_bias", "1"), ("hidden_sizes", "[3]")]).job), [""; 0]);
    }
}
