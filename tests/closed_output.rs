//! Nobody reads what a command says, or the disk is full: it ends as it says, and never in a panic.

mod common;

use std::fs::OpenOptions;
use std::process::Stdio;

use common::{Folder, lockstep};

/// The writing end of a pipe whose reader is gone.
fn closed_pipe() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

#[test]
fn a_closed_pipe_or_a_full_disk_is_no_panic() {
    let folder = Folder::new();
    let run =
        folder.run("a", &format!("char-gru --data {} --set hidden_size=8 --steps 3", folder.text(60_000)));
    run.train("--workers 1");
    let run_dir = run.dir().to_str().unwrap();
    let weights = folder.path().join("w.safetensors").to_str().unwrap().to_owned();
    let imported = format!("{} --run-dir {}", folder.text(60_000), folder.path().join("b").display());
    let commands = [
        ("data list".to_owned(), 0),
        ("data verify embedded".to_owned(), 0),
        (format!("export {run_dir} --out {weights} --force"), 0),
        (format!("import {weights} char-gru --set hidden_size=8 --fresh --data {imported}"), 0),
        (format!("eval {run_dir}"), 0),
        (format!("diff {run_dir} {run_dir}"), 0),
        ("data verify nothing".to_owned(), 2),
    ];
    for (words, exit) in &commands {
        let end = |stdout: Stdio, stderr: Stdio| {
            let mut command = lockstep();
            command.args(words.split(' ')).stdin(Stdio::null()).stdout(stdout).stderr(stderr);
            command.status().unwrap().code()
        };
        assert_eq!(end(closed_pipe(), closed_pipe()), Some(*exit), "{words}");
        if let Ok(full) = OpenOptions::new().write(true).open("/dev/full") {
            let expected = if *exit == 0 && !words.starts_with("diff") { 1 } else { 2 };
            assert_eq!(end(full.into(), closed_pipe()), Some(expected), "{words}, to a full disk");
        }
    }
}
