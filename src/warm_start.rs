//! First parameters from another run, or from PyTorch: what `--init-from` and `import` mean.

use std::path::PathBuf;

use coordinator::InitialParameters;
use coordinator::data::DataFacts;
use coordinator::store::torch::Weights;
use model::init::initial_parameters;
use protocol::job::JobSpec;
use protocol::layout::{StateLayout, Tensor};
use protocol::problem::Problem;

/// The parameters of a run directory, a checkpoint, or any safetensors file with PyTorch's names.
#[derive(Debug)]
pub(crate) struct WarmStart {
    path: PathBuf,
}

impl WarmStart {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path }
    }
}

impl InitialParameters for WarmStart {
    fn make(
        &self,
        job: &JobSpec,
        facts: &DataFacts,
        layout: &StateLayout,
    ) -> Result<(Vec<f32>, String), Problem> {
        let weights = Weights::read(&self.path)?;
        match (&weights.vocabulary, &facts.vocabulary) {
            (Some(there), Some(here)) if there != here => by_character(&weights, job, layout, (there, here)),
            _ => verbatim(&weights, layout),
        }
    }
}

/// Parameters of a network of the same shape over the same characters.
fn verbatim(weights: &Weights, layout: &StateLayout) -> Result<(Vec<f32>, String), Problem> {
    let mut parameters = vec![0.0; layout.parameters()];
    for Tensor { name, shape, range } in &layout.tensors {
        parameters[range.clone()].copy_from_slice(weights.tensor(name, shape)?);
    }
    weights.only(&layout.tensors)?;
    Ok((parameters, format!("starting from the parameters of {}", weights.origin)))
}

/// Parameters of a network over other characters: those that both texts have keep what was learnt about them, the
/// others start as without `--init-from`.
fn by_character(
    weights: &Weights,
    job: &JobSpec,
    layout: &StateLayout,
    (there, here): (&[char], &[char]),
) -> Result<(Vec<f32>, String), Problem> {
    let mut parameters = initial_parameters(layout, job);
    // The places of each shared character, here and there; both vocabularies are ascending.
    let shared: Vec<(usize, usize)> = here
        .iter()
        .enumerate()
        .filter_map(|(at, character)| Some((at, there.iter().position(|other| other == character)?)))
        .collect();
    for Tensor { name, shape, range } in &layout.tensors {
        let own = &mut parameters[range.clone()];
        match (name.as_str(), &shape[..]) {
            // A column a character.
            ("rnn.weight_ih_l0", &[rows, width]) => {
                let theirs = weights.tensor(name, &[rows, there.len()])?;
                for (own, theirs) in own.chunks_exact_mut(width).zip(theirs.chunks_exact(there.len())) {
                    shared.iter().for_each(|&(to, from)| own[to] = theirs[from]);
                }
            }
            // A row a character.
            ("head.weight", &[_, width]) => {
                let theirs = weights.tensor(name, &[there.len(), width])?;
                for &(to, from) in &shared {
                    own[to * width..][..width].copy_from_slice(&theirs[from * width..][..width]);
                }
            }
            ("head.bias", _) => {
                let theirs = weights.tensor(name, &[there.len()])?;
                shared.iter().for_each(|&(to, from)| own[to] = theirs[from]);
            }
            _ => own.copy_from_slice(weights.tensor(name, shape)?),
        }
    }
    weights.only(&layout.tensors)?;
    let notice = format!(
        "starting from the parameters of {}: {} of {} characters carried over, the others begin as the seed says",
        weights.origin,
        shared.len(),
        here.len()
    );
    Ok((parameters, notice))
}

#[cfg(test)]
mod tests {
    use super::*;
    use coordinator::store::checkpoint::Checkpoint;
    use coordinator::store::state::StateImage;
    use coordinator::store::torch::to_torch;
    use protocol::job::JobFile;

    fn job(cell: &str) -> JobSpec {
        let settings = [("cell", cell), ("hidden_size", "3"), ("num_layers", "2"), ("seed", "9")];
        let settings = settings.map(|(key, value)| (key.to_owned(), value.to_owned()));
        JobFile::resolve("char-lstm", None, &settings).unwrap().job
    }

    /// A text with these characters.
    fn facts(vocabulary: Option<&str>) -> DataFacts {
        DataFacts {
            name: "text".to_owned(),
            digest: "d".to_owned(),
            vocabulary: vocabulary.map(|text| text.chars().collect()),
            sample_unit: "characters",
            train_samples: 1,
            skipped_per_epoch: 0,
            validation_samples: 0,
        }
    }

