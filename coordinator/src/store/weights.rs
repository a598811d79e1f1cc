//! The parameters of some network to start from, wherever they come from: a run, a checkpoint, a safetensors file under
//! PyTorch's names, or NumPy's arrays under TensorFlow's.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::Path;

use protocol::cell::{Activation, Cell, RecurrentActivation, Reset};
use protocol::job::JobSpec;
use protocol::layout::Tensor;
use protocol::problem::{Exit, Problem};
use safetensors::tensor::{Dtype, SafeTensors};
use serde::Serialize;

use super::checkpoint::{Checkpoint, METADATA_KEY};
use super::gate_order::GateOrder;
use super::load::newest_of_run;
use super::npz::{is_npz, read_npz};
use super::tensorflow::from_arrays;
use super::torch::{NETWORK_KEY, Network};

/// How the tensors of a safetensors file must be called.
const NAMES: &str = "the tensors are called rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0, rnn.bias_hh_l0 and so \
                     on for each layer, head.weight, head.bias, as in a module with rnn = torch.nn.LSTM(...) and \
                     head = torch.nn.Linear(...)";

/// The parameters of some network, as they were found, but under our names and in our shapes and order.
#[derive(Debug, Clone, PartialEq)]
pub struct Weights {
    /// Where, for people: the path, and the step of a checkpoint.
    pub origin: String,
    /// The characters of the text in the order of their token ids, if they are known.
    pub vocabulary: Option<Vec<char>>,
    /// The label of each class, where classes have labels and they are known.
    pub labels: Option<Vec<String>>,
    /// What an LSTM's forget gate gets at every step besides the biases, where these parameters come from.
    pub forget_bias: f64,
    /// By PyTorch's names.
    pub(super) tensors: BTreeMap<String, WeightTensor>,
    pub(super) meaning: Meaning,
}

/// One tensor.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct WeightTensor {
    /// Row-major shape.
    pub(super) shape: Vec<usize>,
    /// As many numbers as the shape has places, all finite.
    pub(super) values: Vec<f32>,
}

/// What the same numbers under the same names may mean different things by, where it is known.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Meaning {
    pub(super) activation: Option<Activation>,
    pub(super) recurrent_activation: Option<RecurrentActivation>,
    pub(super) reset: Option<Reset>,
    /// 0: none.
    pub(super) cell_clip: Option<f64>,
}

/// What TensorFlow's arrays do not say about themselves.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ArrayOptions {
    /// The order of the gates; `None`: TensorFlow 1's, or Keras' where `kernel` and `recurrent_kernel` are apart.
    pub gates: Option<GateOrder>,
    /// What the forget gate got at every step besides the bias; `None`: 1 of TensorFlow 1's order, else 0.
    pub forget_bias: Option<f64>,
}

impl Weights {
    /// Reads the newest checkpoint of a run directory, a checkpoint, any safetensors file, or a `.npz` file. Only of the
    /// last may there be `options`; where its arrays fit several cells, they are of `cell`.
    ///
    /// # Errors
    /// There is nothing of the kind, it is damaged, or a tensor is not of finite f32 numbers.
    pub fn read(path: &Path, cell: Cell, options: &ArrayOptions) -> Result<Self, Problem> {
        let origin = path.display().to_string();
        if path.is_dir() {
            refuse_options(&origin, options)?;
            let newest = newest_of_run(path).map_err(|problem| Problem { exit: Exit::Usage, ..problem })?;
            return Self::of_checkpoint(&origin, &newest.checkpoint);
        }
        let bytes =
            std::fs::read(path).map_err(|error| Problem::usage(format!("cannot read {origin}: {error}")))?;
        Self::from_bytes(&origin, &bytes, cell, options)
    }

