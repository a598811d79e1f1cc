//! What the f64 oracle says about a batch of a job.

use kernels::oracle::head::{Head as OracleHead, NO_TARGET};
use kernels::oracle::layer::Layer;
use kernels::oracle::network::{self, Network};
use kernels::oracle::stack::{InitialState as OracleInitialState, Stack};
use kernels::oracle::{cell, network::Outcome};
use model::device::Pass;
use protocol::batch::{Batch, Inputs};
use protocol::job::InitialState;
use protocol::layout::{Head, Input};
use protocol::random::{Purpose, dropout_counter, keep_threshold, key, philox4x32_10};

use super::setup::Setup;

/// What the oracle says about one batch.
pub(crate) struct Expected {
    pub(crate) loss: f64,
    pub(crate) correct: u64,
    /// Of each shard.
    pub(crate) weights: Vec<u64>,
    /// State of all slots after the batch; empty where rows carry none.
    pub(crate) recurrent: Vec<f64>,
    /// Gradient of each shard's summed loss.
    pub(crate) by_shard: Vec<Vec<f64>>,
}

/// The oracle's network of a job.
pub(crate) fn network(setup: &Setup) -> Network {
    let shape = &setup.layout.shape;
    let cell = cell::Cell::of(shape.cell, &shape.options);
    let layer = |&hidden_size: &usize| Layer { cell, hidden_size, bidirectional: shape.bidirectional };
    Network {
        embedding: match shape.input {
            Input::Embedding { tokens, .. } => Some(tokens),
            Input::OneHot(_) | Input::Bytes(_) => None,
        },
        stack: Stack {
            input_size: shape.input.size(),
            layers: shape.hidden_sizes.iter().map(layer).collect(),
            initial_state: match shape.initial_state {
                InitialState::Zero => OracleInitialState::Zero,
                InitialState::Learnt => OracleInitialState::Learnt,
            },
        },
        head: match shape.head {
            Head::EveryStep => OracleHead::EveryStep,
            Head::Final => OracleHead::Final,
        },
        classes: shape.classes,
    }
}

/// The oracle over every shard of a batch.
pub(crate) fn expected(
    setup: &Setup,
    pass: Pass,
    parameters: &[f64],
    recurrent: &[f64],
    batch: &Batch,
) -> Expected {
    let mut all =
        Expected { loss: 0.0, correct: 0, weights: Vec::new(), recurrent: Vec::new(), by_shard: Vec::new() };
    for shard in 0..setup.job.shards {
        let outcome = of_rows(setup, pass, parameters, recurrent, &setup.part(batch, shard..shard + 1));
        all.loss += outcome.loss_sum;
        all.correct += outcome.correct as u64;
        all.weights.push(outcome.predictions as u64);
        if setup.layout.shape.carries_state {
            all.recurrent.extend(outcome.final_state);
        }
        all.by_shard.push(outcome.gradient);
    }
    all
}

fn of_rows(setup: &Setup, pass: Pass, parameters: &[f64], recurrent: &[f64], batch: &Batch) -> Outcome {
    let (shape, network, rows) = (&setup.layout.shape, network(setup), batch.rows());
    let lengths: Vec<usize> = batch.lengths.iter().map(|&length| length as usize).collect();
    let seq_len = lengths.iter().copied().max().unwrap_or(0);
    let size = network.stack.state_size();
    let goes_on = shape.carries_state && !batch.begins_pass();
    let fed = goes_on.then(|| &recurrent[batch.first_slot as usize * size..][..rows * size]);
    // `[rows][T]`, filled up behind each row.
    let (mut tokens, mut targets, mut dense) = (Vec::new(), Vec::new(), Vec::new());
    let mut start = 0;
    for (row, &length) in lengths.iter().enumerate() {
        match &batch.inputs {
            Inputs::Tokens(all) => {
                let own = &all[start..start + length + 1];
                tokens.extend((0..seq_len).map(|t| if t < length { own[t].into() } else { 0 }));
                let padding = batch.paddings[row] as usize;
                let target =
                    |t: usize| if t < length && t >= padding { own[t + 1].into() } else { NO_TARGET };
                targets.extend((0..seq_len).map(target));
                start += length + 1;
            }
            Inputs::LabelledTokens { tokens: all, labels } => {
                tokens.extend((0..seq_len).map(|t| if t < length { all[start + t].into() } else { 0 }));
                targets.push(labels[row].into());
                start += length;
            }
            Inputs::Bytes { bytes, labels } => {
                let len = length * shape.input.size();
                dense.extend(bytes[start..start + len].iter().map(|&byte| f64::from(byte) / 255.0));
                targets.push(labels[row].into());
                start += len;
            }
        }
    }
    let resets: Vec<Vec<usize>> = (tokens.chunks(seq_len.max(1)).zip(&lengths))
        .map(|(tokens, &length)| {
            (0..length).filter(|&t| shape.reset_token.map(u32::from) == Some(tokens[t])).collect()
        })
        .collect();
    let masks = masks(setup, pass, batch, seq_len);
    let input = match shape.input {
        Input::Bytes(_) => network::Input::Dense(&dense),
        _ => network::Input::Tokens(&tokens),
    };
    let batch = network::Batch {
        lengths: Some(&lengths),
        fed_state: fed,
        resets: (!resets.is_empty()).then_some(&resets[..]),
        masks: masks.as_deref(),
        ..network::Batch::new(rows, seq_len, input, &targets)
    };
    network.forward_backward(parameters, &batch)
}

/// What each layer's outputs are multiplied with, `[rows][T][D·R]`, drawn unit by unit as the random streams are
/// documented.
fn masks(setup: &Setup, pass: Pass, batch: &Batch, seq_len: usize) -> Option<Vec<Vec<f64>>> {
    let keep_probs = setup.job.layer_keep_probs();
    let Pass::Train { step } = pass else { return None };
    if keep_probs.iter().all(|&keep| keep == 1.0) {
        return None;
    }
    let shape = &setup.layout.shape;
    let key = key(setup.job.seed, Purpose::Dropout);
    let mask = |(index, &keep): (usize, &f32)| {
        let layer = shape.layer(index);
        let is_read = shape.head == Head::EveryStep || index + 1 < shape.num_layers();
        let mut mask = Vec::new();
        for row in 0..batch.rows() as u32 {
            for t in 0..seq_len {
                let t = if setup.job.variational_dropout { 0 } else { t };
                for direction in 0..layer.directions {
                    let position =
                        t * shape.num_layers() * layer.directions + index * layer.directions + direction;
                    for unit in 0..layer.output_size {
                        let counter =
                            dropout_counter(step, batch.first_slot + row, position as u32, unit as u32 / 4);
                        let is_kept = philox4x32_10(key, counter)[unit % 4] < keep_threshold(keep);
                        let scale = 1.0 / f64::from(keep);
                        mask.push(if keep == 1.0 || !is_read {
                            1.0
                        } else if is_kept {
                            scale
                        } else {
                            0.0
                        });
                    }
                }
            }
        }
        mask
    };
    Some(keep_probs.iter().enumerate().map(mask).collect())
}
