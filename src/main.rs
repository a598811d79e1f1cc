//! The command line: parse, build, call. Everything that computes or coordinates lives in the library crates.
#![forbid(unsafe_code)]

mod args;
mod commands;
mod signals;
mod supervisor;
mod token;

use std::process::ExitCode;

use clap::Parser;
use protocol::problem::{Exit, Problem};

use args::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("LOCKSTEP_LOG").unwrap_or_else(|_| "warn".into()),
        )
        .with_writer(std::io::stderr)
        .init();
    match run(cli.command) {
        Ok(exit) => ExitCode::from(exit as u8),
        Err(problem) => {
            eprintln!("error: {problem}");
            if let Some(hint) = &problem.hint {
                eprintln!("hint: {hint}");
            }
            ExitCode::from(problem.exit as u8)
        }
    }
}

fn run(command: Command) -> Result<Exit, Problem> {
    match command {
        Command::Train(train) => runtime()?.block_on(supervisor::train(train)),
        Command::Coordinator(options) => {
            let (watch_stdin, config) = (options.supervised, options.config()?);
            runtime()?.block_on(async {
                let signals = signals::stop_requests(watch_stdin)?;
                coordinator::run(config, signals).await
            })
        }
        Command::Worker(options) => {
            let (supervised, config, backend) = (options.supervised, options.config()?, options.backend()?);
            let result = runtime()?.block_on(async {
                let signals = signals::stop_requests(false)?;
                worker::run(config, backend, signals).await
            });
            match result {
                // The coordinator beside it has told the user already.
                Err(problem) if supervised => {
                    tracing::info!("{problem}");
                    Ok(problem.exit)
                }
                other => other,
            }
        }
        Command::Inspect(args) => commands::inspect::run(&args),
        Command::Data(args) => commands::data::run(args),
    }
}

fn runtime() -> Result<tokio::runtime::Runtime, Problem> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Problem::failed(format!("cannot start the runtime: {error}")))
}