    /// The same of the content of a file that people know as `origin`.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn from_bytes(
        origin: &str,
        bytes: &[u8],
        cell: Cell,
        options: &ArrayOptions,
    ) -> Result<Self, Problem> {
        if is_npz(bytes) {
            return from_arrays(origin, read_npz(origin, bytes)?, cell, options)?.checked();
        }
        refuse_options(origin, options)?;
        let unreadable = |error: &dyn Display| {
            Problem::usage(format!("{origin} is not a safetensors file: {error}")).hint(
                "give a run directory, a checkpoint, a file written by safetensors.torch.save_file, or one by \
                 numpy.savez",
            )
        };
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|error| unreadable(&error))?;
        let metadata = header.metadata().clone().unwrap_or_default();
        if metadata.contains_key(METADATA_KEY) {
            let checkpoint = Checkpoint::from_bytes(bytes).map_err(|problem| of_file(origin, problem))?;
            return Self::of_checkpoint(origin, &checkpoint);
        }
        let file = SafeTensors::deserialize(bytes).map_err(|error| unreadable(&error))?;
        let network = metadata.get(NETWORK_KEY).map(|json| serde_json::from_str::<Network>(json)).transpose();
        let network = network.map_err(|error| {
            Problem::usage(format!("the metadata key '{NETWORK_KEY}' of {origin} is damaged: {error}"))
        })?;
        let mut tensors = BTreeMap::new();
        for (name, view) in file.iter() {
            if view.dtype() != Dtype::F32 {
                return Err(Problem::usage(format!(
                    "tensor {name} of {origin} is {:?}, expected F32",
                    view.dtype()
                ))
                .hint("save it as 32-bit floats: tensor.float()"));
            }
            tensors.insert(name.to_owned(), WeightTensor::new(view.shape(), view.data()));
        }
        let meaning = network.as_ref().map_or(Meaning::default(), |network| Meaning {
            activation: network.activation,
            recurrent_activation: network.recurrent_activation,
            reset: network.reset,
            cell_clip: network.cell_clip,
        });
        let labels = network.as_ref().and_then(|network| network.labels.clone());
        let vocabulary = network.and_then(|network| network.vocabulary);
        let vocabulary = vocabulary.map(|characters| characters.chars().collect());
        Self { origin: origin.to_owned(), vocabulary, labels, forget_bias: 0.0, tensors, meaning }.checked()
    }

    fn of_checkpoint(origin: &str, checkpoint: &Checkpoint) -> Result<Self, Problem> {
        let Checkpoint { image, job, vocabulary, labels, .. } = checkpoint;
        let tensors = image.layout().tensors.iter().map(|Tensor { name, shape, range }| {
            (name.clone(), WeightTensor::new(shape, image.floats(range.clone())))
        });
        let weights = Self {
            origin: format!("{origin} ({} steps done)", image.progress().step),
            vocabulary: vocabulary.as_ref().map(|characters| characters.chars().collect()),
            labels: labels.clone(),
            forget_bias: job.forget_bias,
            tensors: tensors.collect(),
            meaning: Meaning {
                activation: Some(job.activation),
                recurrent_activation: Some(job.recurrent_activation),
                reset: Some(job.reset),
                cell_clip: Some(job.cell_clip),
            },
        };
        weights.checked()
    }

    fn checked(self) -> Result<Self, Problem> {
        for (name, tensor) in &self.tensors {
            if let Some(value) = tensor.values.iter().find(|value| !value.is_finite()) {
                return Err(Problem::usage(format!("tensor {name} of {} holds {value}", self.origin))
                    .hint("these parameters are of a training that has failed; take earlier ones"));
            }
        }
        Ok(self)
    }

    /// Whether there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The tensor of this name, which must have this shape.
    ///
    /// # Errors
    /// There is none, or it has another shape; the hint says of what network the parameters are.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<&[f32], Problem> {
        let Some(tensor) = self.tensors.get(name) else {
            return Err(Problem::usage(format!("{} has no tensor {name}", self.origin))
                .hint(self.settings().unwrap_or(NAMES.to_owned())));
        };
        if tensor.shape == shape {
            return Ok(&tensor.values);
        }
        let sentence =
            format!("tensor {name} is {:?} in {}, {shape:?} in this job", tensor.shape, self.origin);
        let problem = Problem::usage(sentence);
        Err(match self.settings() {
            Some(settings) => problem.hint(settings),
            None => problem,
        })
    }

    /// Checks that there is no tensor but those of these names.
    ///
    /// # Errors
    /// There is one; it is named.
    pub fn only(&self, names: &[Tensor]) -> Result<(), Problem> {
        let is_known = |name: &&String| names.iter().any(|tensor| tensor.name == **name);
        match self.tensors.keys().find(|name| !is_known(name)) {
            None => Ok(()),
            Some(name) => {
                let sentence =
                    format!("{} has the tensor {name}, which this job's network lacks", self.origin);
                Err(Problem::usage(sentence).hint(self.settings().unwrap_or(NAMES.to_owned())))
            }
        }
    }

    /// Checks that the job's cells do the same with the numbers as those that they come from.
    ///
    /// # Errors
    /// They do not; the hint says which setting would.
    pub fn mean_the_same(&self, job: &JobSpec) -> Result<(), Problem> {
        let Meaning { activation, recurrent_activation, reset, cell_clip } = self.meaning;
        let is = |cell: Cell| job.cell == cell;
        let differs = [
            is(Cell::Rnn).then(|| difference("activation", activation, job.activation)),
            (!is(Cell::Rnn))
                .then(|| difference("recurrent_activation", recurrent_activation, job.recurrent_activation)),
            is(Cell::Gru).then(|| difference("reset", reset, job.reset)),
            is(Cell::Lstm).then(|| difference("cell_clip", cell_clip, job.cell_clip)),
        ];
        match differs.into_iter().flatten().flatten().next() {
            None => Ok(()),
            Some((key, there, here)) => Err(Problem::usage(format!(
                "{} has parameters for {key} = {there}, this job has {here}",
                self.origin
            ))
            .hint(format!("give --set {key}={}", there.trim_matches('"')))),
        }
    }

    /// Which settings fit the network that the tensors tell of.
    fn settings(&self) -> Option<String> {
        let shape = |name: &str| Some(&self.tensors.get(name)?.shape[..]);
        let mut sizes = Vec::new();
        let mut cell = None;
        while let Some(&[gates, output]) = shape(&format!("rnn.weight_hh_l{}", sizes.len())) {
            let hidden = match shape(&format!("rnn.weight_hr_l{}", sizes.len())) {
                Some(&[_, hidden]) => hidden,
                _ => output,
            };
            let fits = |cell: &Cell| hidden > 0 && cell.gates() * hidden == gates;
            cell = Some([Cell::Rnn, Cell::Lstm, Cell::Gru].into_iter().find(fits)?);
            sizes.push(hidden);
        }
        let mut settings = vec![format!("cell={}", cell?), format!("num_layers={}", sizes.len())];
        settings.push(match sizes.iter().all(|&size| size == sizes[0]) {
            true => format!("hidden_size={}", sizes[0]),
            false => format!("'hidden_sizes={sizes:?}'"),
        });
        if self.has("rnn.weight_hh_l0_reverse") {
            settings.push("bidirectional=true".to_owned());
        }
        if let Some(&[projection, _]) = shape("rnn.weight_hr_l0") {
            settings.push(format!("projection={projection}"));
        }
        if self.has("rnn.peephole_i_l0") {
            settings.push("peepholes=true".to_owned());
        }
        if self.has("rnn.initial_h_l0") {
            settings.push("initial_state=learnt".to_owned());
        }
        if let Some(&[_, size]) = shape("embedding.weight") {
            settings.push(format!("embedding_size={size}"));
        }
        Some(format!("these parameters fit --set {}, over data of the same width", settings.join(" --set ")))
    }
}

