//! First parameters from another run, or from another program: what `--init-from` and `import` mean.

use std::path::PathBuf;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use coordinator::InitialParameters;
use coordinator::data::DataFacts;
use coordinator::store::gate_order::GateOrder;
use coordinator::store::weights::{ArrayOptions, Weights};
use model::init::initial_parameters;
use protocol::cell::Cell;
use protocol::job::{JobSpec, Task};
use protocol::layout::{Input, StateLayout, Tensor};
use protocol::problem::Problem;

/// The parameters of a run directory, of a checkpoint, of a safetensors file with PyTorch's names, or of a `.npz` file
/// with TensorFlow's.
#[derive(Debug)]
pub(crate) struct WarmStart {
    path: PathBuf,
    options: ArrayOptions,
}

/// What a `.npz` file does not say about its arrays.
#[derive(Debug, Clone, Copy, Default, Args)]
pub(crate) struct ArrayArgs {
    /// The order of the gates in a .npz file [default: tf1, or keras where it has a recurrent_kernel]
    #[arg(long, value_name = "ORDER", value_parser = gate_order())]
    gates: Option<GateOrder>,
    /// What an LSTM in a .npz file added to its forget gates besides the bias [default: 1 for tf1, else 0]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    forget_bias: Option<f64>,
}

fn gate_order() -> impl TypedValueParser<Value = GateOrder> {
    let order_of = |name: String| GateOrder::ALL.into_iter().find(|(known, _)| *known == name);
    PossibleValuesParser::new(GateOrder::ALL.map(|(name, _)| name))
        .map(move |name| order_of(name).expect("the parser lets through what is known").1)
}

impl ArrayArgs {
    pub(crate) fn is_empty(&self) -> bool {
        self.gates.is_none() && self.forget_bias.is_none()
    }

    /// The same options as `--name=value`.
    pub(crate) fn to_words(self) -> Vec<String> {
        let name_of = |order| GateOrder::ALL.into_iter().find(|(_, known)| *known == order);
        let gates = self.gates.and_then(name_of).map(|(name, _)| format!("--gates={name}"));
        gates.into_iter().chain(self.forget_bias.map(|x| format!("--forget-bias={x}"))).collect()
    }
}

impl WarmStart {
    pub(crate) fn new(path: PathBuf, args: ArrayArgs) -> Self {
        Self { path, options: ArrayOptions { gates: args.gates, forget_bias: args.forget_bias } }
    }
}

impl InitialParameters for WarmStart {
    fn make(
        &self,
        job: &JobSpec,
        facts: &DataFacts,
        layout: &StateLayout,
    ) -> Result<(Vec<f32>, String), Problem> {
        let weights = Weights::read(&self.path, job.cell, &self.options)?;
        if let (Some(there), Some(here)) = (&weights.labels, &facts.labels)
            && there != here
        {
            return Err(Problem::usage(format!(
                "{} tells {} labels apart, and not those of {}",
                weights.origin,
                there.len(),
                facts.name
            ))
            .hint(format!("its labels are {}", listed(there))));
        }
        let (mut parameters, notice) = match (&weights.vocabulary, &facts.vocabulary) {
            (Some(there), Some(here)) if there != here => by_character(&weights, job, layout, (there, here))?,
            _ => verbatim(&weights, layout)?,
        };
        // Of another cell, the shapes have already been refused.
        weights.mean_the_same(job)?;
        move_forget_bias(weights.forget_bias - job.forget_bias, layout, &mut parameters);
        Ok((parameters, notice))
    }
}

/// Labels for people, cut after some.
fn listed(labels: &[String]) -> String {
    const MOST: usize = 20;
    let more = if labels.len() > MOST { ", ..." } else { "" };
    labels[..labels.len().min(MOST)].join(", ") + more
}

/// Parameters of a network of the same shape over the same characters.
fn verbatim(weights: &Weights, layout: &StateLayout) -> Result<(Vec<f32>, String), Problem> {
    let mut parameters = vec![0.0; layout.parameters()];
    for tensor in &layout.tensors {
        copy(weights, tensor, &mut parameters[tensor.range.clone()])?;
    }
    weights.only(&layout.tensors)?;
    Ok((parameters, format!("starting from the parameters of {}", weights.origin)))
}

/// All of a tensor. An initial state that was never learnt was zero.
fn copy(weights: &Weights, Tensor { name, shape, .. }: &Tensor, own: &mut [f32]) -> Result<(), Problem> {
    match name.starts_with("rnn.initial_") && !weights.has(name) {
        true => own.fill(0.0),
        false => own.copy_from_slice(weights.tensor(name, shape)?),
    }
    Ok(())
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
    // The places of each shared character, here and there.
    let shared: Vec<(usize, usize)> = here
        .iter()
        .enumerate()
        .filter_map(|(at, character)| Some((at, there.iter().position(|other| other == character)?)))
        .collect();
    for tensor in &layout.tensors {
        let own = &mut parameters[tensor.range.clone()];
        match (by(tensor, job.task, layout.shape.input), &tensor.shape[..]) {
            (Characters::Columns, &[rows, width]) => {
                let theirs = weights.tensor(&tensor.name, &[rows, there.len()])?;
                for (own, theirs) in own.chunks_exact_mut(width).zip(theirs.chunks_exact(there.len())) {
                    shared.iter().for_each(|&(to, from)| own[to] = theirs[from]);
                }
            }
            (Characters::Rows, &[_, ref row @ ..]) => {
                let theirs = weights.tensor(&tensor.name, &[&[there.len()], row].concat())?;
                let width: usize = row.iter().product();
                for &(to, from) in &shared {
                    own[to * width..][..width].copy_from_slice(&theirs[from * width..][..width]);
                }
            }
            _ => copy(weights, tensor, own)?,
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

/// What of a tensor belongs to a character.
enum Characters {
    Columns,
    Rows,
    Nothing,
}

fn by(tensor: &Tensor, task: Task, input: Input) -> Characters {
    match tensor.name.as_str() {
        "rnn.weight_ih_l0" | "rnn.weight_ih_l0_reverse" if matches!(input, Input::OneHot(_)) => {
            Characters::Columns
        }
        "embedding.weight" => Characters::Rows,
        // Other tasks' classes are no characters.
        "head.weight" | "head.bias" if task == Task::Chars => Characters::Rows,
        _ => Characters::Nothing,
    }
}

/// Makes the forget gates' biases larger by what these gates got besides where the parameters come from, and do not get
/// here.
fn move_forget_bias(by: f64, layout: &StateLayout, parameters: &mut [f32]) {
    if layout.shape.cell != Cell::Lstm || by == 0.0 {
        return;
    }
    for (at, layer) in layout.shape.layers().enumerate() {
        for direction in layout.layer(at) {
            let bias = &mut parameters[direction.bias_ih.clone()];
            // i, f, g, o
            for value in &mut bias[layer.hidden_size..2 * layer.hidden_size] {
                *value = (f64::from(*value) + by) as f32;
            }
        }
    }
}

#[cfg(test)]
mod tests;
