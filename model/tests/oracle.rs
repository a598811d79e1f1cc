//! The CPU device against the f64 oracle: one step's numbers, and whole training steps with every way of clipping.

mod common;

use common::{CELLS, Largest, Outcome, Setup, Sizes, State, TASKS, distance, widen};
use kernels::oracle::activation::Activation;
use kernels::oracle::gru::Gru;
use kernels::oracle::layer::Layer;
use kernels::oracle::lstm::Lstm;
use kernels::oracle::network::{self, Network};
use kernels::oracle::optimizer::{Adam, EpsilonPlacement, adam, clip_by_global_norm};
use kernels::oracle::rnn::Rnn;
use kernels::oracle::stack::{InitialState, Stack};
use kernels::oracle::{cell, head};
use model::device::Pass;
use protocol::batch::{Batch, Inputs};
use protocol::cell::Cell;
use protocol::job::{Clip, Task};
use protocol::layout::Head;
use protocol::sums::StepSums;

/// The largest difference allowed, as a share of a tensor's largest number.
const LIMIT: f64 = 1e-5;

/// What the oracle says about one batch.
struct Expected {
    loss: f64,
    correct: u64,
    recurrent: Vec<f64>,
    /// Gradient of each shard's summed loss.
    by_shard: Vec<Vec<f64>>,
}

/// The oracle's network of a job.
fn network(setup: &Setup) -> Network {
    let shape = &setup.layout.shape;
    let layer = Layer {
        cell: match shape.cell {
            Cell::Rnn => cell::Cell::Rnn(Rnn { activation: Activation::Tanh }),
            Cell::Lstm => cell::Cell::Lstm(Lstm::PLAIN),
            Cell::Gru => cell::Cell::Gru(Gru::PLAIN),
        },
        hidden_size: shape.hidden_sizes[0],
        bidirectional: false,
    };
    Network {
        embedding: None,
        stack: Stack {
            input_size: shape.input.size(),
            layers: vec![layer; shape.num_layers()],
            initial_state: InitialState::Zero,
        },
        head: match shape.head {
            Head::EveryStep => head::Head::EveryStep,
            Head::Final => head::Head::Final,
        },
        classes: shape.classes,
    }
}

fn expected(setup: &Setup, parameters: &[f64], recurrent: &[f64], batch: &Batch) -> Expected {
    let shape = &setup.layout.shape;
    let network = network(setup);
    let mut all = Expected { loss: 0.0, correct: 0, recurrent: Vec::new(), by_shard: Vec::new() };
    for shard in 0..setup.job.shards {
        let part = setup.part(batch, shard..shard + 1);
        let (rows, seq_len, size) = (part.rows(), setup.data.seq_len, network.stack.state_size());
        let state = match shape.head {
            Head::EveryStep => recurrent[part.first_slot as usize * size..][..rows * size].to_vec(),
            Head::Final => vec![0.0; rows * size],
        };
        let run = |input: network::Input<'_>, targets: &[u32]| {
            let batch = network::Batch::new(rows, seq_len, input, targets);
            network.forward_backward(parameters, &network::Batch { fed_state: Some(&state), ..batch })
        };
        let outcome = match &part.inputs {
            Inputs::Tokens(tokens) => {
                let windows = || tokens.chunks_exact(seq_len + 1);
                let of = |range: std::ops::Range<usize>| -> Vec<u32> {
                    windows().flat_map(|w| w[range.clone()].iter().map(|&t| t.into())).collect()
                };
                run(network::Input::Tokens(&of(0..seq_len)), &of(1..seq_len + 1))
            }
            Inputs::Bytes { bytes, labels } => {
                let dense: Vec<f64> = bytes.iter().map(|&byte| f64::from(byte) / 255.0).collect();
                let labels: Vec<u32> = labels.iter().map(|&label| label.into()).collect();
                run(network::Input::Dense(&dense), &labels)
            }
        };
        all.loss += outcome.loss_sum;
        all.correct += outcome.correct as u64;
        if shape.head == Head::EveryStep {
            all.recurrent.extend(outcome.final_state);
        }
        all.by_shard.push(outcome.gradient);
    }
    all
}

