mod tensorflow;

use super::*;
use coordinator::store::checkpoint::Checkpoint;
use coordinator::store::state::StateImage;
use coordinator::store::torch::to_torch;
use protocol::job::JobFile;

fn job(cell: &str) -> JobSpec {
    job_with(&[("cell", cell)])
}

fn job_with(settings: &[(&str, &str)]) -> JobSpec {
    let common = [("hidden_size", "3"), ("num_layers", "2"), ("seed", "9")];
    let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
    let settings: Vec<_> = common.iter().chain(settings).map(owned).collect();
    JobFile::resolve("char-lstm", None, &settings).unwrap().job
}

/// A text with these characters.
fn facts(vocabulary: Option<&str>) -> DataFacts {
    DataFacts {
        name: "text".to_owned(),
        digest: "d".to_owned(),
        vocabulary: vocabulary.map(|text| text.chars().collect()),
        labels: None,
        sample_unit: "characters",
        train_samples: 1,
        skipped_per_epoch: 0,
        validation_samples: 0,
    }
}

fn source(dir: &std::path::Path, cell: &str, vocabulary: &str) -> WarmStart {
    source_of(dir, &job(cell), vocabulary)
}

/// A file with the parameters 1000, 1001, ... of a network over these characters.
fn source_of(dir: &std::path::Path, job: &JobSpec, vocabulary: &str) -> WarmStart {
    let width = vocabulary.chars().count();
    let layout = StateLayout::of(job, width, width);
    let values: Vec<f32> = (0..layout.parameters()).map(|i| 1000.0 + i as f32).collect();
    let checkpoint = Checkpoint {
        image: StateImage::initial(&layout, &values),
        job: job.clone(),
        data_digest: "d".to_owned(),
        vocabulary: Some(vocabulary.to_owned()),
        labels: None,
    };
    let path = dir.join("w.safetensors");
    std::fs::write(&path, to_torch(&checkpoint)).unwrap();
    WarmStart::new(path, ArrayArgs::default())
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
    let (ih, head, bias) = (here.layer(0)[0].weight_ih.clone(), here.head().0, here.head().1);
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
    let (mine, theirs) = (here.layer(0)[0].weight_hh.start..head.start, there.layer(0)[0].weight_hh.start);
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

/// Number `at` of a tensor of [`source_of`].
fn number(layout: &StateLayout, name: &str, at: usize) -> f32 {
    let tensor = layout.tensors.iter().find(|tensor| tensor.name == name).unwrap();
    1000.0 + (tensor.range.start + at) as f32
}

fn values<'a>(layout: &StateLayout, parameters: &'a [f32], name: &str) -> &'a [f32] {
    &parameters[layout.tensors.iter().find(|tensor| tensor.name == name).unwrap().range.clone()]
}

#[test]
fn an_embedding_and_both_directions_follow_the_characters_too() {
    let dir = tempfile::tempdir().unwrap();
    let embedded = job_with(&[("embedding_size", "2")]);
    let (there, here) = (StateLayout::of(&embedded, 3, 3), StateLayout::of(&embedded, 4, 4));
    let source = source_of(dir.path(), &embedded, "bce");
    let (parameters, _) = source.make(&embedded, &facts(Some("abxe")), &here).unwrap();
    let table = values(&here, &parameters, "embedding.weight");
    assert_eq!(table[2..4], [0, 1].map(|at| number(&there, "embedding.weight", at)));
    assert_eq!(table[6..8], [4, 5].map(|at| number(&there, "embedding.weight", at)));
    assert!(table[..2].iter().chain(&table[4..6]).all(|value| value.abs() <= 0.05));
    let weights = values(&here, &parameters, "rnn.weight_ih_l0");
    assert!(weights.iter().enumerate().all(|(at, &value)| value == number(&there, "rnn.weight_ih_l0", at)));

    // The classes of lines are no characters, however many of both there are.
    let lines = job_with(&[("task", "classify"), ("bidirectional", "true")]);
    let (there, here) = (StateLayout::of(&lines, 3, 3), StateLayout::of(&lines, 4, 3));
    let (parameters, _) =
        source_of(dir.path(), &lines, "bce").make(&lines, &facts(Some("abxe")), &here).unwrap();
    for name in ["rnn.weight_ih_l0", "rnn.weight_ih_l0_reverse"] {
        for row in 0..12 {
            let row_here = &values(&here, &parameters, name)[4 * row..][..4];
            assert_eq!(row_here[1], number(&there, name, 3 * row));
            assert_eq!(row_here[3], number(&there, name, 3 * row + 2));
            assert!(row_here[0].abs() < 1.0 && row_here[2].abs() < 1.0);
        }
    }
    for name in ["head.weight", "rnn.weight_ih_l1_reverse"] {
        let all = values(&here, &parameters, name).iter().enumerate();
        assert!(all.clone().all(|(at, &value)| value == number(&there, name, at)), "{name}");
    }
}

