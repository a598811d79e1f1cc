//! One started process: its output while it runs, how it ended.

use std::fmt::Debug;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// Longer than anything takes on a loaded machine; what takes longer hangs.
const LIMIT: Duration = Duration::from_secs(120);

/// The program under test, without what the tester's environment says about runs.
pub(crate) fn lockstep() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lockstep"));
    for variable in
        ["LOCKSTEP_TOKEN", "LOCKSTEP_TLS", "LOCKSTEP_COORDINATOR", "LOCKSTEP_LOG", "LOCKSTEP_FAIL"]
    {
        command.env_remove(variable);
    }
    command
}

/// Asks until there is an answer; fails after the limit.
pub(crate) fn eventually<T>(what: impl Debug, mut answer: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(answer) = answer() {
            return answer;
        }
        assert!(Instant::now() < deadline, "{what:?} did not come within {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A running process.
pub(crate) struct Process {
    child: Child,
    stdout: Output,
    stderr: Output,
}

/// A process that has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Process {
    pub(crate) fn start(command: &mut Command) -> Self {
        let pipes = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = pipes.spawn().unwrap();
        let stdout = Output::of(child.stdout.take().unwrap());
        let stderr = Output::of(child.stderr.take().unwrap());
        Self { child, stdout, stderr }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has ended by itself.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Sends a signal, unless the process has ended already.
    pub(crate) fn signal(&mut self, signal: Signal) {
        if self.child.try_wait().unwrap().is_none() {
            kill_process(Pid::from_child(&self.child), signal).unwrap();
        }
    }

    /// The output so far, stdout first.
    pub(crate) fn output(&self) -> String {
        format!("{}{}", self.stdout.text(), self.stderr.text())
    }

    /// Waits until a line of the output contains `part`, and gives the line.
    pub(crate) fn line_with(&mut self, part: &str) -> String {
        self.line_with_any(&[part])
    }

    /// Waits until a line of the output contains one of these parts, and gives the line.
    pub(crate) fn line_with_any(&mut self, parts: &[&str]) -> String {
        eventually(parts, || {
            let has_ended = self.child.try_wait().unwrap().is_some();
            let output = if has_ended { self.stdout.rest() + &self.stderr.rest() } else { self.output() };
            let mut lines = output.split_inclusive('\n').filter(|line| line.ends_with('\n'));
            let found = lines.find(|line| parts.iter().any(|part| line.contains(part))).map(str::to_owned);
            assert!(found.is_some() || !has_ended, "ended without any of {parts:?}:\n{output}");
            found
        })
    }

    /// Waits for the end, killing the process after the limit.
    pub(crate) fn end(mut self) -> Ended {
        let deadline = Instant::now() + LIMIT;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "still running after {LIMIT:?}:\n{}", self.output());
            std::thread::sleep(Duration::from_millis(2));
        };
        Ended { status, stdout: self.stdout.rest(), stderr: self.stderr.rest() }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ended {
    /// Exit code; none if a signal ended it.
    pub(crate) fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// The signal that ended it.
    pub(crate) fn signal(&self) -> Option<i32> {
        self.status.signal()
    }

    #[track_caller]
    pub(crate) fn expect_exit(&self, code: i32) {
        assert_eq!(self.code(), Some(code), "{}\n{}{}", self.status, self.stdout, self.stderr);
    }

    /// Checks the exit code and that stderr has each of these parts.
    #[track_caller]
    pub(crate) fn expect_failure(&self, code: i32, parts: &[&str]) {
        self.expect_exit(code);
        for part in parts {
            assert!(self.stderr.contains(part), "stderr lacks '{part}':\n{}", self.stderr);
        }
    }
}

/// What came out of one pipe so far; a thread of its own reads it, so that the process never waits for us.
struct Output {
    text: Arc<Mutex<Vec<u8>>>,
    reader: Option<JoinHandle<()>>,
}

impl Output {
    fn of(mut pipe: impl Read + Send + 'static) -> Self {
        let text = Arc::new(Mutex::new(Vec::new()));
        let shared = text.clone();
        let reader = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = pipe.read(&mut buffer) {
                shared.lock().unwrap().extend_from_slice(&buffer[..count]);
            }
        });
        Self { text, reader: Some(reader) }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.text.lock().unwrap()).into_owned()
    }

    /// Everything, after the process has ended. A child of it that lives on may hold the pipe open: what it writes
    /// is waited for only this long.
    fn rest(&mut self) -> String {
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.reader.as_ref().is_some_and(|reader| !reader.is_finished()) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.text()
    }
}

/// Whether there is a process with this id that has not ended.
pub(crate) fn is_alive(pid: u32) -> bool {
    stat(pid).is_some_and(|(state, _)| state != "Z")
}

/// The processes that this one has started and that have not ended, with their command lines.
pub(crate) fn children_of(pid: u32) -> Vec<(u32, String)> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let children =
        pids.filter(|&child| stat(child).is_some_and(|(state, parent)| state != "Z" && parent == pid));
    children.filter_map(|child| Some((child, command_line(child)?))).collect()
}

fn command_line(pid: u32) -> Option<String> {
    Some(std::fs::read_to_string(format!("/proc/{pid}/cmdline")).ok()?.replace('\0', " "))
}

/// State and parent of a process.
fn stat(pid: u32) -> Option<(String, u32)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before it is in parentheses and may contain anything.
    let mut words = text.rsplit_once(')')?.1.split_whitespace();
    Some((words.next()?.to_owned(), words.next()?.parse().ok()?))
}
