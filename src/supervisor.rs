//! `lockstep train`: a coordinator and some workers as children of this process.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use protocol::handshake::Token;
use protocol::problem::{Exit, Problem};
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};
use tokio::time::Instant;

use crate::args::{TrainArgs, cores};
use crate::signals;

/// After the coordinator's end, workers have this long to end too.
const WORKERS_LIMIT: Duration = Duration::from_secs(5);

/// When a worker has died, the coordinator has this long to notice and to end the run.
const NOTICE_LIMIT: Duration = Duration::from_secs(30);

/// Trains on this machine.
pub(crate) async fn train(args: TrainArgs) -> Result<Exit, Problem> {
    let file = args.job.resolve()?;
    let workers = file.fleet.workers as usize;
    let configured = (file.fleet.threads > 0).then_some(file.fleet.threads as usize);
    let threads = args.threads.or(configured).unwrap_or_else(|| (cores() / workers).max(1));
    let mut requests = signals::stop_requests(false)?;
    let random = || {
        Token::generate()
            .map_err(|error| Problem::failed(format!("the system has no randomness for a token: {error}")))
    };
    let token = random()?;
    let program = std::env::current_exe()
        .map_err(|error| Problem::failed(format!("cannot find this program's own file: {error}")))?;
    let child = |name: &str| {
        let mut command = Command::new(&program);
        // A group of its own: Ctrl-C reaches this process, which passes it on once.
        command.arg(name).env("LOCKSTEP_TOKEN", &token).process_group(0).kill_on_drop(true);
        command
    };

    let ready = ReadyFile::new(&random()?);
    let mut command = child("coordinator");
    command.args(args.job.to_words()).args(args.start.to_words()).arg("--supervised").stdin(Stdio::piped());
    command.args(["--listen", "127.0.0.1:0", "--http"]).arg(args.http.to_string());
    command.args(["--local-threads", &threads.to_string()]);
    let mut coordinator = spawn(command.arg("--ready-file").arg(&ready.path), "the coordinator")?;
    let mut asked_to_stop = false;
    // Held open to the end: when this process is gone, however it went, the coordinator sees it close. (Waiting for
    // a child closes what is left in it.)
    let _lifeline = coordinator.stdin.take();
    let control = loop {
        if let Some(address) = ready.control() {
            break address;
        }
        tokio::select! {
            status = coordinator.wait() => return exit_of(status, asked_to_stop),
            Some(()) = requests.recv() => {
                asked_to_stop = true;
                signal(&coordinator, Signal::TERM);
            }
            () = tokio::time::sleep(Duration::from_millis(10)) => {}
        }
    };
    let mut fleet = Vec::new();
    for number in 1..=workers {
        let mut command = child("worker");
        command.args(["--supervised", "--coordinator", &control, "--name", &format!("worker-{number}")]);
        command.args(["--threads", &threads.to_string()]).stdin(Stdio::null());
        fleet.push(spawn(&mut command, &format!("worker {number}"))?);
    }

    // Usually the coordinator notices a death itself, says more, and ends, if only after it has lingered.
    let notice_limit = NOTICE_LIMIT + Duration::from_secs(args.job.linger);
    let mut death = None;
    let unnoticed = tokio::time::sleep(Duration::MAX);
    tokio::pin!(unnoticed);
    let status = loop {
        tokio::select! {
            status = coordinator.wait() => break status,
            Some(()) = requests.recv() => {
                asked_to_stop = true;
                signal(&coordinator, Signal::TERM);
            }
            died = first_death(&mut fleet), if death.is_none() => {
                death = Some(died);
                unnoticed.as_mut().reset(Instant::now() + notice_limit);
            }
            // Once workers train, the coordinator knows what a death means, and whether it matters.
            () = &mut unnoticed, if !ready.has_generation() => {
                signal(&coordinator, Signal::TERM);
                let _ = coordinator.wait().await;
                let died = death.unwrap_or_default();
                return Err(Problem::failed(format!("worker {died} before the run began")));
            }
        }
    };
    // Whoever was still looking for the coordinator would go on looking.
    fleet.iter().for_each(|worker| signal(worker, Signal::TERM));
    let deadline = Instant::now() + WORKERS_LIMIT;
    for worker in &mut fleet {
        if tokio::time::timeout_at(deadline, worker.wait()).await.is_err() {
            let _ = worker.kill().await;
        }
    }
    exit_of(status, asked_to_stop)
}

fn spawn(command: &mut Command, what: &str) -> Result<Child, Problem> {
    command.spawn().map_err(|error| Problem::failed(format!("cannot start {what}: {error}")))
}

fn signal(child: &Child, signal: Signal) {
    if let Some(pid) = child.id().and_then(|id| Pid::from_raw(id as i32)) {
        let _ = kill_process(pid, signal);
    }
}

/// The exit of the coordinator, which has told the user everything itself unless a signal ended it.
fn exit_of(status: std::io::Result<ExitStatus>, asked_to_stop: bool) -> Result<Exit, Problem> {
    let status =
        status.map_err(|error| Problem::failed(format!("cannot wait for the coordinator: {error}")))?;
    match status.code() {
        Some(0) => Ok(Exit::Done),
        Some(2) => Ok(Exit::Usage),
        Some(75) => Ok(Exit::Requeue),
        Some(_) => Ok(Exit::Failed),
        // It was asked before it listened for signals, so before it began anything.
        None if asked_to_stop && status.signal() == Some(Signal::TERM.as_raw()) => Ok(Exit::Requeue),
        None => Err(Problem::failed(format!("the coordinator was lost ({status})"))
            .hint("start the same command again to go on from the newest checkpoint")),
    }
}

/// Waits until a worker ends with a failure; gives its number and how it ended.
async fn first_death(fleet: &mut [Child]) -> String {
    loop {
        for (worker, number) in fleet.iter_mut().zip(1..) {
            if let Ok(Some(status)) = worker.try_wait()
                && !status.success()
            {
                return format!("{number} ended ({status})");
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// The file in which the coordinator says where it listens; deleted in the end.
struct ReadyFile {
    path: PathBuf,
}

impl ReadyFile {
    /// A path that nobody can guess. `random` is no secret: anybody may list the folder.
    fn new(random: &str) -> Self {
        Self { path: std::env::temp_dir().join(format!("lockstep-{}-{random}.ready", std::process::id())) }
    }

    /// Whether a generation has formed.
    fn has_generation(&self) -> bool {
        std::fs::read_to_string(&self.path).is_ok_and(|text| text.contains("generation="))
    }

    /// The control address, once it is known.
    fn control(&self) -> Option<String> {
        control_address(&self.path)
    }
}

impl Drop for ReadyFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn control_address(path: &Path) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    text.lines().find_map(|line| line.strip_prefix("control=")).map(str::to_owned)
}
