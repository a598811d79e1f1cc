//! `lockstep completions`: what a shell needs to complete this program's words.

use clap::{Args, CommandFactory};
use clap_complete::Shell;
use protocol::problem::{Exit, Problem};

use super::print;
use crate::args::Cli;

#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// The shell that will read them
    shell: Shell,
}

pub(crate) fn run(args: &CompletionsArgs) -> Result<Exit, Problem> {
    print(&completions(args.shell))?;
    Ok(Exit::Done)
}

fn completions(shell: Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "lockstep", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::ValueEnum;

    #[test]
    fn every_shell_completes_every_command() {
        for shell in Shell::value_variants() {
            let script = completions(*shell);
            for command in Cli::command().get_subcommands() {
                assert!(script.contains(command.get_name()), "{shell} does not know {}", command.get_name());
            }
            assert!(script.contains("run-dir"), "{shell} does not know --run-dir");
        }
    }
}
