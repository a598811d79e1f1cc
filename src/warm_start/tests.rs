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
