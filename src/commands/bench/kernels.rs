//! `lockstep bench kernels`: the kernels of a training step, one by one.

use benches::kernel_rates::{KernelRate, KernelSizes, measure};
use benches::workload::Workload;
use clap::Args;
use protocol::job::presets;
use protocol::problem::{Exit, Problem};
use serde_json::json;

use super::rounded;
use crate::args::SimdArg;
use crate::commands::print;

#[derive(Debug, Args)]
pub(crate) struct KernelsArgs {
    /// Presets whose sizes are taken [default: all]
    #[arg(value_name = "PRESET")]
    presets: Vec<String>,
    /// Units of a layer, instead of the preset's
    #[arg(long, value_name = "H")]
    hidden: Option<u32>,
    /// Rows of a batch, instead of the preset's
    #[arg(long, value_name = "B")]
    batch: Option<u32>,
    /// Time steps of a row, instead of the preset's
    #[arg(long, value_name = "T", value_parser = clap::value_parser!(u16).range(1..))]
    steps: Option<u16>,
    #[command(flatten)]
    simd: SimdArg,
    /// As JSON, one object a line
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &KernelsArgs) -> Result<Exit, Problem> {
    let simd = args.simd.resolve()?;
    let all = || presets().into_iter().map(|(name, _)| name).collect();
    let presets: Vec<String> = if args.presets.is_empty() { all() } else { args.presets.clone() };
    let changed = [("hidden_size", args.hidden), ("batch_size", args.batch)];
    let settings: Vec<(String, String)> =
        changed.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?.to_string()))).collect();
    let mut all_sizes = Vec::new();
    for preset in presets {
        let mut sizes = KernelSizes::of(&Workload::new(&preset, &settings)?);
        if let Some(steps) = args.steps {
            sizes.seq_len = steps.into();
        }
        all_sizes.push((preset, sizes));
    }
    for (preset, sizes) in all_sizes {
        let KernelSizes { hidden_size, batch_size, seq_len, .. } = sizes;
        if !args.json {
            print(&format!("{preset}  H {hidden_size}, batch {batch_size}, T {seq_len}, {simd}\n"))?;
        }
        for KernelRate { kernel, unit, units, ns_per_unit, gflop_s, of_fma_rate } in measure(simd, &sizes)? {
            print(&if args.json {
                let object = json!({
                    "preset": preset,
                    "simd": simd.to_string(),
                    "hidden_size": hidden_size,
                    "batch_size": batch_size,
                    "seq_len": seq_len,
                    "kernel": kernel,
                    "unit": unit,
                    "units": units,
                    "ns_per_unit": rounded(ns_per_unit),
                    "gflop_s": gflop_s.map(rounded),
                    "of_fma_rate": of_fma_rate.map(rounded),
                });
                format!("{object}\n")
            } else {
                let rate = match (gflop_s, of_fma_rate) {
                    (Some(rate), Some(share)) => format!("  {rate:>7.1} GFLOP/s  {:>5.1} %", 100.0 * share),
                    _ => String::new(),
                };
                format!("  {kernel:<25}  {ns_per_unit:>9.3} ns per {unit:<9}{rate}\n")
            })?;
        }
    }
    Ok(Exit::Done)
}
