//! The oracle against PyTorch and TensorFlow, in f64, read from the files that `tests/fixtures/make_*.py` write.

use kernels::oracle::head::Head;
use kernels::oracle::network::{Batch, Input, Network};
use kernels::oracle::optimizer::{Adam, EpsilonPlacement, Sgd, adam, clip_by_global_norm, sgd};
use kernels::oracle::parameters::Layout;
use kernels::oracle::stack::{InitialState, Row, Stack};

use crate::fixture::{Case, Fixture};
use crate::largest::{Largest, distance};

/// The largest difference allowed, as a share of a tensor's largest number.
const LIMIT: f64 = 1e-10;

/// The flat parameters, from tensors by name; what is not named is zero.
fn flat(layout: &Layout, named: &[(String, Vec<f64>)]) -> Vec<f64> {
    let mut flat = vec![0.0; layout.parameter_count()];
    for (name, values) in named {
        flat[layout.tensor(name).unwrap().range.clone()].copy_from_slice(values);
    }
    flat
}

/// One file's stacks: outputs, final states, and the gradients of all that went in.
fn stacks_equal(file: &str, cases: usize) {
    let fixture = Fixture::read(file);
    let all = fixture.cases("stacks");
    assert_eq!(all.len(), cases);
    let [mut outputs, mut finals, mut gradients] = [(); 3].map(|()| Largest::default());
    for case in &all {
        let place = |tensor: &str| format!("{tensor} of {}", case.name());
        let (shape, inputs) = case.find("inputs").unwrap();
        let [rows, seq_len, input_size] = shape[..] else { panic!("inputs are [B, T, I]") };
        let stack = Stack { input_size, layers: case.layers(), initial_state: InitialState::Zero };
        let mut layout = Layout::default();
        let places = stack.place(&mut layout);
        let params = flat(&layout, &case.ours("parameter"));
        let lengths = case.sizes("lengths").unwrap_or(vec![seq_len; rows]);
        let initial = case.find("initial").map(|(_, state)| state);
        let (d_outputs, d_final) = (case.numbers("d_outputs"), case.numbers("d_final"));

        let mut total = vec![0.0; params.len()];
        let [mut got_outputs, mut got_final, mut got_inputs, mut got_initial] = [(); 4].map(|()| Vec::new());
        for (at, &length) in lengths.iter().enumerate() {
            let state_size = stack.state_size();
            let row = Row {
                inputs: &inputs[at * seq_len * input_size..][..seq_len * input_size],
                length,
                fed_state: initial.as_ref().map(|initial| &initial[at * state_size..][..state_size]),
                resets: &[],
                masks: &[],
            };
            let trace = stack.forward(&places, &params, row);
            let width = stack.output_size();
            assert!(trace.outputs[length * width..].iter().all(|&output| output == 0.0));
            let d_ends = (
                &d_outputs[at * seq_len * width..][..seq_len * width],
                &d_final[at * state_size..][..state_size],
            );
            let gradient = stack.backward(&places, &params, row, &trace, d_ends, &mut total);
            got_outputs.extend(trace.outputs);
            got_final.extend(trace.final_state);
            got_inputs.extend(gradient.d_inputs);
            got_initial.extend(gradient.d_fed_state);
        }
        outputs.note(distance(&got_outputs, &case.numbers("outputs")), LIMIT, || place("outputs"));
        finals.note(distance(&got_final, &case.numbers("final")), LIMIT, || place("final"));
        gradients.note(distance(&got_inputs, &case.numbers("grad_inputs")), LIMIT, || place("inputs"));
        if initial.is_some() {
            let want = case.numbers("grad_initial");
            gradients.note(distance(&got_initial, &want), LIMIT, || place("initial"));
        }
        let want = case.ours("gradient");
        for (name, want) in &want {
            let got = &total[layout.tensor(name).unwrap().range.clone()];
            gradients.note(distance(got, want), LIMIT, || place(name));
        }
        for tensor in &layout.tensors {
            let named = want.iter().any(|(name, _)| *name == tensor.name);
            assert!(
                named || tensor.name.starts_with("rnn.bias_hh"),
                "{} is not compared",
                place(&tensor.name)
            );
        }
    }
    outputs.print(&format!("{file}: outputs"));
    finals.print(&format!("{file}: final states"));
    gradients.print(&format!("{file}: gradients"));
}

#[test]
fn stacks_equal_pytorch() {
    stacks_equal("pytorch", 22);
}

#[test]
fn stacks_equal_tensorflow() {
    stacks_equal("tensorflow", 37);
}

