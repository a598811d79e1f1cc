//! `lockstep bench roofline`: what this machine can do at most.

use benches::roofline::{Bandwidth, Rate, levels, own_precision};
use clap::Args;
use protocol::problem::{Exit, Problem};
use serde_json::json;

use super::rounded;
use crate::args::{SimdArg, cores, thread_count};
use crate::commands::print;

#[derive(Debug, Args)]
pub(crate) struct RooflineArgs {
    /// Threads of the measurements that use several [default: all cores]
    #[arg(long, value_name = "N", value_parser = thread_count())]
    threads: Option<usize>,
    #[command(flatten)]
    simd: SimdArg,
    /// As JSON, one object a line
    #[arg(long)]
    json: bool,
}

/// Fails if a product is not as fast as it must be, or faster than can be.
pub(super) fn run(args: &RooflineArgs) -> Result<Exit, Problem> {
    let levels = match args.simd.is_given() {
        true => args.simd.resolve().map(|simd| vec![(simd, own_precision(simd))])?,
        false => levels(),
    };
    let mut threads = vec![1, args.threads.unwrap_or_else(cores)];
    threads.dedup();
    if !args.json {
        print("level         threads  multiply-adds, GFLOP/s  product, GFLOP/s   share\n")?;
    }
    let mut verdicts = Vec::new();
    for (simd, precision) in levels {
        for &threads in &threads {
            let rate = Rate::measure(simd, precision, threads);
            print(&if args.json { rate_json(&rate) } else { rate_line(&rate) })?;
            verdicts.push(rate.verdict());
        }
    }
    if !args.json {
        print("\nmemory        threads              read, GB/s        copy, GB/s\n")?;
    }
    for threads in threads {
        let bandwidth = Bandwidth::measure(threads);
        print(&if args.json { bandwidth_json(&bandwidth) } else { bandwidth_line(&bandwidth) })?;
    }
    verdicts.into_iter().collect::<Result<(), Problem>>()?;
    Ok(Exit::Done)
}

fn rate_line(rate: &Rate) -> String {
    let Rate { simd, precision, threads, fma, gemm, share } = rate;
    let level = format!("{simd}, {precision}");
    format!("{level:<12}  {threads:>7}  {fma:>22.1}  {gemm:>16.1}  {:>4.1} %\n", 100.0 * share)
}

fn rate_json(rate: &Rate) -> String {
    let Rate { simd, precision, threads, fma, gemm, share } = rate;
    let object = json!({
        "kind": "rate",
        "simd": simd.to_string(),
        "precision": precision,
        "threads": threads,
        "fma_rate_gflop_s": rounded(*fma),
        "gemm_gflop_s": rounded(*gemm),
        "of_fma_rate": rounded(*share),
    });
    format!("{object}\n")
}

fn bandwidth_line(Bandwidth { threads, read, copy }: &Bandwidth) -> String {
    format!("{:<12}  {threads:>7}  {read:>22.1}  {copy:>16.1}\n", "256 MiB")
}

fn bandwidth_json(Bandwidth { threads, read, copy }: &Bandwidth) -> String {
    let object = json!({
        "kind": "memory",
        "threads": threads,
        "read_gb_s": rounded(*read),
        "copy_gb_s": rounded(*copy),
    });
    format!("{object}\n")
}