fn add_up(by_shard: &[Vec<f64>]) -> Vec<f64> {
    (0..by_shard[0].len()).map(|at| by_shard.iter().map(|gradient| gradient[at]).sum()).collect()
}

#[test]
fn a_step_equals_the_oracle() {
    let [mut losses, mut states, mut partials, mut gradients] = [(); 4].map(|()| Largest::default());
    for cell in CELLS {
        for task in TASKS {
            for num_layers in [1, 2] {
                // Hidden size 128 once per cell and task: several register tiles and panels.
                for (hidden_size, seq_len) in [(1, 1), (1, 9), (7, 1), (7, 9), (33, 1), (33, 9), (128, 9)] {
                    if hidden_size == 128 && num_layers == 2 {
                        continue;
                    }
                    let sizes =
                        Sizes { cell, task, num_layers, hidden_size, seq_len, batch_size: 5, shards: 3 };
                    let setup = Setup::new(sizes, &[("init", "pytorch")]);
                    let (state, batch) = (setup.start(true), setup.batch(0));
                    let got = setup.alone().pass(Pass::Train { step: 0 }, &state, &batch);
                    let want = expected(&setup, &widen(&state.parameters), &widen(&state.recurrent), &batch);

                    let sums = StepSums::total(&got.sums);
                    let targets = if task == Task::Chars { 5 * seq_len } else { 5 };
                    assert_eq!((sums.weight, sums.rows, sums.non_finite), (targets as u64, 5, false));
                    assert_eq!(sums.correct, want.correct, "{sizes:?}");
                    let place = |tensor: &str| format!("{tensor} of {sizes:?}");
                    losses.note((sums.loss - want.loss).abs() / want.loss, 1e-6, || place("loss"));
                    states.note(distance(&got.recurrent, &want.recurrent), LIMIT, || place("state"));
                    let sum = add_up(&want.by_shard);
                    for tensor in &setup.layout.tensors {
                        let range = || tensor.range.clone();
                        // One shard's sum may be all cancellation; all shards together have a scale.
                        let got_parts: Vec<f32> =
                            got.partials.iter().flat_map(|partial| &partial[range()]).copied().collect();
                        let want_parts: Vec<f64> =
                            want.by_shard.iter().flat_map(|partial| &partial[range()]).copied().collect();
                        partials.note(distance(&got_parts, &want_parts), LIMIT, || place(&tensor.name));
                        let difference = distance(&got.gradient[range()], &sum[range()]);
                        gradients.note(difference, LIMIT, || place(&tensor.name));
                    }
                }
            }
        }
    }
    losses.print("loss against f64");
    states.print("final state against f64");
    partials.print("shards' gradient tensors against f64");
    gradients.print("gradient tensors against f64");
}

/// The oracle's training state.
struct Reference {
    parameters: Vec<f64>,
    first_moment: Vec<f64>,
    second_moment: Vec<f64>,
    recurrent: Vec<f64>,
}

impl Reference {
    fn new(state: &State) -> Self {
        Self {
            parameters: widen(&state.parameters),
            first_moment: widen(&state.first_moment),
            second_moment: widen(&state.second_moment),
            recurrent: widen(&state.recurrent),
        }
    }

    /// One step in f64, written from the definition of each way of clipping. Gives how many gradients were clipped
    /// and how many were looked at.
    fn train(&mut self, setup: &Setup, step: u64, batch: &Batch) -> (usize, usize) {
        let job = &setup.job;
        let want = expected(setup, &self.parameters, &self.recurrent, batch);
        let targets = if job.task == Task::Chars { setup.data.seq_len } else { 1 };
        let weights: Vec<f64> =
            batch.shards.iter().map(|shard| (shard.rows.len() * targets) as f64).collect();
        let total: f64 = weights.iter().sum();
        let mut clips = (0, 0);
        let mut clip = |mean: &mut [f64]| {
            clips.0 += usize::from(clip_by_global_norm(mean, job.clip_norm) > job.clip_norm);
            clips.1 += 1;
        };
        let mean = match job.clip {
            Clip::None => add_up(&want.by_shard).iter().map(|g| g / total).collect(),
            Clip::Global => {
                let mut mean: Vec<f64> = add_up(&want.by_shard).iter().map(|g| g / total).collect();
                clip(&mut mean);
                mean
            }
            Clip::Shard => {
                let mut weighted = Vec::new();
                for (gradient, weight) in want.by_shard.iter().zip(weights) {
                    let mut mean: Vec<f64> = gradient.iter().map(|g| g / weight).collect();
                    clip(&mut mean);
                    weighted.push(mean.iter().map(|g| g * weight / total).collect());
                }
                add_up(&weighted)
            }
        };
        let options = Adam {
            lr: job.learning_rate,
            beta1: job.beta1,
            beta2: job.beta2,
            epsilon: job.epsilon,
            placement: EpsilonPlacement::AfterCorrection,
        };
        let Self { parameters, first_moment, second_moment, recurrent } = self;
        adam(options, step + 1, parameters, &mean, first_moment, second_moment);
        *recurrent = want.recurrent;
        clips
    }
}

