//! The command line: parse, build, call. Everything that computes or coordinates lives in the library crates.
#![forbid(unsafe_code)]

mod args;
mod commands;
mod device;
mod forecast;
mod memory;
mod secret;
mod signals;
mod supervisor;
mod tls;
mod token;
mod warm_start;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use model::device::Backend;
use protocol::problem::{Exit, Problem};

use args::{Cli, Command};
use device::WithBackend;

/// After a worker's end its training thread has this long to end too.
const TRAINING_THREAD_LIMIT: Duration = Duration::from_secs(3);

fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("LOCKSTEP_LOG").unwrap_or_else(|_| "warn".into()),
        )
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal() && !has_no_color())
        // It would be said on standard error, which is what has failed: its terminal may be gone.
        .log_internal_errors(false)
        .init();
    match run(cli.command) {
        Ok(exit) => ExitCode::from(exit as u8),
        Err(problem) => {
            let hint = problem.hint.as_ref().map_or_else(String::new, |hint| format!("hint: {hint}\n"));
            // Whether or not anybody can read it any more, the exit code says what happened.
            let _ = std::io::stderr().write_all(format!("error: {problem}\n{hint}").as_bytes());
            ExitCode::from(problem.exit as u8)
        }
    }
}

/// Whether the environment asks for no colours, see no-color.org.
fn has_no_color() -> bool {
    std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
}

fn run(command: Command) -> Result<Exit, Problem> {
    match command {
        Command::Train(train) => runtime()?.block_on(supervisor::train(train)),
        Command::Coordinator(options) => {
            let (watch_stdin, config) = (options.supervised, options.config()?);
            failpoints::obey("coordinator", "coordinator").map_err(Problem::usage)?;
            runtime()?.block_on(async {
                let signals = signals::stop_requests(watch_stdin)?;
                coordinator::run(config, signals).await
            })
        }
        Command::Worker(options) => {
            let (supervised, config) = (options.supervised, options.config()?);
            let (device, simd, threads) = options.device()?;
            let name = config.name.clone();
            failpoints::obey("worker", &name).map_err(Problem::usage)?;
            // What a worker of `train` has to say, the coordinator beside it says.
            let say = |what: String| if supervised { Ok(()) } else { commands::print(&what) };
            say(format!("worker {name}: looking for the coordinator at {}\n", config.coordinator))?;
            let result = device.run(simd, threads, Worker { config, supervised });
            match result {
                Err(problem) if supervised => {
                    tracing::info!("{problem}");
                    Ok(problem.exit)
                }
                Ok(exit) => {
                    let how = if exit == Exit::Done { "is done" } else { "was stopped and can go on" };
                    say(format!("worker {name}: the run {how}\n"))?;
                    Ok(exit)
                }
                Err(problem) => Err(problem),
            }
        }
        Command::Sample(args) => commands::sample::run(&args),
        Command::Eval(args) => commands::eval::run(&args),
        Command::Inspect(args) => commands::inspect::run(&args),
        Command::Diff(args) => commands::diff::run(&args),
        Command::Export(args) => commands::export::run(&args),
        Command::Import(args) => commands::import::run(&args),
        Command::Cert(args) => commands::cert::run(&args),
        Command::Data(args) => commands::data::run(args),
        Command::Doctor(args) => commands::doctor::run(&args),
        Command::Bench(args) => commands::bench::run(&args),
        Command::Completions(args) => commands::completions::run(&args),
        Command::Man(args) => commands::man::run(&args),
    }
}

/// Works for a coordinator, with whatever computes.
struct Worker {
    config: worker::Config,
    /// It ends with whoever holds its standard input open.
    supervised: bool,
}

impl WithBackend for Worker {
    type Output = Result<Exit, Problem>;

    fn with<B>(self, backend: B) -> Self::Output
    where
        B: Backend + 'static,
        B::Device: 'static,
    {
        let runtime = runtime()?;
        let result = runtime.block_on(async {
            let signals = signals::stop_requests(self.supervised)?;
            worker::run(self.config, backend, signals).await
        });
        // A training thread that hangs is not waited for.
        runtime.shutdown_timeout(TRAINING_THREAD_LIMIT);
        result
    }
}

fn runtime() -> Result<tokio::runtime::Runtime, Problem> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Problem::failed(format!("cannot start the runtime: {error}")))
}
