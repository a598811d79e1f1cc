//! Parameters without the rest of a training state, as safetensors files under PyTorch's names: what leaves for
//! PyTorch and what comes from there.
//!
//! A file that leaves has one metadata key, `network`, with JSON inside: `cell`, `num_layers`, `hidden_size`, and
//! `vocabulary`, the characters in the order of their token ids (null for images). A file that comes needs none.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use protocol::cell::Cell;
use protocol::layout::Tensor;
use protocol::problem::{Exit, Problem};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use super::checkpoint::{Checkpoint, METADATA_KEY};
use super::load::newest_of_run;

const NETWORK_KEY: &str = "network";

/// How the tensors of a file must be called.
const NAMES: &str = "the tensors are called rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0, rnn.bias_hh_l0 and so \
                     on for each layer, head.weight, head.bias, as in a module with rnn = torch.nn.LSTM(...) and \
                     head = torch.nn.Linear(...)";

/// What a file for PyTorch says about its network.
#[derive(Serialize, Deserialize)]
struct Network {
    cell: Cell,
    num_layers: u32,
    hidden_size: u32,
    vocabulary: Option<String>,
}

/// The parameters of a checkpoint as the content of a file for PyTorch. Equal parameters give equal bytes.
pub fn to_torch(checkpoint: &Checkpoint) -> Vec<u8> {
    let layout = checkpoint.image.layout();
    let views = layout.tensors.iter().map(|Tensor { name, shape, range }| {
        let view = TensorView::new(Dtype::F32, shape.clone(), checkpoint.image.floats(range.clone()));
        (name.clone(), view.expect("a tensor of the layout has as many floats as its shape"))
    });
    let network = Network {
        cell: checkpoint.job.cell,
        num_layers: checkpoint.job.num_layers,
        hidden_size: checkpoint.job.hidden_size,
        vocabulary: checkpoint.vocabulary.clone(),
    };
    let json = serde_json::to_string(&network).expect("plain values can be written as JSON");
    safetensors::serialize(views, Some(HashMap::from([(NETWORK_KEY.to_owned(), json)])))
        .expect("a layout's header is far below the format's limit")
}

/// The parameters of some network, as they were found.
#[derive(Debug, Clone, PartialEq)]
pub struct Weights {
    /// Where, for people: the path, and the step of a checkpoint.
    pub origin: String,
    /// The characters of the text in the order of their token ids, if they are known.
    pub vocabulary: Option<Vec<char>>,
    /// By PyTorch's names.
    tensors: BTreeMap<String, WeightTensor>,
}

/// One tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightTensor {
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// As many numbers as the shape has places, all finite.
    pub values: Vec<f32>,
}

impl Weights {
    /// Reads the newest checkpoint of a run directory, a checkpoint, or any safetensors file.
    ///
    /// # Errors
    /// There is nothing of the kind, it is damaged, or a tensor is not of finite f32 numbers.
    pub fn read(path: &Path) -> Result<Self, Problem> {
        if path.is_dir() {
            let newest = newest_of_run(path).map_err(|problem| Problem { exit: Exit::Usage, ..problem })?;
            return Self::of_checkpoint(&path.display().to_string(), &newest.checkpoint);
        }
        let origin = path.display().to_string();
        let bytes =
            std::fs::read(path).map_err(|error| Problem::usage(format!("cannot read {origin}: {error}")))?;
        Self::from_bytes(&origin, &bytes)
    }

    /// The same of the content of a file that people know as `origin`.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn from_bytes(origin: &str, bytes: &[u8]) -> Result<Self, Problem> {
        let unreadable = |error: &dyn std::fmt::Display| {
            Problem::usage(format!("{origin} is not a safetensors file: {error}"))
                .hint("give a run directory, a checkpoint, or a file written by safetensors.torch.save_file")
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
        let vocabulary = network.and_then(|network| network.vocabulary);
        Self::checked(origin.to_owned(), vocabulary.as_deref(), tensors)
    }

