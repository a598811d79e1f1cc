//! What every peer in Rust shares: the presets, the protocol of `torch_step.py`, its JSON line.

use std::env;
use std::fs;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Instant;

use clap::Parser;
use serde_json::json;

/// Norm at which the gradient is clipped.
pub const CLIP_NORM: f64 = 5.0;
/// Adam's.
pub const LEARNING_RATE: f64 = 1e-3;
/// Different batches, taken in turn.
pub const BATCHES: usize = 32;
const WARM_UP: usize = 8;
const MOST_STEPS: usize = 2000;

/// Measures whole training steps of one preset; prints one JSON line.
#[derive(Debug, Parser)]
struct Args {
    /// char-lstm, char-gru, char-lstm-512, mnist-rnn, mnist-lstm or mnist-gru
    preset: String,
    /// Threads that compute
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Time at least this many steps
    #[arg(long, default_value_t = 60)]
    steps: usize,
    /// Go on for at least this long
    #[arg(long, default_value_t = 6.0)]
    seconds: f64,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Cell {
    Rnn,
    Lstm,
    Gru,
}

/// What is trained, and the shape of its batches.
#[derive(Debug, Clone, Copy)]
pub struct Preset {
    pub cell: Cell,
    pub layers: usize,
    pub hidden_size: usize,
    /// Characters of the vocabulary, or bytes of an image's row.
    pub input_size: usize,
    pub seq_len: usize,
    pub batch_size: usize,
    pub classes: usize,
    /// Characters enter one-hot, and each is followed by an answer; images enter row by row and have one.
    pub characters: bool,
}

impl Preset {
    fn named(name: &str) -> Option<Self> {
        let (kind, cell) = name.split_once('-')?;
        let (cell, wide) = match cell {
            "rnn" => (Cell::Rnn, false),
            "lstm" => (Cell::Lstm, false),
            "gru" => (Cell::Gru, false),
            "lstm-512" => (Cell::Lstm, true),
            _ => return None,
        };
        match kind {
            "char" if cell != Cell::Rnn => Some(Self {
                cell,
                layers: 2,
                hidden_size: if wide { 512 } else { 128 },
                input_size: 65,
                seq_len: if wide { 100 } else { 50 },
                batch_size: 64,
                classes: 65,
                characters: true,
            }),
            "mnist" if !wide => Some(Self {
                cell,
                layers: 1,
                hidden_size: 150,
                input_size: 28,
                seq_len: 28,
                batch_size: 150,
                classes: 10,
                characters: false,
            }),
            _ => None,
        }
    }
}

/// Measures the step that `trainer` makes of a preset: from the number of a step to its mean loss. Prints the line.
///
/// # Panics
/// No such preset.
pub fn measure<Step: FnMut(usize) -> f64>(peer: &str, trainer: impl FnOnce(Preset) -> Step) {
    let started = Instant::now();
    let args = Args::parse();
    let preset = Preset::named(&args.preset).unwrap_or_else(|| panic!("unknown preset {}", args.preset));
    limit_threads(args.threads);

    let mut step = trainer(preset);
    let mut loss = step(0);
    let start_to_first_step = started.elapsed();
    for number in 1..WARM_UP {
        step(number);
    }
    let warm = Instant::now();
    let mut times_ms: Vec<f64> = Vec::new();
    while times_ms.len() < args.steps.max(1)
        || (warm.elapsed().as_secs_f64() < args.seconds && times_ms.len() < MOST_STEPS)
    {
        let start = Instant::now();
        loss = step(WARM_UP + times_ms.len());
        times_ms.push(1e3 * start.elapsed().as_secs_f64());
    }
    times_ms.sort_by(f64::total_cmp);
    let n = times_ms.len();
    let line = json!({
        "peer": peer,
        "preset": args.preset,
        "threads": args.threads,
        "batch_size": preset.batch_size,
        "n": n,
        "ms_med": rounded((times_ms[(n - 1) / 2] + times_ms[n / 2]) / 2.0),
        "ms_min": rounded(times_ms[0]),
        "ms_p90": rounded(times_ms[(9 * n).div_ceil(10) - 1]),
        "ms_max": rounded(times_ms[n - 1]),
        "rss_mib": peak_memory_mib(),
        "start_to_first_step_s": rounded(start_to_first_step.as_secs_f64()),
        "loss": rounded(loss),
    });
    println!("{line}");
}

/// Starts this process again unless its environment already says so: that is where all thread pools look.
fn limit_threads(threads: usize) {
    let (key, threads) = ("RAYON_NUM_THREADS", threads.to_string());
    if env::var(key).as_ref() != Ok(&threads) {
        let program = env::current_exe().expect("this program has a file");
        let error = Command::new(program).args(env::args_os().skip(1)).env(key, threads).exec();
        panic!("cannot start again: {error}");
    }
}

fn rounded(value: f64) -> f64 {
    (1e3 * value).round() / 1e3
}

/// The most memory that the process has held; `None` where the system does not say.
fn peak_memory_mib() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? / 1024)
}
