//! `lockstep train`: a coordinator and some workers as children of this process.

mod child;

use std::path::PathBuf;
use std::time::Duration;

use kernels::Simd;
use protocol::handshake::Token;
use protocol::problem::{Exit, Problem};
use rustix::process::Signal;
use tokio::process::Command;
use tokio::time::Instant;

use crate::args::{TrainArgs, cores};
use crate::commands::note;
use crate::device::{Chosen, LOCAL_RANK};
use crate::signals;
use child::{Child, FirstError, Role, exit_of};

/// After the coordinator's end, workers have this long to end too.
const WORKERS_LIMIT: Duration = Duration::from_secs(5);

/// How often children are looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Trains on this machine.
pub(crate) async fn train(args: TrainArgs) -> Result<Exit, Problem> {
    let file = args.job.resolve()?;
    let workers = file.fleet.workers as usize;
    let configured = (file.fleet.threads > 0).then_some(file.fleet.threads as usize);
    let threads = args.threads.or(configured).unwrap_or_else(|| (cores() / workers).max(1));
    let device = args.device.resolve()?;
    device.check(&file.job)?;
    if let Some(remark) = device.remark(&file.job, Simd::detect()) {
        note(remark);
    }
    // What cannot be used is refused before anything is started.
    args.tls.restrict(args.collective.resolve()?)?;
    args.tls.resolve()?;
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
        command
            .arg(name)
            .args(args.tls.to_words())
            .arg("--supervised")
            .env("LOCKSTEP_TOKEN", &token)
            .process_group(0);
        command
    };
    let ready = ReadyFile::new(&random()?);
    let coordinator = |again: Option<&Addresses>| {
        let mut command = child("coordinator");
        match again {
            None => {
                command.args(args.job.to_words()).args(args.start.to_words());
                command.args(["--listen", "127.0.0.1:0", "--http"]).arg(args.http.to_string());
            }
            // The run has begun: what was to be done at its start is done.
            Some(Addresses { control, http }) => {
                command.args(args.job.to_words_again()).args(["--listen", control, "--http", http]);
            }
        }
        if device == Chosen::Cpu {
            command.args(["--local-threads", &threads.to_string()]);
        }
        command.arg("--ready-file").arg(&ready.path);
        command
    };
    let worker = |number: usize, control: &str| {
        let mut command = child("worker");
        command.args(["--coordinator", control, "--name", &format!("worker-{number}")]);
        command.args(["--threads", &threads.to_string(), &args.device.to_word(), &args.collective.to_word()]);
        command.env(LOCAL_RANK, (number - 1).to_string());
        command
    };

    let mut head = Child::start(Role::Coordinator, &mut coordinator(None))?;
    let (mut fleet, mut addresses) = (Vec::new(), None);
    let (mut asked_to_stop, mut first_error) = (false, FirstError::default());
    // Why a child is not started again: what is left stops after a step then.
    let mut given_up = None;
    let mut steps = 0;
    let end = loop {
        tokio::select! {
            Some(()) = requests.recv() => {
                asked_to_stop = true;
                head.signal(Signal::TERM);
            }
            () = tokio::time::sleep(LOOK_INTERVAL) => {}
        }
        if addresses.is_none()
            && let Some(known) = ready.addresses()
        {
            for number in 1..=workers {
                fleet.push(Child::start(Role::Worker(number), &mut worker(number, &known.control))?);
            }
            addresses = Some(known);
        }
        let may_restart = !asked_to_stop && given_up.is_none();
        // A coordinator that is started again does not know them at once.
        steps = steps.max(ready.steps());
        if let Some(status) = head.ended()? {
            let death = if may_restart { head.death(steps, &mut first_error) } else { Ok(None) };
            match death {
                Ok(Some(due)) if Instant::now() >= due => {
                    note(&format!("the coordinator was lost ({status}) and is started again"));
                    head.start_again(&mut coordinator(addresses.as_ref()))?;
                }
                Ok(Some(_)) => {}
                Ok(None) => break exit_of(status, asked_to_stop),
                Err(problem) => break Err(problem),
            }
        }
        let Some(Addresses { control, .. }) = addresses.as_ref().filter(|_| may_restart) else { continue };
        for (child, number) in fleet.iter_mut().zip(1..) {
            match child.death(steps, &mut first_error) {
                Ok(Some(due)) if Instant::now() >= due => child.start_again(&mut worker(number, control))?,
                Ok(_) => {}
                Err(problem) => {
                    given_up.get_or_insert(problem);
                    head.signal(Signal::TERM);
                }
            }
        }
    };
    // Whoever was still looking for the coordinator would go on looking.
    fleet.iter().for_each(|worker| worker.signal(Signal::TERM));
    let deadline = Instant::now() + WORKERS_LIMIT;
    for worker in &mut fleet {
        worker.end_by(deadline).await;
    }
    given_up.map_or(end, Err)
}

/// Where a coordinator listens.
struct Addresses {
    control: String,
    http: String,
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

    fn value(&self, key: &str) -> Option<String> {
        let text = std::fs::read_to_string(&self.path).ok()?;
        text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('=')).map(str::to_owned)
    }

    /// Steps that the run had done when its last generation formed or was taken back.
    fn steps(&self) -> u64 {
        self.value("step").and_then(|step| step.parse().ok()).unwrap_or(0)
    }

    /// Once they are known.
    fn addresses(&self) -> Option<Addresses> {
        Some(Addresses { control: self.value("control")?, http: self.value("http")? })
    }
}

impl Drop for ReadyFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
