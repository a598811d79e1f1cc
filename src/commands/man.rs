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
    let mut main = Cli::command();
    main.build();
    with_subcommands(main).into_iter().map(page).collect()
}

fn with_subcommands(command: Command) -> Vec<Command> {
    let shown = command.get_subcommands().filter(|command| !command.is_hide_set());
    let below: Vec<Command> = shown.cloned().flat_map(with_subcommands).collect();
    std::iter::once(command).chain(below).collect()
}

/// Named as `man lockstep-train` finds it.
fn page(command: Command) -> (String, String) {
    let name = command.get_display_name().unwrap_or_else(|| command.get_name()).to_owned();
    let mut text = Vec::new();
    Man::new(command).render(&mut text).expect("a vector takes all that is written");
    (format!("{name}.1"), String::from_utf8_lossy(&text).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names as they are typed, without the program's, and what each says of itself.
    fn commands(above: &str, command: &Command) -> Vec<(String, String)> {
        let own = command.get_subcommands().flat_map(|command| {
            let name = format!("{above}-{}", command.get_name());
            let about = command.get_about().unwrap().to_string();
            std::iter::once((name.clone(), about)).chain(commands(&name, command)).collect::<Vec<_>>()
        });
        own.collect()
    }

    #[test]
    fn every_command_has_a_page() {
        let pages = pages();
        assert_eq!(pages[0].0, "lockstep.1");
        let commands = commands("lockstep", &Cli::command());
        assert_eq!(pages.len(), 1 + commands.len());
        for (name, about) in commands {
            let (_, text) = pages.iter().find(|page| page.0 == format!("{name}.1")).unwrap();
            let first_word = about.split_whitespace().next().unwrap().replace('-', "\\-");
            assert!(text.contains(&format!(".TH {name} 1")) && text.contains(&first_word), "{text}");
        }
        for command in Cli::command().get_subcommands() {
            let name = format!("lockstep\\-{}(1)", command.get_name());
            assert!(pages[0].1.contains(&name), "the main page lacks {name}");
        }
        assert!(pages[0].1.contains("Exit codes:"), "{}", pages[0].1);
    }

    #[test]
    fn every_page_that_is_referred_to_is_written() {
        let pages = pages();
        for (page, text) in &pages {
            let text = text.replace("\\-", "-").replace("\\fR", "");
            for (before, _) in text.match_indices("(1)").map(|(at, _)| text.split_at(at)) {
                let is_part = |char: char| char.is_ascii_alphanumeric() || char == '-';
                let name = &before[before.trim_end_matches(is_part).len()..];
                assert!(pages.iter().any(|page| page.0 == format!("{name}.1")), "{page} names {name}(1)");
            }
        }
    }
}
