//! `lockstep man`: manual pages, made from the same words as `--help`.

use std::path::PathBuf;

use clap::{Args, Command, CommandFactory};
use clap_mangen::Man;
use coordinator::store::files::{create_dir, write_atomic};
use protocol::problem::{Exit, Problem};

use super::print;
use crate::args::Cli;

#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// Write a page for each command into this folder [default: the main page to standard output]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

pub(crate) fn run(args: &ManArgs) -> Result<Exit, Problem> {
    let pages = pages();
    let Some(dir) = &args.out else {
        print(&pages[0].1)?;
        return Ok(Exit::Done);
    };
    create_dir(dir)?;
    for (name, text) in pages {
        write_atomic(&dir.join(name), text.as_bytes())?;
    }
    Ok(Exit::Done)
}

/// File names and texts, the main page first.
fn pages() -> Vec<(String, String)> {
    let mut main = Cli::command().disable_help_subcommand(true);
    main.build();
    let commands = main.get_subcommands().filter(|command| !command.is_hide_set()).cloned();
    std::iter::once(main.clone()).chain(commands).map(page).collect()
}

fn page(command: Command) -> (String, String) {
    // As a file is named, and as `man lockstep-train` finds it.
    let name = command.get_display_name().unwrap_or_else(|| command.get_name()).to_owned();
    let mut text = Vec::new();
    Man::new(command).render(&mut text).expect("a vector takes all that is written");
    (format!("{name}.1"), String::from_utf8_lossy(&text).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page() {
        let pages = pages();
        assert_eq!(pages[0].0, "lockstep.1");
        let commands = Cli::command();
        assert_eq!(pages.len(), 1 + commands.get_subcommands().count());
        for command in commands.get_subcommands() {
            let name = format!("lockstep-{}.1", command.get_name());
            let (_, text) = pages.iter().find(|page| page.0 == name).unwrap_or_else(|| panic!("no {name}"));
            let about = command.get_about().unwrap().to_string();
            let first_word = about.split_whitespace().next().unwrap();
            assert!(text.starts_with(".ie") && text.contains(".TH") && text.contains(first_word), "{text}");
            assert!(pages[0].1.contains(command.get_name()), "the main page lacks {}", command.get_name());
        }
    }
}