    fn of_checkpoint(origin: &str, checkpoint: &Checkpoint) -> Result<Self, Problem> {
        let image = &checkpoint.image;
        let tensors = image.layout().tensors.iter().map(|Tensor { name, shape, range }| {
            (name.clone(), WeightTensor::new(shape, image.floats(range.clone())))
        });
        let origin = format!("{origin} ({} steps done)", image.progress().step);
        Self::checked(origin, checkpoint.vocabulary.as_deref(), tensors.collect())
    }

    fn checked(
        origin: String,
        vocabulary: Option<&str>,
        tensors: BTreeMap<String, WeightTensor>,
    ) -> Result<Self, Problem> {
        for (name, tensor) in &tensors {
            if let Some(value) = tensor.values.iter().find(|value| !value.is_finite()) {
                return Err(Problem::usage(format!("tensor {name} of {origin} holds {value}"))
                    .hint("these parameters are of a training that has failed; take earlier ones"));
            }
        }
        let vocabulary = vocabulary.map(|characters| characters.chars().collect());
        Ok(Self { origin, vocabulary, tensors })
    }

    /// The tensor of this name, which must have this shape.
    ///
    /// # Errors
    /// There is none, or it has another shape; the hint says of what network the parameters are.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<&[f32], Problem> {
        let Some(tensor) = self.tensors.get(name) else {
            let hint = self.network().map_or(NAMES.to_owned(), |network| network.hint());
            return Err(Problem::usage(format!("{} has no tensor {name}", self.origin)).hint(hint));
        };
        if tensor.shape == shape {
            return Ok(&tensor.values);
        }
        let sentence =
            format!("tensor {name} is {:?} in {}, {shape:?} in this job", tensor.shape, self.origin);
        let problem = Problem::usage(sentence);
        Err(match self.network() {
            Some(network) => problem.hint(network.hint()),
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
                Err(Problem::usage(sentence).hint(self.network().map_or(NAMES.to_owned(), |n| n.hint())))
            }
        }
    }

    /// The network that the shapes of the recurrent weights tell of.
    fn network(&self) -> Option<Network> {
        let layers = (0..).take_while(|l| self.tensors.contains_key(&format!("rnn.weight_hh_l{l}"))).count();
        let &[gates, hidden] = &self.tensors.get("rnn.weight_hh_l0")?.shape[..] else { return None };
        let cells = [Cell::Rnn, Cell::Lstm, Cell::Gru];
        let cell = cells.into_iter().find(|cell| hidden > 0 && cell.gates() * hidden == gates)?;
        Some(Network { cell, num_layers: layers as u32, hidden_size: hidden as u32, vocabulary: None })
    }
}

impl Network {
    /// Which settings fit it.
    fn hint(&self) -> String {
        let Self { cell, num_layers, hidden_size, .. } = self;
        format!(
            "these parameters fit --set cell={cell} --set num_layers={num_layers} --set \
             hidden_size={hidden_size}, over data of the same width"
        )
    }
}

impl WeightTensor {
    fn new(shape: &[usize], bytes: &[u8]) -> Self {
        let values = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        Self { shape: shape.to_vec(), values }
    }
}

