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
use crate::device::{Chosen, LOCAL_RANK};
use crate::signals;

/// After the coordinator's end, workers have this long to end too.
const WORKERS_LIMIT: Duration = Duration::from_secs(5);

/// The exit code of a worker that was asked to stop.
const REQUEUE: i32 = Exit::Requeue as i32;

/// How often workers are looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// A worker that has died is started again after twice this time, and after twice as long each time it dies again soon.
const RESTART_PAUSE: Duration = Duration::from_millis(100);

/// A worker that has lived for so long, while the run did a step or more, has not died early.
const LIFE: Duration = Duration::from_secs(1);

/// Early deaths of one worker, one after another, after which it is not started again.
const EARLY_DEATHS_LIMIT: u32 = 3;

/// Trains on this machine.
pub(crate) async fn train(args: TrainArgs) -> Result<Exit, Problem> {
    let file = args.job.resolve()?;
    let workers = file.fleet.workers as usize;
    let configured = (file.fleet.threads > 0).then_some(file.fleet.threads as usize);
    let threads = args.threads.or(configured).unwrap_or_else(|| (cores() / workers).max(1));
    let device = args.device.resolve()?;
    args.collective.resolve()?;
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
    if device == Chosen::Cpu {
        command.args(["--local-threads", &threads.to_string()]);
    }
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
    let start_worker = |number: usize| {
        let mut command = child("worker");
        command.args(["--supervised", "--coordinator", &control, "--name", &format!("worker-{number}")]);
        command.args(["--threads", &threads.to_string(), &args.device.to_word()]);
        command.arg(args.collective.to_word()).stdin(Stdio::null());
        command.env(LOCAL_RANK, (number - 1).to_string());
        spawn(&mut command, &format!("worker {number}"))
    };
    let mut fleet: Vec<Local> =
        (1..=workers).map(|number| Ok(Local::new(start_worker(number)?))).collect::<Result<_, Problem>>()?;
    // Why a worker is not started again: what is left of the fleet stops after a step then.
    let mut given_up = None;
    let status = loop {
        tokio::select! {
            status = coordinator.wait() => break status,
            Some(()) = requests.recv() => {
                asked_to_stop = true;
                signal(&coordinator, Signal::TERM);
            }
            at = next_to_start(&mut fleet, &ready), if !asked_to_stop && given_up.is_none() => {
                let started = at.and_then(|at| Ok((at, start_worker(at + 1)?)));
                match started {
                    Ok((at, child)) => fleet[at].restarted(child),
                    Err(problem) => {
                        given_up = Some(problem);
                        signal(&coordinator, Signal::TERM);
                    }
                }
            }
        }
    };
    // Whoever was still looking for the coordinator would go on looking.
    fleet.iter().for_each(|worker| signal(&worker.child, Signal::TERM));
    let deadline = Instant::now() + WORKERS_LIMIT;
    for worker in &mut fleet {
        if tokio::time::timeout_at(deadline, worker.child.wait()).await.is_err() {
            let _ = worker.child.kill().await;
        }
    }
    given_up.map_or_else(|| exit_of(status, asked_to_stop), Err)
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

/// A worker on this machine, which is started again when it dies.
struct Local {
    child: Child,
    started: Instant,
    /// When it is to be started again, once it has died.
    due: Option<Instant>,
    /// Deaths soon after a start, or without a step of the run between them, one after another.
    early_deaths: u32,
    /// How the first of these was.
    first_death: String,
    /// Steps of the run at the last death, as far as was known.
    steps: u64,
}

impl Local {
    fn new(child: Child) -> Self {
        let started = Instant::now();
        Self { child, started, due: None, early_deaths: 0, first_death: String::new(), steps: 0 }
    }

    fn restarted(&mut self, child: Child) {
        (self.child, self.started, self.due) = (child, Instant::now(), None);
    }

    /// Looks whether it lives. Gives when it is to be started again if it does not, or why it is not any more.
    fn look(&mut self, number: usize, ready: &ReadyFile) -> Result<Option<Instant>, Problem> {
        if self.due.is_none()
            && let Ok(Some(status)) = self.child.try_wait()
            && !matches!(status.code(), Some(0 | REQUEUE))
        {
            let steps = ready.steps();
            if self.started.elapsed() >= LIFE && steps > self.steps {
                self.early_deaths = 0;
            }
            self.steps = steps;
            if self.early_deaths == 0 {
                self.first_death = status.to_string();
            }
            self.early_deaths += 1;
            self.due = Some(Instant::now() + RESTART_PAUSE * (1 << self.early_deaths));
        }
        if self.early_deaths > EARLY_DEATHS_LIMIT {
            return Err(Problem::failed(format!(
                "worker {number} ended {} times, each time soon after its start; the first time: {}",
                self.early_deaths, self.first_death
            )));
        }
        Ok(self.due)
    }
}

/// Waits until a worker is to be started again; gives its place. The first that dies again and again is a problem.
async fn next_to_start(fleet: &mut [Local], ready: &ReadyFile) -> Result<usize, Problem> {
    loop {
        for (at, worker) in fleet.iter_mut().enumerate() {
            if worker.look(at + 1, ready)?.is_some_and(|due| Instant::now() >= due) {
                return Ok(at);
            }
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
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

    /// Steps that the run had done when its last generation formed.
    fn steps(&self) -> u64 {
        let text = std::fs::read_to_string(&self.path).unwrap_or_default();
        text.lines().find_map(|line| line.strip_prefix("step=")?.parse().ok()).unwrap_or(0)
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