#[test]
fn training_steps_equal_the_oracle_with_every_way_of_clipping() {
    // Adam divides a gradient by its own size, so at the default ε an element that is all rounding moves as far as any
    // other, and the limit must allow for it. At the larger ε such a move is small and errors stand out.
    for (epsilon, limit) in [("1e-8", LIMIT), ("1e-4", 0.1 * LIMIT)] {
        let mut largest = Largest::default();
        for cell in CELLS {
            for task in TASKS {
                for clip in [Clip::Global, Clip::Shard, Clip::None] {
                    three_steps(&mut largest, limit, (cell, task, clip), epsilon);
                }
            }
        }
        largest.print(&format!("parameters after 3 steps against f64, epsilon {epsilon}"));
    }
}

fn three_steps(largest: &mut Largest, limit: f64, (cell, task, clip): (Cell, Task, Clip), epsilon: &str) {
    let sizes = Sizes { cell, task, num_layers: 2, hidden_size: 17, seq_len: 6, batch_size: 7, shards: 3 };
    let word = format!("{clip:?}").to_lowercase();
    let mut setup = Setup::new(sizes, &[("clip", &word), ("epsilon", epsilon), ("init", "pytorch")]);
    setup.job.clip_norm = middle_norm(&setup);
    let (mut state, mut fleet) = (setup.start(true), setup.alone());
    let mut reference = Reference::new(&state);
    let mut clipped = (0, 0);
    for step in 0..3 {
        let batch = setup.batch(step);
        fleet.train(step, &mut state, &batch);
        let (some, of) = reference.train(&setup, step, &batch);
        clipped = (clipped.0 + some, clipped.1 + of);
    }
    match clip {
        Clip::None => assert_eq!(clipped, (0, 0)),
        _ => assert!(0 < clipped.0 && clipped.0 < clipped.1, "{sizes:?}: {clipped:?} clipped"),
    }
    for tensor in &setup.layout.tensors {
        let range = tensor.range.clone();
        let difference = distance(&state.parameters[range.clone()], &reference.parameters[range]);
        largest.note(difference, limit, || format!("{} of {cell:?} {task:?} {clip:?}", tensor.name));
    }
}

/// A norm that clips some of the first three steps' gradients and leaves others: halfway between the smallest and the
/// largest, of the shards' or of the whole batches' means as the job clips.
fn middle_norm(setup: &Setup) -> f64 {
    let norm = |gradient: &[f64], weight: f64| {
        let mut mean: Vec<f64> = gradient.iter().map(|g| g / weight).collect();
        clip_by_global_norm(&mut mean, 1.0)
    };
    let state = setup.start(true);
    let mut fleet = setup.alone();
    let norms: Vec<f64> = (0..3)
        .flat_map(|step| {
            let Outcome { partials, sums, .. } = fleet.pass(Pass::Train { step }, &state, &setup.batch(step));
            let by_shard: Vec<Vec<f64>> = partials.iter().map(|partial| widen(partial)).collect();
            let weights = sums.iter().map(|sums| sums.weight as f64);
            match setup.job.clip {
                Clip::Shard => by_shard.iter().zip(weights).map(|(g, weight)| norm(g, weight)).collect(),
                _ => vec![norm(&add_up(&by_shard), weights.sum())],
            }
        })
        .collect();
    let (smallest, largest) = norms.iter().fold((f64::MAX, 0.0f64), |(a, b), &n| (a.min(n), b.max(n)));
    0.5 * (smallest + largest)
}