/// What is wrong with a file, as a problem of whoever named it.
fn of_file(origin: &str, problem: Problem) -> Problem {
    Problem { hint: problem.hint, ..Problem::usage(format!("{origin}: {}", problem.sentence)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::checkpoint_dir::KEEP;
    use crate::store::run_dir::{OpenMode, RunDir};
    use crate::store::state::StateImage;
    use crate::store::testing;

    /// A checkpoint of finite numbers.
    fn checkpoint() -> Checkpoint {
        let mut checkpoint = testing::checkpoint(20, 1);
        let layout = checkpoint.image.layout().clone();
        let parameters: Vec<f32> = (0..layout.parameters()).map(|i| i as f32 / 7.0).collect();
        checkpoint.image = StateImage::initial(&layout, &parameters);
        checkpoint
    }

    fn file(tensors: &[(&str, &[usize], Dtype)], metadata: Option<(&str, &str)>) -> Vec<u8> {
        let data = vec![0_u8; 4096];
        let views = tensors.iter().map(|&(name, shape, dtype)| {
            let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
            (name, TensorView::new(dtype, shape.to_vec(), &data[..bytes]).unwrap())
        });
        let metadata = metadata.map(|(key, value)| HashMap::from([(key.to_owned(), value.to_owned())]));
        safetensors::serialize(views, metadata).unwrap()
    }

    #[test]
    fn a_file_for_pytorch_holds_its_names_shapes_and_numbers_and_nothing_else() {
        let checkpoint = checkpoint();
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
        let json = r#"{"cell":"gru","num_layers":1,"hidden_size":2,"vocabulary":"ab\n\"é"}"#;
        assert_eq!(*header.metadata(), Some(HashMap::from([("network".to_owned(), json.to_owned())])));
    }

    #[test]
    fn a_run_a_checkpoint_and_a_file_for_pytorch_hold_the_same_weights() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoint = checkpoint();
        let run =
            RunDir::open(dir.path(), OpenMode::Resume, &testing::job_file("char-gru", &[]), "d1").unwrap();
        assert!(Weights::read(dir.path()).unwrap_err().sentence.ends_with("has no checkpoint yet"));
        let entry = run.checkpoints().write(&checkpoint, KEEP).unwrap();
        let exported = dir.path().join("exported");
        std::fs::write(&exported, to_torch(&checkpoint)).unwrap();
        let paths = [dir.path().to_owned(), dir.path().join("checkpoints").join(entry.file), exported];
        for path in &paths {
            let weights = Weights::read(path).unwrap();
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
            let problem = Weights::from_bytes("w", &bytes).unwrap_err();
            assert!(problem.sentence.starts_with(sentence), "{problem}");
            assert_eq!(problem.exit, Exit::Usage);
        }
        let mut broken = checkpoint();
        let layout = broken.image.layout().clone();
        broken.image = StateImage::initial(&layout, &vec![f32::NAN; layout.parameters()]);
        let problem = Weights::from_bytes("w", &to_torch(&broken)).unwrap_err();
        assert_eq!(problem.sentence, "tensor head.bias of w holds NaN");
        let problem = Weights::read(Path::new("nowhere.safetensors")).unwrap_err();
        assert!(problem.sentence.starts_with("cannot read nowhere.safetensors: "), "{problem}");
    }

    #[test]
    fn a_tensor_that_does_not_fit_is_named_with_both_shapes_and_the_settings_that_fit() {
        let tensors: [(&str, &[usize], Dtype); 2] =
            [("rnn.weight_hh_l0", &[8, 2], Dtype::F32), ("rnn.weight_hh_l1", &[8, 2], Dtype::F32)];
        let weights = Weights::from_bytes("w", &file(&tensors, None)).unwrap();
        let problem = weights.tensor("rnn.weight_hh_l0", &[16, 4]).unwrap_err();
        assert_eq!(problem.sentence, "tensor rnn.weight_hh_l0 is [8, 2] in w, [16, 4] in this job");
        let hint = problem.hint.unwrap();
        assert!(hint.contains("--set cell=lstm --set num_layers=2 --set hidden_size=2"), "{hint}");
        assert_eq!(weights.tensor("head.bias", &[2]).unwrap_err().sentence, "w has no tensor head.bias");
        let layout = testing::checkpoint(0, 0).image.layout().clone();
        let problem = weights.only(&layout.tensors).unwrap_err();
        assert_eq!(problem.sentence, "w has the tensor rnn.weight_hh_l1, which this job's network lacks");

        let unprefixed = Weights::from_bytes("w", &file(&[("weight_hh_l0", &[8, 2], Dtype::F32)], None));
        let problem = unprefixed.unwrap().tensor("rnn.weight_ih_l0", &[8, 2]).unwrap_err();
        assert!(problem.hint.unwrap().starts_with("the tensors are called rnn.weight_ih_l0, "));
    }
}
