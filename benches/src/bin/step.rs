//! Measures whole training steps of one preset in one process and prints one JSON line.
//!
//! | key | meaning |
//! |---|---|
//! | `preset`, `threads`, `simd`, `clip`, `batch_size` | what ran |
//! | `n` | steps timed, after the warm-up |
//! | `ms_med`, `ms_min`, `ms_p90`, `ms_max` | time of a step: forward, backward, tree over the shards, clip, Adam |
//! | `gflop_per_step`, `gflop_s` | operations of the matrix products (`Workload::gflop_per_step`), and per second of the median |
//! | `rss_mib` | the most memory the process has held |
//! | `start_to_first_step_s` | from the start of `main` to the end of the first step |
//! | `loss` | mean loss of the last step, so that a run that computes nonsense is seen |
//!
//! Batches are random and in memory. `peers/torch_step.py` follows the same protocol.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::{Duration, Instant};

use benches::summary::{Summary, peak_memory_mib};
use benches::trainer::Trainer;
use benches::workload::Workload;
use clap::Parser;
use kernels::Simd;
use protocol::problem::Problem;
use serde_json::json;

/// Steps before the first that is timed.
const WARM_UP: usize = 8;
/// However short the steps are, no more are timed.
const MOST_STEPS: usize = 2000;

/// Measures whole training steps of one preset; prints one JSON line.
#[derive(Debug, Parser)]
#[command(name = "lockstep-step")]
struct Args {
    /// char-lstm, char-gru, char-lstm-512, mnist-rnn, mnist-lstm or mnist-gru
    preset: String,
    /// Threads that compute
    #[arg(long, value_name = "N", default_value_t = 2)]
    threads: usize,
    /// Time at least this many steps
    #[arg(long, value_name = "N", default_value_t = 60)]
    steps: usize,
    /// Go on for at least this long
    #[arg(long, value_name = "S", default_value_t = 6.0)]
    seconds: f64,
    /// avx512, avx2 or portable [default: the widest this CPU has]
    #[arg(long, value_name = "LEVEL")]
    simd: Option<String>,
    /// global, shard or none [default: the preset's]
    #[arg(long, value_name = "WHERE")]
    clip: Option<String>,
    /// Change any key of the job, e.g. keep_prob=0.8 (may be repeated)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<String>,
}

fn main() -> ExitCode {
    let started = Instant::now();
    match measure(&Args::parse(), started) {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(problem) => {
            eprintln!("error: {problem}");
            if let Some(hint) = &problem.hint {
                eprintln!("hint: {hint}");
            }
            ExitCode::from(problem.exit as u8)
        }
    }
}

fn measure(args: &Args, started: Instant) -> Result<serde_json::Value, Problem> {
    let simd = simd_level(args.simd.as_deref())?;
    let workload = Workload::new(&args.preset, &settings(args)?)?;
    let threads = args.threads.max(1);
    let failed = |error: model::device::DeviceError| Problem::failed(error.to_string());
    let mut trainer = Trainer::new(&workload, simd, threads).map_err(failed)?;

    let mut loss = trainer.step().map_err(failed)?;
    let start_to_first_step = started.elapsed();
    for _ in 1..WARM_UP {
        trainer.step().map_err(failed)?;
    }
    let warm = Instant::now();
    let mut times: Vec<Duration> = Vec::with_capacity(MOST_STEPS);
    while times.len() < args.steps.max(1)
        || (warm.elapsed().as_secs_f64() < args.seconds && times.len() < MOST_STEPS)
    {
        let start = Instant::now();
        loss = trainer.step().map_err(failed)?;
        times.push(start.elapsed());
    }
    let summary = Summary::of(&times);
    let gflop = workload.gflop_per_step();
    Ok(json!({
        "preset": args.preset,
        "threads": threads,
        "simd": simd.to_string(),
        "clip": workload.job.clip,
        "batch_size": workload.job.batch_size,
        "n": summary.n,
        "ms_med": rounded(summary.median_ms),
        "ms_min": rounded(summary.min_ms),
        "ms_p90": rounded(summary.p90_ms),
        "ms_max": rounded(summary.max_ms),
        "gflop_per_step": rounded(gflop),
        "gflop_s": rounded(1e3 * gflop / summary.median_ms),
        "rss_mib": peak_memory_mib().map(rounded),
        "start_to_first_step_s": rounded(start_to_first_step.as_secs_f64()),
        "loss": rounded(loss),
    }))
}

fn simd_level(name: Option<&str>) -> Result<Simd, Problem> {
    name.map_or(Ok(Simd::detect()), str::parse)
        .map_err(|error: kernels::cpu::simd::SimdError| Problem::usage(error.to_string()))
}

fn settings(args: &Args) -> Result<Vec<(String, String)>, Problem> {
    let clip = args.clip.iter().map(|clip| ("clip".to_owned(), clip.clone()));
    let mut all: Vec<(String, String)> = clip.collect();
    for setting in &args.settings {
        let (key, value) = setting
            .split_once('=')
            .ok_or_else(|| Problem::usage(format!("--set {setting} has no value")).hint("write KEY=VALUE"))?;
        all.push((key.to_owned(), value.to_owned()));
    }
    Ok(all)
}

/// To three decimals.
fn rounded(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}
