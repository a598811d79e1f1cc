//! A process that is started again when it dies, until it dies again and again without the run getting any further.

use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use protocol::problem::{Exit, Problem};
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{ChildStdin, Command};
use tokio::time::Instant;

/// A process that has died is started again after twice this time, and after twice as long each time it dies again soon.
const RESTART_PAUSE: Duration = Duration::from_millis(100);

/// One that has lived for so long, while the run did a step or more, has not died early.
const LIFE: Duration = Duration::from_secs(1);

/// Early deaths of one process, one after another, after which it is not started again.
const EARLY_DEATHS_LIMIT: u32 = 3;

/// The exit code of a panic.
const PANIC: i32 = 101;

/// Which process, and so which of its ends are deaths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Coordinator,
    Worker(usize),
}

impl Role {
    fn name(self) -> String {
        match self {
            Self::Coordinator => "the coordinator".to_owned(),
            Self::Worker(number) => format!("worker {number}"),
        }
    }

    /// Whether the process did not end by a decision of its own. What a coordinator has decided, it has told; a worker
    /// decides nothing but that it is done, or that it would fail again.
    fn is_death(self, status: ExitStatus) -> bool {
        match self {
            Self::Coordinator => status.code().is_none_or(|code| code == PANIC),
            Self::Worker(_) => {
                let decided = [Exit::Done, Exit::Requeue, Exit::Final].map(|exit| exit as i32);
                status.code().is_none_or(|code| !decided.contains(&code))
            }
        }
    }
}

/// What went wrong first since the run last did a step, in any process.
#[derive(Debug, Default)]
pub(super) struct FirstError {
    words: Option<String>,
    steps: u64,
}

impl FirstError {
    fn take_in(&mut self, words: String, steps: u64) {
        if steps > self.steps {
            (self.words, self.steps) = (None, steps);
        }
        self.words.get_or_insert(words);
    }
}

/// One such process.
pub(super) struct Child {
    role: Role,
    process: tokio::process::Child,
    /// Held open to the end: when this process is gone, however it went, the child sees it close.
    _lifeline: Option<ChildStdin>,
    started: Instant,
    /// When it is to be started again, once it has died.
    due: Option<Instant>,
    /// Deaths soon after a start, or without a step of the run between them, one after another.
    early_deaths: u32,
    /// Steps of the run at the last death, as far as was known.
    steps: u64,
}

impl Child {
    pub(super) fn start(role: Role, command: &mut Command) -> Result<Self, Problem> {
        let (process, _lifeline) = spawn(role, command)?;
        let started = Instant::now();
        Ok(Self { role, process, _lifeline, started, due: None, early_deaths: 0, steps: 0 })
    }

    pub(super) fn start_again(&mut self, command: &mut Command) -> Result<(), Problem> {
        (self.process, self._lifeline) = spawn(self.role, command)?;
        (self.started, self.due) = (Instant::now(), None);
        Ok(())
    }

    /// How it has ended, if it has.
    pub(super) fn ended(&mut self) -> Result<Option<ExitStatus>, Problem> {
        let name = self.role.name();
        self.process.try_wait().map_err(|error| Problem::failed(format!("cannot wait for {name}: {error}")))
    }

    /// Whether it has died; gives when it is to be started again, `steps` of the run being done.
    ///
    /// # Errors
    /// It has died too often.
    pub(super) fn death(&mut self, steps: u64, first: &mut FirstError) -> Result<Option<Instant>, Problem> {
        if self.due.is_some() {
            return Ok(self.due);
        }
        let Some(status) = self.ended()?.filter(|status| self.role.is_death(*status)) else {
            return Ok(None);
        };
        if self.started.elapsed() >= LIFE && steps > self.steps {
            self.early_deaths = 0;
        }
        (self.steps, self.early_deaths) = (steps, self.early_deaths + 1);
        first.take_in(format!("{} ended with {status}", self.role.name()), steps);
        if self.early_deaths > EARLY_DEATHS_LIMIT {
            let (name, count) = (self.role.name(), self.early_deaths);
            let cause = first.words.clone().unwrap_or_default();
            return Err(Problem::failed(format!(
                "{name} ended {count} times soon after its start or without a step of the run between; what went wrong first: {cause}"
            ))
            .hint("start the same command again to go on from the newest checkpoint"));
        }
        self.due = Some(Instant::now() + RESTART_PAUSE * (1 << self.early_deaths));
        Ok(self.due)
    }