/// Embedding, layers of different widths, dropout masks, lengths, resets, fed and learnt initial states, both heads.
#[test]
fn networks_equal_pytorch() {
    let fixture = Fixture::read("pytorch");
    let cases = fixture.cases("networks");
    assert_eq!(cases.len(), 12, "3 cells x 2 heads x fed and learnt states");
    let [mut losses, mut finals, mut gradients] = [(); 3].map(|()| Largest::default());
    for case in &cases {
        let place = |tensor: &str| format!("{tensor} of {}", case.name());
        let network = network(case);
        let layout = network.layout();
        let named = |what: &str| -> Vec<(String, Vec<f64>)> {
            let of = |name: &String| case.numbers(&format!("{what}/{name}"));
            layout.tensors.iter().map(|tensor| (tensor.name.clone(), of(&tensor.name))).collect()
        };
        let params = flat(&layout, &named("parameter"));
        let (tokens, targets) = (case.ids("tokens"), case.ids("targets"));
        let (lengths, initial) =
            (case.sizes("lengths").unwrap(), case.find("initial").map(|(_, state)| state));
        let resets: Vec<Vec<usize>> = serde_json::from_value(case.description["resets"].clone()).unwrap();
        let masks: Vec<Vec<f64>> =
            (0..network.stack.layers.len()).map(|layer| case.numbers(&format!("masks/{layer}"))).collect();
        let rows = lengths.len();
        let batch = Batch {
            lengths: Some(&lengths),
            fed_state: initial.as_deref(),
            resets: Some(&resets),
            masks: Some(&masks),
            ..Batch::new(rows, tokens.len() / rows, Input::Tokens(&tokens), &targets)
        };
        let got = network.forward_backward(&params, &batch);
        let valid = if network.head == Head::EveryStep { lengths.iter().sum() } else { rows };
        assert_eq!(got.predictions, valid, "{}", case.name());
        assert_eq!(got.correct as u64, case.description["correct"].as_u64().unwrap(), "{}", case.name());
        losses.note(distance(&[got.loss_sum], &case.numbers("loss")), LIMIT, || place("loss"));
        finals.note(distance(&got.final_state, &case.numbers("final")), LIMIT, || place("final"));
        if initial.is_some() {
            let want = case.numbers("grad_initial");
            gradients.note(distance(&got.d_fed_state, &want), LIMIT, || place("initial"));
        }
        for (tensor, (name, want)) in layout.tensors.iter().zip(named("gradient")) {
            gradients.note(distance(&got.gradient[tensor.range.clone()], &want), LIMIT, || place(&name));
        }
    }
    losses.print("pytorch: losses of networks");
    finals.print("pytorch: final states of networks");
    gradients.print("pytorch: gradients of networks");
}

fn network(case: &Case<'_>) -> Network {
    let description = &case.description;
    let size = |key: &str| description[key].as_u64().unwrap() as usize;
    let learnt = description["learnt"].as_bool().unwrap();
    Network {
        embedding: Some(size("embedding")),
        stack: Stack {
            input_size: size("input_size"),
            layers: case.layers(),
            initial_state: if learnt { InitialState::Learnt } else { InitialState::Zero },
        },
        head: match description["head"].as_str().unwrap() {
            "every_step" => Head::EveryStep,
            "final" => Head::Final,
            other => panic!("head {other}"),
        },
        classes: size("classes"),
    }
}

#[test]
fn optimizers_equal_pytorch_and_tensorflow() {
    let mut largest = Largest::default();
    for file in ["pytorch", "tensorflow"] {
        let fixture = Fixture::read(file);
        for case in fixture.cases("optimizers") {
            let number = |key: &str| case.description[key].as_f64().unwrap();
            let mut params = case.numbers("start");
            let len = params.len();
            let (gradients, want) = (case.numbers("gradients"), case.numbers("parameters"));
            let (mut first, mut second) = (vec![0.0; len], vec![0.0; len]);
            for (step, (gradient, want)) in
                gradients.chunks_exact(len).zip(want.chunks_exact(len)).enumerate()
            {
                let mut gradient = gradient.to_vec();
                if let Some(clip_norm) = case.description["clip_norm"].as_f64() {
                    clip_by_global_norm(&mut gradient, clip_norm);
                }
                match case.description["optimizer"].as_str().unwrap() {
                    "adam" => {
                        let placement = match case.description["placement"].as_str().unwrap() {
                            "after" => EpsilonPlacement::AfterCorrection,
                            "before" => EpsilonPlacement::BeforeCorrection,
                            other => panic!("placement {other}"),
                        };
                        let (lr, epsilon) = (number("lr"), number("epsilon"));
                        let options =
                            Adam { lr, beta1: number("beta1"), beta2: number("beta2"), epsilon, placement };
                        adam(options, step as u64 + 1, &mut params, &gradient, &mut first, &mut second);
                    }
                    "sgd" => {
                        let options = Sgd { lr: number("lr"), momentum: number("momentum") };
                        sgd(options, &mut params, &gradient, &mut first);
                    }
                    other => panic!("optimizer {other}"),
                }
                largest.note(distance(&params, want), LIMIT, || {
                    format!("step {step} of {file} {}", case.name())
                });
            }
        }
    }
    largest.print("parameters after each step of an optimizer");
}