impl WeightTensor {
    fn new(shape: &[usize], bytes: &[u8]) -> Self {
        let (words, _) = bytes.as_chunks::<4>();
        Self { shape: shape.to_vec(), values: words.iter().map(|&word| f32::from_le_bytes(word)).collect() }
    }
}

/// The key and both words, if they differ and the first is known.
fn difference<W: Serialize + PartialEq>(
    key: &'static str,
    there: Option<W>,
    here: W,
) -> Option<(&'static str, String, String)> {
    let word = |word: &W| serde_json::to_string(word).expect("a word can be written as JSON");
    let there = there.filter(|there| *there != here)?;
    Some((key, word(&there), word(&here)))
}

fn refuse_options(origin: &str, options: &ArrayOptions) -> Result<(), Problem> {
    match *options == ArrayOptions::default() {
        true => Ok(()),
        false => Err(Problem::usage(format!(
            "--gates and --forget-bias are about the arrays of a .npz file, and {origin} is none"
        ))
        .hint("leave them out")),
    }
}

/// What is wrong with a file, as a problem of whoever named it.
fn of_file(origin: &str, problem: Problem) -> Problem {
    Problem { hint: problem.hint, ..Problem::usage(format!("{origin}: {}", problem.sentence)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    use safetensors::tensor::TensorView;

    use crate::store::run_dir::{OpenMode, RunDir};
    use crate::store::state::StateImage;
    use crate::store::testing::{self, KEEP};
    use crate::store::torch::to_torch;

    fn file(tensors: &[(&str, &[usize], Dtype)], metadata: Option<(&str, &str)>) -> Vec<u8> {
        let data = vec![0_u8; 4096];
        let views = tensors.iter().map(|&(name, shape, dtype)| {
            let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
            (name, TensorView::new(dtype, shape.to_vec(), &data[..bytes]).unwrap())
        });
        let metadata = metadata.map(|(key, value)| HashMap::from([(key.to_owned(), value.to_owned())]));
        safetensors::serialize(views, metadata).unwrap()
    }

    fn of_bytes(bytes: &[u8]) -> Result<Weights, Problem> {
        Weights::from_bytes("w", bytes, Cell::Gru, &ArrayOptions::default())
    }

    fn read(path: &Path) -> Result<Weights, Problem> {
        Weights::read(path, Cell::Gru, &ArrayOptions::default())
    }

    #[test]
    fn a_run_a_checkpoint_and_a_file_for_pytorch_hold_the_same_weights() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoint = testing::finite_checkpoint();
        let run =
            RunDir::open(dir.path(), OpenMode::Resume, &testing::job_file("char-gru", &[]), "d1").unwrap();
        assert!(read(dir.path()).unwrap_err().sentence.ends_with("has no checkpoint yet"));
        let entry = run.checkpoints().write(&checkpoint, KEEP).unwrap();
        let exported = dir.path().join("exported");
        std::fs::write(&exported, to_torch(&checkpoint)).unwrap();
        let paths = [dir.path().to_owned(), dir.path().join("checkpoints").join(entry.file), exported];
        for path in &paths {
            let weights = read(path).unwrap();
            assert!(weights.origin.starts_with(path.to_str().unwrap()), "{}", weights.origin);
            assert_eq!(weights.vocabulary, Some("ab\n\"é".chars().collect()));
            weights.only(&checkpoint.image.layout().tensors).unwrap();
            for Tensor { name, shape, range } in &checkpoint.image.layout().tensors {
                let bytes: Vec<u8> =
                    weights.tensor(name, shape).unwrap().iter().flat_map(|v| v.to_le_bytes()).collect();
                assert_eq!(bytes, checkpoint.image.floats(range.clone()), "{name} of {}", path.display());
            }
        }
    }

    #[test]
    fn what_is_not_weights_is_said() {
        let f32s: (&str, &[usize], Dtype) = ("rnn.weight_hh_l0", &[8, 2], Dtype::F32);
        let cases = [
            (b"hello".to_vec(), "w is not a safetensors file: "),
            (file(&[("a", &[2], Dtype::F16)], None), "tensor a of w is F16, expected F32"),
            (file(&[f32s], Some(("network", "{"))), "the metadata key 'network' of w is damaged: "),
            (file(&[f32s], Some(("lockstep", "{}"))), "w: its metadata is damaged: "),
        ];
        for (bytes, sentence) in cases {
            let problem = of_bytes(&bytes).unwrap_err();
            assert!(problem.sentence.starts_with(sentence), "{problem}");
            assert_eq!(problem.exit, Exit::Usage);
        }
        let mut broken = testing::finite_checkpoint();
        let layout = broken.image.layout().clone();
        broken.image = StateImage::initial(&layout, &vec![f32::NAN; layout.parameters()]);
        let problem = of_bytes(&to_torch(&broken)).unwrap_err();
        assert_eq!(problem.sentence, "tensor head.bias of w holds NaN");
        let problem = read(Path::new("nowhere.safetensors")).unwrap_err();
        assert!(problem.sentence.starts_with("cannot read nowhere.safetensors: "), "{problem}");
    }

    #[test]
    fn a_tensor_that_does_not_fit_is_named_with_both_shapes_and_the_settings_that_fit() {
        let tensors: [(&str, &[usize], Dtype); 2] =
            [("rnn.weight_hh_l0", &[8, 2], Dtype::F32), ("rnn.weight_hh_l1", &[8, 2], Dtype::F32)];
        let weights = of_bytes(&file(&tensors, None)).unwrap();
        let problem = weights.tensor("rnn.weight_hh_l0", &[16, 4]).unwrap_err();
        assert_eq!(problem.sentence, "tensor rnn.weight_hh_l0 is [8, 2] in w, [16, 4] in this job");
        let hint = problem.hint.unwrap();
        assert!(hint.contains("--set cell=lstm --set num_layers=2 --set hidden_size=2"), "{hint}");
        assert_eq!(weights.tensor("head.bias", &[2]).unwrap_err().sentence, "w has no tensor head.bias");
        let layout = testing::checkpoint(0, 0).image.layout().clone();
        let problem = weights.only(&layout.tensors).unwrap_err();
        assert_eq!(problem.sentence, "w has the tensor rnn.weight_hh_l1, which this job's network lacks");

        let unprefixed = of_bytes(&file(&[("weight_hh_l0", &[8, 2], Dtype::F32)], None));
        let problem = unprefixed.unwrap().tensor("rnn.weight_ih_l0", &[8, 2]).unwrap_err();
        assert!(problem.hint.unwrap().starts_with("the tensors are called rnn.weight_ih_l0, "));
    }

    #[test]
    fn the_settings_that_fit_tell_of_every_option_that_has_a_tensor() {
        let f32 = Dtype::F32;
        let tensors: [(&str, &[usize], Dtype); 8] = [
            ("embedding.weight", &[9, 5], f32),
            ("rnn.weight_hh_l0", &[16, 3], f32),
            ("rnn.weight_hr_l0", &[3, 4], f32),
            ("rnn.weight_hh_l0_reverse", &[16, 3], f32),
            ("rnn.weight_hh_l1", &[24, 3], f32),
            ("rnn.weight_hr_l1", &[3, 6], f32),
            ("rnn.peephole_i_l0", &[4], f32),
            ("rnn.initial_h_l0", &[3], f32),
        ];
        let weights = of_bytes(&file(&tensors, None)).unwrap();
        let expected = "these parameters fit --set cell=lstm --set num_layers=2 --set 'hidden_sizes=[4, 6]' --set \
                        bidirectional=true --set projection=3 --set peepholes=true --set initial_state=learnt --set \
                        embedding_size=5, over data of the same width";
        assert_eq!(weights.tensor("head.bias", &[2]).unwrap_err().hint.unwrap(), expected);
    }

    #[test]
    fn numbers_that_mean_something_else_in_the_job_are_refused() {
        let mut checkpoint = testing::finite_checkpoint();
        checkpoint.job.reset = Reset::Before;
        let job = |settings: &[(&str, &str)]| testing::job_file("char-gru", settings).job;
        let weights = of_bytes(&to_torch(&checkpoint)).unwrap();
        weights.mean_the_same(&job(&[("reset", "before")])).unwrap();
        let problem = weights.mean_the_same(&job(&[])).unwrap_err();
        assert_eq!(problem.sentence, "w has parameters for reset = \"before\", this job has \"after\"");
        assert_eq!(problem.hint.unwrap(), "give --set reset=before");
        let problem = weights
            .mean_the_same(&job(&[("reset", "before"), ("recurrent_activation", "hard_sigmoid")]))
            .unwrap_err();
        assert_eq!(problem.hint.unwrap(), "give --set recurrent_activation=sigmoid");
        // PyTorch's own files do not say it.
        let silent = of_bytes(&file(&[("a", &[2], Dtype::F32)], None)).unwrap();
        silent.mean_the_same(&job(&[("reset", "before")])).unwrap();
    }

    #[test]
    fn options_about_arrays_are_for_arrays() {
        let options = ArrayOptions { gates: Some(GateOrder::Keras), forget_bias: None };
        let problem = Weights::from_bytes("w", &to_torch(&testing::finite_checkpoint()), Cell::Gru, &options)
            .unwrap_err();
        assert!(problem.sentence.starts_with("--gates and --forget-bias are about the arrays"), "{problem}");
        let folder = tempfile::tempdir().unwrap();
        assert!(
            Weights::read(folder.path(), Cell::Gru, &options).unwrap_err().sentence.starts_with("--gates")
        );
    }
}
