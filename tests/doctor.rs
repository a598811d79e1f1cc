//! The commands around the program itself.

mod common;

use common::{Folder, Process, lockstep};
use serde_json::Value;

fn end(words: &[&str], folder: &Folder) -> common::Ended {
    let mut command = lockstep();
    command.current_dir(folder.path()).env_remove("LOCKSTEP_DATA_DIR").env("XDG_CACHE_HOME", folder.path());
    Process::start(command.args(words)).end()
}

#[test]
fn the_doctor_looks_at_everything_and_says_whether_training_is_possible() {
    let folder = Folder::new();
    let ended = end(&["doctor", "--json"], &folder);
    ended.expect_exit(0);
    let report: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(report["usable"], true);
    assert!(report["version"].as_str().unwrap().contains("(revision "), "{report}");
    let checks = report["checks"].as_array().unwrap();
    for name in ["version", "cpu", "cores", "memory", "loopback", "port", "runs", "data", "gpu", "gpu driver"]
        .into_iter()
        .chain(["gpu devices", "libcuda", "libnvrtc", "libnccl", "cuda headers"])
    {
        let check = checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("no {name}"));
        assert!(["ok", "note"].contains(&check["finding"].as_str().unwrap()), "{check}");
        assert!(!check["text"].as_str().unwrap().is_empty(), "{check}");
    }
    let lines = end(&["doctor"], &folder);
    lines.expect_exit(0);
    assert!(lines.stdout.lines().count() > checks.len(), "{}", lines.stdout);
    assert!(lines.stdout.ends_with("lockstep can train here\n"), "{}", lines.stdout);
    assert!(!folder.path().join("runs").exists(), "looking changes nothing");
}

#[test]
fn what_makes_training_impossible_is_the_exit_code() {
    let folder = Folder::new();
    std::fs::write(folder.path().join("runs"), "in the way").unwrap();
    let ended = end(&["doctor"], &folder);
    ended.expect_exit(1);
    let line = ended.stdout.lines().find(|line| line.starts_with("problem")).unwrap();
    assert!(line.ends_with("  runs is a file"), "{line}");
}

#[test]
fn manual_pages_are_written_where_they_are_wanted() {
    let folder = Folder::new();
    end(&["man", "--out", "share/man1"], &folder).expect_exit(0);
    let dir = folder.path().join("share/man1");
    for page in ["lockstep.1", "lockstep-train.1", "lockstep-doctor.1"] {
        assert!(std::fs::read_to_string(dir.join(page)).unwrap().contains(".SH SYNOPSIS"), "{page}");
    }
    let main = end(&["man"], &folder);
    main.expect_exit(0);
    assert_eq!(main.stdout, std::fs::read_to_string(dir.join("lockstep.1")).unwrap());
    end(&["man", "--out", "share/man1/lockstep.1"], &folder)
        .expect_failure(1, &["cannot create share/man1/lockstep.1: "]);
}

#[test]
fn an_output_that_cannot_be_written_is_said() {
    let folder = Folder::new();
    let mut command = lockstep();
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let ended = command.args(["completions", "zsh"]).stdout(full).output().unwrap();
    assert_eq!(ended.status.code(), Some(1));
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert!(said.starts_with("error: cannot write to standard output: No space left"), "{said}");
    end(&["completions", "bash"], &folder).expect_exit(0);
}
