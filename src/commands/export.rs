//! `lockstep export`: the parameters of a run for other programs.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use coordinator::store::files::write_beside;
use coordinator::store::run_dir::require_run;
use coordinator::store::torch::{beyond_pytorch, to_torch};
use protocol::problem::{Exit, Problem};

use super::{CheckpointArg, print};

#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    #[command(flatten)]
    checkpoint: CheckpointArg,
    /// For which program
    #[arg(long, value_enum, default_value_t = Program::Torch)]
    to: Program,
    /// The file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Replace the file if it is there
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Program {
    /// A safetensors file with PyTorch's names, see docs/pytorch.md
    Torch,
}

pub(crate) fn run(args: &ExportArgs) -> Result<Exit, Problem> {
    let out = args.out.display();
    let checkpoint = args.checkpoint.load("lockstep export RUN_DIR --out FILE")?.checkpoint;
    let target = target(&args.out, args.force)?;
    let Program::Torch = args.to;
    // No lock says who writes here, so that two exports may write at once.
    write_beside(&target, &to_torch(&checkpoint))?;
    let parameters = checkpoint.image.layout().parameters();
    let step = checkpoint.image.progress().step;
    print(&format!("{out}: {parameters} parameters after {step} steps, under PyTorch's names\n"))?;
    let beyond = beyond_pytorch(&checkpoint.job);
    if !beyond.is_empty() {
        print(&format!("PyTorch's own layers cannot run this network, because of {}\n", beyond.join(", ")))?;
    }
    Ok(Exit::Done)
}

/// The file that `out` stands for: a link stays, and what it leads to is replaced.
fn target(out: &Path, force: bool) -> Result<PathBuf, Problem> {
    let shown = out.display();
    // Of a link that leads nowhere there is no metadata.
    let is_there = out.symlink_metadata().is_ok();
    if out.file_name().is_none() || is_there && !out.metadata().is_ok_and(|metadata| metadata.is_file()) {
        return Err(Problem::usage(format!("{shown} is not a regular file")).hint("name another --out FILE"));
    }
    // A folder that is not there is found out when the file is written.
    let whole = if is_there { out.canonicalize() } else { std::path::absolute(out) };
    let target = whole.unwrap_or_else(|_| out.to_owned());
    if let Some(run_dir) = run_of(&target) {
        return Err(Problem::usage(format!("{shown} is a file of the run {}", run_dir.display()))
            .hint("name another --out FILE, outside of the run directory"));
    }
    if is_there && !force {
        return Err(Problem::usage(format!("{shown} is there already"))
            .hint("name another --out FILE, or give --force"));
    }
    // A path that is no link is shown as it was given, should writing fail.
    Ok(if out.is_symlink() { target } else { out.to_owned() })
}

/// The run directory in which, or in whose folder of checkpoints, a file lies or would lie.
fn run_of(file: &Path) -> Option<PathBuf> {
    let folder = file.parent()?.canonicalize().ok()?;
    let above = folder.parent().filter(|_| folder.ends_with("checkpoints")).map(Path::to_owned);
    [Some(folder), above].into_iter().flatten().find(|folder| require_run(folder).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn only_a_regular_file_outside_of_runs_is_written_to() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        fs::create_dir_all(at("run/checkpoints")).unwrap();
        for name in ["run/job.toml", "run/lock", "run/checkpoints/a.safetensors", "old"] {
            fs::write(at(name), "").unwrap();
        }
        symlink(at("run/checkpoints/a.safetensors"), at("to-a-checkpoint")).unwrap();
        symlink(at("nowhere"), at("broken")).unwrap();
        symlink(at("old"), at("to-old")).unwrap();
        let run = at("run").canonicalize().unwrap();
        let of_the_run = format!("is a file of the run {}", run.display());
        let cases = [
            (PathBuf::from("/dev/null"), "is not a regular file"),
            (PathBuf::from("/"), "is not a regular file"),
            (at("run/.."), "is not a regular file"),
            (at("run"), "is not a regular file"),
            (at("broken"), "is not a regular file"),
            (at("run/lock"), &of_the_run),
            (at("run/new"), &of_the_run),
            (at("run/checkpoints/a.safetensors"), &of_the_run),
            (at("run/checkpoints/new"), &of_the_run),
            (at("to-a-checkpoint"), &of_the_run),
        ];
        for (out, part) in cases {
            let problem = target(&out, true).unwrap_err();
            assert_eq!(problem.sentence, format!("{} {part}", out.display()));
            assert!(problem.exit == Exit::Usage && problem.hint.is_some());
        }
        for (out, expected) in [("old", "old"), ("new", "new"), ("no/folder", "no/folder")] {
            assert_eq!(target(&at(out), true).unwrap(), at(expected));
        }
        assert_eq!(target(&at("to-old"), true).unwrap(), at("old").canonicalize().unwrap());
        for out in ["old", "to-old"] {
            assert!(target(&at(out), false).unwrap_err().sentence.ends_with(" is there already"));
        }
        assert_eq!(target(&at("new"), false).unwrap(), at("new"));
    }
}
