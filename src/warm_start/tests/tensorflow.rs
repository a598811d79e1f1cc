//! TensorFlow's arrays give TensorFlow's answers: files that `tests/fixtures/tensorflow/make.py` wrote, put into a layout
//! and read by the oracle.

use std::path::Path;

use super::*;
use kernels::oracle::cell::Cell as OracleCell;
use kernels::oracle::layer::Layer;
use kernels::oracle::stack::{InitialState, Row, Stack};
use protocol::layout::Head;

/// The largest difference allowed, as a share of the largest logit.
const LIMIT: f64 = 1e-5;

/// Tokens of every network.
const TOKENS: usize = 8;

/// The JSON of a fixture.
#[derive(serde::Deserialize)]
struct Answers {
    /// Words of the command line that say what network it is.
    job: String,
    inputs: Vec<usize>,
    /// After each token, or after the last.
    logits: Vec<Vec<f64>>,
}

fn fixture(name: &str) -> (WarmStart, JobSpec, Answers) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tensorflow");
    let json = std::fs::read_to_string(folder.join(format!("{name}.json"))).unwrap();
    let answers: Answers = serde_json::from_str(&json).unwrap();
    let source = WarmStart::new(folder.join(format!("{name}.npz")), ArrayArgs::default());
    let job = job_of(&answers.job, &[]);
    (source, job, answers)
}

/// The job that these words of a command line mean, with more settings.
fn job_of(words: &str, more: &[(&str, &str)]) -> JobSpec {
    let mut words = words.split_whitespace().filter(|word| *word != "--set");
    let preset = words.next().unwrap();
    let settings = words.map(|word| word.split_once('=').unwrap()).chain(more.iter().copied());
    let settings: Vec<_> = settings.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    JobFile::resolve(preset, None, &settings).unwrap().job
}

fn layout_of(job: &JobSpec, answers: &Answers) -> StateLayout {
    StateLayout::of(job, TOKENS, answers.logits[0].len())
}

/// The oracle's recurrent layers of a network of these fixtures, from states of zeros.
fn stack(layout: &StateLayout) -> Stack {
    let cell = OracleCell::of(layout.shape.cell, &layout.shape.options);
    let bidirectional = layout.shape.bidirectional;
    let layer = |&hidden_size: &usize| Layer { cell, hidden_size, bidirectional };
    Stack {
        input_size: layout.shape.input.size(),
        layers: layout.shape.hidden_sizes.iter().map(layer).collect(),
        initial_state: InitialState::Zero,
    }
}

/// What the oracle answers with these parameters.
fn logits(layout: &StateLayout, parameters: &[f32], tokens: &[usize]) -> Vec<Vec<f64>> {
    let stack = stack(layout);
    let all: Vec<f64> = parameters.iter().map(|&value| value.into()).collect();
    let one_hot = |token: usize| (0..stack.input_size).map(|at| f64::from(at == token)).collect();
    let input = |&token: &usize| match layout.embedding() {
        Some(table) => all[table][token * stack.input_size..][..stack.input_size].to_vec(),
        None => one_hot(token),
    };
    let inputs: Vec<f64> = tokens.iter().flat_map(input).collect();
    let row = Row { inputs: &inputs, length: tokens.len(), fed_state: None, resets: &[], masks: &[] };
    let mut places = kernels::oracle::parameters::Layout::default();
    let places_of_stack = stack.place(&mut places);
    // Both put the recurrent tensors one behind the other, in the same order.
    let first = layout.layer(0)[0].weight_ih.start;
    let trace = stack.forward(&places_of_stack, &all[first..first + places.parameter_count()], row);
    let width = stack.output_size();
    let seen: Vec<Vec<f64>> = match layout.shape.head {
        Head::EveryStep => trace.outputs.chunks_exact(width).map(<[f64]>::to_vec).collect(),
        Head::Final => {
            let states = stack.by_layer(&trace.final_state).pop().unwrap();
            vec![states.iter().flat_map(|state| state.h.clone()).collect()]
        }
    };
    let (weight, bias) = layout.head();
    let logit = |h: &[f64], row: &[f64], bias: f64| bias + h.iter().zip(row).map(|(h, w)| h * w).sum::<f64>();
    let classes = || all[weight.clone()].chunks_exact(width).zip(&all[bias.clone()]);
    seen.iter().map(|h| classes().map(|(row, &bias)| logit(h, row, bias)).collect()).collect()
}

#[test]
fn tensorflows_variables_give_its_logits() {
    for name in ["basic-rnn", "basic-lstm", "gru", "lstm", "bidirectional", "keras-lstm", "keras-gru"] {
        let (source, job, answers) = fixture(name);
        let layout = layout_of(&job, &answers);
        let (parameters, _) = source.make(&job, &facts(Some("abcdefgh")), &layout).unwrap();
        let ours = logits(&layout, &parameters, &answers.inputs);
        assert_eq!(ours.len(), answers.logits.len());
        let pairs = ours.iter().flatten().zip(answers.logits.iter().flatten());
        let largest = answers.logits.iter().flatten().fold(0.0_f64, |most, x| most.max(x.abs()));
        let difference = pairs.fold(0.0_f64, |most, (a, b)| most.max((a - b).abs()));
        println!("{name}: largest difference {difference:e} of {largest}");
        assert!(largest > 0.1 && difference <= LIMIT * largest, "{name}: {difference:e} of {largest}");
    }
}

#[test]
fn a_job_whose_cells_would_do_something_else_with_the_arrays_is_refused() {
    let cases = [
        (
            "gru",
            ("reset", "after"),
            "has parameters for reset = \"before\", this job has \"after\"",
            "reset=before",
        ),
        ("keras-gru", ("reset", "before"), "has parameters for reset = \"after\"", "reset=after"),
        (
            "basic-lstm",
            ("recurrent_activation", "hard_sigmoid"),
            "has parameters for recurrent_activation = \"sigmoid\"",
            "recurrent_activation=sigmoid",
        ),
        ("basic-lstm", ("hidden_size", "7"), "tensor rnn.weight_ih_l0 is [24, 8] in ", "hidden_size=6"),
        ("lstm", ("peepholes", "false"), "has the tensor rnn.peephole_f_l0, which this", "peepholes=true"),
    ];
    for (name, setting, sentence, hint) in cases {
        let (source, _, answers) = fixture(name);
        let job = job_of(&answers.job, &[setting]);
        let problem = source.make(&job, &facts(Some("abcdefgh")), &layout_of(&job, &answers)).unwrap_err();
        assert!(problem.sentence.contains(sentence), "{problem}");
        assert!(problem.hint.as_ref().unwrap().contains(hint), "{problem}");
    }
}
