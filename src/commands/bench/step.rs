//! `lockstep bench step`: the time of whole training steps.

use std::sync::Arc;
use std::time::Instant;

use benches::step::{StepOptions, StepTimes, measure};
use benches::summary::Summary;
use benches::workload::Workload;
use clap::Args;
use protocol::problem::{Exit, Problem};
use serde_json::json;

use super::{counted, rounded};
use crate::args::{SimdArg, cores, settings_of, thread_count};
use crate::commands::print;

#[derive(Debug, Args)]
pub(crate) struct StepArgs {
    /// char-lstm, char-gru, char-lstm-512, mnist-rnn, mnist-lstm, mnist-gru or classify-text
    #[arg(default_value = "char-lstm")]
    preset: String,
    /// Workers, each with its part of the shards
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    workers: u32,
    /// Threads of each worker [default: its part of the cores]
    #[arg(long, value_name = "N", value_parser = thread_count())]
    threads: Option<usize>,
    /// Time at least this many steps
    #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Go on for at least this long
    #[arg(long, value_name = "SECONDS", default_value_t = 6.0, allow_negative_numbers = true)]
    seconds: f64,
    #[command(flatten)]
    simd: SimdArg,
    /// Clip the gradient of the global batch, of each shard, or none: global, shard or none [default: the preset's]
    #[arg(long, value_name = "WHERE")]
    clip: Option<String>,
    /// Change any key of the job, e.g. hidden_size=256 (may be repeated)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<String>,
    /// As one JSON object
    #[arg(long)]
    json: bool,
}

/// `started` is when the process began.
pub(super) fn run(args: &StepArgs, started: Instant) -> Result<Exit, Problem> {
    // Infinity would end at the most steps; less than nothing is a mistake.
    if args.seconds.is_nan() || args.seconds < 0.0 {
        return Err(Problem::usage(format!("--seconds {} is no time to measure for", args.seconds))
            .hint("for example --seconds 6"));
    }
    let options = StepOptions {
        simd: args.simd.resolve()?,
        workers: args.workers,
        threads: args.threads.unwrap_or_else(|| (cores() / args.workers as usize).max(1)),
        steps: args.steps as usize,
        seconds: args.seconds,
    };
    let mut settings = settings_of(&args.settings)?;
    settings.extend(args.clip.iter().map(|clip| ("clip".to_owned(), clip.clone())));
    let workload = Arc::new(Workload::new(&args.preset, &settings)?);
    let times = measure(&workload, &options, started)?;
    let shown = if args.json { as_json } else { as_lines };
    print(&shown(&args.preset, &workload, &options, &times))?;
    Ok(Exit::Done)
}

fn as_lines(preset: &str, workload: &Workload, options: &StepOptions, times: &StepTimes) -> String {
    let (job, shape) = (&workload.job, &workload.data.model);
    let Summary { n, median_ms, min_ms, p90_ms, max_ms } = times.steps;
    let rate = times.gflop_s();
    let memory = times.peak_memory_mib.map_or("unknown".to_owned(), |mib| format!("{mib:.0} MiB at most"));
    [
        format!(
            "{preset}  {} of {} units, T {}, batch {}, {}, {}",
            counted(shape.num_layers(), "layer"),
            job.hidden_size,
            workload.data.seq_len,
            job.batch_size,
            counted(job.shards as usize, "shard"),
            job.precision,
        ),
        format!(
            "ran on      {} with {} each ({})",
            counted(options.workers as usize, "worker"),
            counted(options.threads, "thread"),
            options.simd,
        ),
        format!("step        {median_ms:.2} ms, median of {n}; fastest {min_ms:.2}, 9 in 10 below {p90_ms:.2}, slowest {max_ms:.2}"),
        format!("            of that {:.2} ms in the all-reduce", times.reduce.median_ms),
        format!(
            "rate        {rate:.1} GFLOP/s ({:.3} GFLOP a step), {:.1} % of the {:.1} of f32 multiply-adds in registers",
            times.gflop_per_step,
            100.0 * rate / times.fma_rate,
            times.fma_rate,
        ),
        format!("memory      {memory}"),
        format!("first step  done {:.3} s after the start", times.start_to_first_step),
        format!("loss        {:.3} in the last step\n", times.loss),
    ]
    .join("\n")
}

fn as_json(preset: &str, workload: &Workload, options: &StepOptions, times: &StepTimes) -> String {
    let job = &workload.job;
    let object = json!({
        "preset": preset,
        "precision": job.precision,
        "workers": options.workers,
        "threads": options.threads,
        "simd": options.simd.to_string(),
        "clip": job.clip,
        "batch_size": job.batch_size,
        "shards": job.shards,
        "hidden_size": job.hidden_size,
        "seq_len": workload.data.seq_len,
        "n": times.steps.n,
        "ms_med": rounded(times.steps.median_ms),
        "ms_min": rounded(times.steps.min_ms),
        "ms_p90": rounded(times.steps.p90_ms),
        "ms_max": rounded(times.steps.max_ms),
        "reduce_ms_med": rounded(times.reduce.median_ms),
        "gflop_per_step": rounded(times.gflop_per_step),
        "gflop_s": rounded(times.gflop_s()),
        "fma_rate_gflop_s": rounded(times.fma_rate),
        "of_fma_rate": rounded(times.gflop_s() / times.fma_rate),
        "rss_mib": times.peak_memory_mib.map(rounded),
        "start_to_first_step_s": rounded(times.start_to_first_step),
        "loss": rounded(times.loss),
    });
    format!("{object}\n")
}