    /// A file with the parameters 1000, 1001, ... of a network over these characters.
    fn source(dir: &std::path::Path, cell: &str, vocabulary: &str) -> WarmStart {
        let width = vocabulary.chars().count();
        let layout = StateLayout::of(&job(cell), width, width);
        let values: Vec<f32> = (0..layout.parameters()).map(|i| 1000.0 + i as f32).collect();
        let checkpoint = Checkpoint {
            image: StateImage::initial(&layout, &values),
            job: job(cell),
            data_digest: "d".to_owned(),
            vocabulary: Some(vocabulary.to_owned()),
        };
        let path = dir.join("w.safetensors");
        std::fs::write(&path, to_torch(&checkpoint)).unwrap();
        WarmStart::new(path)
    }

    #[test]
    fn over_the_same_characters_every_parameter_is_copied() {
        let dir = tempfile::tempdir().unwrap();
        for cell in ["rnn", "lstm", "gru"] {
            let layout = StateLayout::of(&job(cell), 4, 4);
            let source = source(dir.path(), cell, "abcd");
            let (parameters, notice) = source.make(&job(cell), &facts(Some("abcd")), &layout).unwrap();
            let expected: Vec<f32> = (0..layout.parameters()).map(|i| 1000.0 + i as f32).collect();
            assert_eq!(parameters, expected);
            assert!(notice.starts_with("starting from the parameters of ") && !notice.contains("carried"));
        }
    }

    #[test]
    fn over_other_characters_the_shared_ones_keep_their_numbers_and_the_rest_is_the_seeds() {
        let dir = tempfile::tempdir().unwrap();
        let job = job("gru");
        let (there, here) = (StateLayout::of(&job, 3, 3), StateLayout::of(&job, 4, 4));
        let (parameters, notice) =
            source(dir.path(), "gru", "bce").make(&job, &facts(Some("abxe")), &here).unwrap();
        assert!(notice.contains(": 2 of 4 characters carried over"), "{notice}");
        let seeds = initial_parameters(&here, &job);
        // Of a b x e, b was the first character there and e the third.
        let origin = [None, Some(0), None, Some(2)];
        let (ih, head, bias) = (here.layer(0).weight_ih, here.head().0, here.head().1);
        for row in 0..9 {
            for (column, origin) in origin.iter().enumerate() {
                let at = ih.start + row * 4 + column;
                let expected = origin.map_or(seeds[at], |from| 1000.0 + (row * 3 + from) as f32);
                assert_eq!(parameters[at], expected, "row {row}, column {column}");
            }
        }
        for (token, origin) in origin.iter().enumerate() {
            for unit in 0..3 {
                let at = head.start + token * 3 + unit;
                let expected =
                    origin.map_or(seeds[at], |from| 1000.0 + (there.head().0.start + from * 3 + unit) as f32);
                assert_eq!(parameters[at], expected, "token {token}, unit {unit}");
            }
            let at = bias.start + token;
            let expected = origin.map_or(seeds[at], |from| 1000.0 + (there.head().1.start + from) as f32);
            assert_eq!(parameters[at], expected, "bias of token {token}");
        }
        let (mine, theirs) = (here.layer(0).weight_hh.start..head.start, there.layer(0).weight_hh.start);
        for (offset, value) in parameters[mine].iter().enumerate() {
            assert_eq!(*value, 1000.0 + (theirs + offset) as f32);
        }
    }

    #[test]
    fn another_network_is_refused_with_the_tensor_and_both_shapes() {
        let dir = tempfile::tempdir().unwrap();
        let source = source(dir.path(), "lstm", "abcd");
        let refused = |cell: &str, vocabulary: &str| {
            let width = vocabulary.chars().count();
            let layout = StateLayout::of(&job(cell), width, width);
            source.make(&job(cell), &facts(Some(vocabulary)), &layout).unwrap_err()
        };
        for vocabulary in ["abcd", "abxyz"] {
            let problem = refused("gru", vocabulary);
            assert!(problem.sentence.starts_with("tensor rnn.weight_ih_l0 is [12, 4] in "), "{problem}");
            let hint = problem.hint.unwrap();
            assert!(hint.contains("--set cell=lstm --set num_layers=2 --set hidden_size=3"), "{hint}");
        }
        let images = StateLayout::of(&job("lstm"), 28, 10);
        let problem = source.make(&job("lstm"), &facts(None), &images).unwrap_err();
        assert!(problem.sentence.ends_with(", [12, 28] in this job"), "{problem}");
    }
}