#[test]
fn the_forget_gate_gets_what_it_got_where_the_parameters_come_from() {
    let dir = tempfile::tempdir().unwrap();
    let [without, with] = ["0", "1.5"].map(|bias| job_with(&[("forget_bias", bias)]));
    let layout = StateLayout::of(&with, 4, 4);
    let checkpoint = |job: &JobSpec| Checkpoint {
        image: StateImage::initial(&layout, &vec![0.25; layout.parameters()]),
        job: job.clone(),
        data_digest: "d".to_owned(),
        vocabulary: Some("abcd".to_owned()),
        labels: None,
    };
    let path = dir.path().join("w");
    let forget_bias = |job: &JobSpec| {
        let (parameters, _) = WarmStart::new(path.clone(), ArrayArgs::default())
            .make(job, &facts(Some("abcd")), &layout)
            .unwrap();
        for (tensor, at) in layout.tensors.iter().flat_map(|t| t.range.clone().map(move |at| (t, at))) {
            let is_forget =
                tensor.name.starts_with("rnn.bias_ih") && (3..6).contains(&(at - tensor.range.start));
            assert!(is_forget || parameters[at] == 0.25, "{}", tensor.name);
        }
        let [first, second] = ["rnn.bias_ih_l0", "rnn.bias_ih_l1"]
            .map(|name| values(&layout, &parameters, name)[3..6].to_vec());
        assert_eq!(first, second);
        first
    };
    for (source, is_exported, job, expected) in [
        (&with, false, &with, 0.25),
        (&with, false, &without, 1.75),
        (&without, false, &with, -1.25),
        // A file for PyTorch has it in the bias.
        (&with, true, &with, 0.25),
        (&with, true, &without, 1.75),
    ] {
        let checkpoint = checkpoint(source);
        let bytes = if is_exported { to_torch(&checkpoint) } else { checkpoint.to_bytes() };
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(forget_bias(job), [expected; 3]);
    }
}

#[test]
fn an_initial_state_that_was_never_learnt_starts_at_zero() {
    let dir = tempfile::tempdir().unwrap();
    let learnt = job_with(&[("initial_state", "learnt")]);
    let layout = StateLayout::of(&learnt, 4, 4);
    let (parameters, _) =
        source(dir.path(), "lstm", "abcd").make(&learnt, &facts(Some("abcd")), &layout).unwrap();
    for name in ["rnn.initial_h_l0", "rnn.initial_c_l1"] {
        assert_eq!(values(&layout, &parameters, name), [0.0; 3]);
    }
    let plain = StateLayout::of(&job("lstm"), 4, 4);
    let problem =
        source_of(dir.path(), &learnt, "abcd").make(&job("lstm"), &facts(Some("abcd")), &plain).unwrap_err();
    assert!(problem.sentence.contains("has the tensor rnn.initial_c_l0, which"), "{problem}");
    assert!(problem.hint.unwrap().contains("--set initial_state=learnt"));
}
