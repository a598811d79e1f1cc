//! The run token is shown to nobody: not in a command line, a log, a page or a file.

mod common;

use common::{Coordinator, Folder, Process, Run, children_of, files_below, get, lockstep};
use rustix::process::Signal;

fn run(folder: &Folder, name: &str) -> Run {
    let job = format!("char-lstm --data {} --set hidden_size=16 --set seq_len=10", folder.text(12_000));
    folder.run(name, &format!("{job} --steps 20 --workers 2 --linger 600"))
}

#[track_caller]
fn assert_absent(token: &str, place: &str, content: &[u8]) {
    assert!(token.len() >= 16, "'{token}' is no token");
    let is_there = content.windows(token.len()).any(|window| window == token.as_bytes());
    assert!(!is_there, "the token is in {place}");
}

fn assert_not_in_pages_or_files(token: &str, http: &str, run: &Run) {
    for page in ["/", "/status.json", "/metrics", "/sd", "/healthz", "/readyz"] {
        assert_absent(token, page, get(http, page).body.as_bytes());
    }
    let files = files_below(run.dir());
    assert!(files.len() >= 6, "{files:?}");
    for file in files {
        assert_absent(token, &file.display().to_string(), &std::fs::read(&file).unwrap());
    }
}

fn command_line(pid: u32) -> Vec<u8> {
    std::fs::read(format!("/proc/{pid}/cmdline")).unwrap()
}

#[test]
fn the_token_of_train_is_in_no_command_line_log_page_or_file() {
    let folder = Folder::new();
    let run = run(&folder, "run");
    let mut command = lockstep();
    command.arg("train").args(run.words()).env("LOCKSTEP_LOG", "trace");
    let mut process = Process::start(&mut command);
    process.line_with("generation 1");
    let children = children_of(process.pid());
    assert!(!children.is_empty());
    let environment = std::fs::read(format!("/proc/{}/environ", children[0].0)).unwrap();
    let token = environment
        .split(|&byte| byte == 0)
        .find_map(|variable| variable.strip_prefix(b"LOCKSTEP_TOKEN="))
        .map(|token| String::from_utf8(token.to_vec()).unwrap())
        .expect("the children of train get a token");
    for (_, line) in &children {
        assert_absent(&token, "the command line of a child", line.as_bytes());
    }
    let line = process.line_with("http://");
    let http = line.split("http://").nth(1).unwrap().split('/').next().unwrap().to_owned();
    process.line_with("done: 20 steps");
    assert_not_in_pages_or_files(&token, &http, &run);
    for entry in std::fs::read_dir(std::env::temp_dir()).unwrap().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        assert!(!name.contains(&token[..8]), "part of the token is in the name {name}");
    }
    process.signal(Signal::TERM);
    let ended = process.end();
    ended.expect_exit(0);
    assert!(ended.stderr.contains("DEBUG") || ended.stderr.contains("TRACE"), "there is no log to search");
    assert_absent(&token, "the output", format!("{}{}", ended.stdout, ended.stderr).as_bytes());
}

#[test]
fn the_token_of_a_file_is_in_no_command_line_log_page_or_file() {
    let folder = Folder::new();
    let run = run(&folder, "run");
    let file = folder.path().join("token");
    let option = format!("--token-file {}", file.display());
    let mut coordinator = Coordinator::start_logging(&run, &option);
    let token = std::fs::read_to_string(&file).unwrap().trim().to_owned();
    let here = folder.empty("worker");
    let workers = [(), ()].map(|()| coordinator.worker(&here, &option));
    for pid in workers.iter().map(Process::pid).chain([coordinator.process.pid()]) {
        assert_absent(&token, "a command line", &command_line(pid));
    }
    coordinator.process.line_with("done: 20 steps");
    assert_not_in_pages_or_files(&token, &coordinator.http, &run);
    coordinator.process.signal(Signal::TERM);
    for process in workers.into_iter().chain([coordinator.process]) {
        let ended = process.end();
        ended.expect_exit(0);
        assert_absent(&token, "the output", format!("{}{}", ended.stdout, ended.stderr).as_bytes());
    }
}