    pub(super) fn signal(&self, signal: Signal) {
        if let Some(pid) = self.process.id().and_then(|id| Pid::from_raw(id as i32)) {
            let _ = kill_process(pid, signal);
        }
    }

    /// Waits for its end until then, and makes an end of it.
    pub(super) async fn end_by(&mut self, deadline: Instant) {
        if tokio::time::timeout_at(deadline, self.process.wait()).await.is_err() {
            let _ = self.process.kill().await;
        }
    }
}

fn spawn(role: Role, command: &mut Command) -> Result<(tokio::process::Child, Option<ChildStdin>), Problem> {
    let failed = |error| Problem::failed(format!("cannot start {}: {error}", role.name()));
    let mut process = command.stdin(Stdio::piped()).kill_on_drop(true).spawn().map_err(failed)?;
    // Waiting for a child closes what is left in it.
    let lifeline = process.stdin.take();
    Ok((process, lifeline))
}

/// The exit of a coordinator, which has told the user everything itself unless a signal ended it.
pub(super) fn exit_of(status: ExitStatus, asked_to_stop: bool) -> Result<Exit, Problem> {
    match status.code() {
        Some(0) => Ok(Exit::Done),
        Some(2) => Ok(Exit::Usage),
        Some(75) => Ok(Exit::Requeue),
        Some(93) => Ok(Exit::Final),
        Some(_) => Ok(Exit::Failed),
        // It was asked before it listened for signals, so before it began anything.
        None if asked_to_stop && status.signal() == Some(Signal::TERM.as_raw()) => Ok(Exit::Requeue),
        None => Err(Problem::failed(format!("the coordinator was lost ({status})"))
            .hint("start the same command again to go on from the newest checkpoint")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dies() -> Command {
        Command::new("false")
    }

    /// Lets it die and looks at it.
    async fn death(
        child: &mut Child,
        steps: u64,
        first: &mut FirstError,
    ) -> Result<Option<Instant>, Problem> {
        while child.ended().unwrap().is_none() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        child.death(steps, first)
    }

    #[tokio::test]
    async fn who_dies_again_and_again_is_given_up_with_what_went_wrong_first() {
        let mut first = FirstError::default();
        let mut other = Child::start(Role::Worker(1), &mut dies()).unwrap();
        assert!(death(&mut other, 0, &mut first).await.unwrap().is_some());
        let mut child = Child::start(Role::Worker(2), &mut dies()).unwrap();
        for _ in 0..EARLY_DEATHS_LIMIT {
            assert!(death(&mut child, 0, &mut first).await.unwrap().is_some());
            child.start_again(&mut dies()).unwrap();
        }
        let problem = death(&mut child, 0, &mut first).await.unwrap_err();
        assert_eq!(
            problem.sentence,
            "worker 2 ended 4 times soon after its start or without a step of the run between; what went wrong first: worker 1 ended with \
             exit status: 1"
        );
        // After a step that is old news.
        first.take_in("another cause".to_owned(), 7);
        assert_eq!(first.words.as_deref(), Some("another cause"));
    }

    #[tokio::test]
    async fn an_early_death_is_forgiven_after_a_second_of_life_and_a_step() {
        let mut first = FirstError::default();
        for (life, steps, counted) in [(LIFE, 5, 1), (LIFE, 0, 2), (Duration::ZERO, 5, 2)] {
            let mut child = Child::start(Role::Worker(1), &mut dies()).unwrap();
            child.early_deaths = 1;
            child.started -= life;
            death(&mut child, steps, &mut first).await.unwrap();
            assert_eq!(child.early_deaths, counted, "after {life:?} and {steps} steps");
        }
    }

    #[test]
    fn what_is_a_death_depends_on_who_ended() {
        let code = |code: i32| ExitStatus::from_raw(code << 8);
        let killed = ExitStatus::from_raw(Signal::KILL.as_raw());
        let (coordinator, worker) = (Role::Coordinator, Role::Worker(1));
        for (status, of_coordinator, of_worker) in [
            (code(0), false, false),
            (code(1), false, true),
            (code(2), false, true),
            (code(75), false, false),
            (code(93), false, false),
            (code(101), true, true),
            (killed, true, true),
        ] {
            let deaths = (coordinator.is_death(status), worker.is_death(status));
            assert_eq!(deaths, (of_coordinator, of_worker), "{status}");
        }
    }
}
