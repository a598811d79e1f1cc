//! What `LOCKSTEP_FAIL` says, and doing it.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Signal, getpid, kill_process};

use crate::{Injected, Point};

/// How long a thread holds at most: no test forgets one for ever.
const HOLD_LIMIT: Duration = Duration::from_secs(60);

/// What this process does at which points.
static PLAN: OnceLock<Plan> = OnceLock::new();

#[derive(Debug)]
struct Plan {
    name: String,
    events: Option<PathBuf>,
    steps: Vec<Step>,
}

/// One entry.
#[derive(Debug)]
struct Step {
    who: Option<String>,
    point: Point,
    /// Steps done from which on it holds.
    from: u64,
    action: Action,
    /// The entry without `WHO`.
    text: String,
    is_taken: AtomicBool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Signal(Signal),
    Exit,
    Hang,
    Hold,
    Delay(Duration),
    Inject(Injected),
}

/// See the documentation of the crate's other form of this function.
pub fn obey(role: &str, name: &str) -> Result<(), String> {
    let Some(text) = std::env::var_os("LOCKSTEP_FAIL").filter(|text| !text.is_empty()) else { return Ok(()) };
    let steps = parse(&text.to_string_lossy())?;
    let is_meant = |step: &Step| step.who.as_ref().is_none_or(|who| who == role || who == name);
    let plan = Plan {
        name: name.to_owned(),
        events: std::env::var_os("LOCKSTEP_FAIL_EVENTS").map(PathBuf::from),
        steps: steps.into_iter().filter(is_meant).collect(),
    };
    PLAN.set(plan).map_err(|_| "this process obeys LOCKSTEP_FAIL already".to_owned())
}

/// See the documentation of the crate's other form of this function.
pub fn reach(point: Point, step: u64) -> Option<Injected> {
    let plan = PLAN.get()?;
    let due = |entry: &&Step| {
        entry.point == point && step >= entry.from && !entry.is_taken.swap(true, Ordering::AcqRel)
    };
    plan.steps.iter().filter(due).filter_map(|entry| plan.take(entry, step)).last()
}

impl Plan {
    fn take(&self, entry: &Step, step: u64) -> Option<Injected> {
        let event = self.events.as_ref().map(|folder| folder.join(format!("{}.{}", self.name, entry.text)));
        if let Some(event) = &event
            && !write_event(event, step)
        {
            return None;
        }
        match entry.action {
            Action::Signal(signal) => {
                kill_process(getpid(), signal).expect("a process may signal itself");
                None
            }
            Action::Exit => std::process::exit(1),
            Action::Hang => loop {
                std::thread::park();
            },
            Action::Hold => {
                let go = event.map(|event| event.with_added_extension("go"));
                let since = Instant::now();
                while since.elapsed() < HOLD_LIMIT && !go.as_deref().is_some_and(Path::exists) {
                    std::thread::sleep(Duration::from_millis(2));
                }
                None
            }
            Action::Delay(time) => {
                std::thread::sleep(time);
                None
            }
            Action::Inject(injected) => Some(injected),
        }
    }
}

/// False if the action was taken before.
fn write_event(path: &Path, step: u64) -> bool {
    match OpenOptions::new().write(true).create_new(true).open(path) {
        Ok(mut file) => file.write_all(format!("{} {step}\n", std::process::id()).as_bytes()).is_ok(),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => false,
        Err(error) => {
            eprintln!("LOCKSTEP_FAIL_EVENTS: cannot write {}: {error}", path.display());
            std::process::exit(1)
        }
    }
}

fn parse(text: &str) -> Result<Vec<Step>, String> {
    text.split(';').map(str::trim).filter(|entry| !entry.is_empty()).map(parse_entry).collect()
}

fn parse_entry(entry: &str) -> Result<Step, String> {
    let refused = |what: &str| format!("LOCKSTEP_FAIL: '{entry}': {what}, expected [WHO/]POINT@STEP:ACTION");
    let (who, text) = match entry.split_once('/') {
        Some((who, text)) => (Some(who.to_owned()), text),
        None => (None, entry),
    };
    let (point, rest) = text.split_once('@').ok_or_else(|| refused("there is no step"))?;
    let (from, action) = rest.split_once(':').ok_or_else(|| refused("there is no action"))?;
    let point = Point::ALL
        .into_iter()
        .find(|known| known.name() == point)
        .ok_or_else(|| refused(&format!("there is no point '{point}'")))?;
    let from = from.parse().map_err(|_| refused(&format!("'{from}' is no number of steps")))?;
    let action = match action.split_once(':') {
        Some(("delay", time)) => {
            let time = time.parse().map_err(|_| refused(&format!("'{time}' are no milliseconds")))?;
            Action::Delay(Duration::from_millis(time))
        }
        _ => match action {
            "kill" => Action::Signal(Signal::KILL),
            "stop" => Action::Signal(Signal::STOP),
            "term" => Action::Signal(Signal::TERM),
            "exit" => Action::Exit,
            "hang" => Action::Hang,
            "hold" => Action::Hold,
            "error" if matches!(point, Point::Compute | Point::CheckpointWrite) => {
                Action::Inject(Injected::Error)
            }
            "error" => return Err(refused(&format!("{} knows no error", point.name()))),
            "flip" if point == Point::Update => Action::Inject(Injected::Flip),
            "flip" => return Err(refused(&format!("{} has nothing to flip", point.name()))),
            _ => return Err(refused(&format!("there is no action '{action}'"))),
        },
    };
    let is_taken = AtomicBool::new(false);
    Ok(Step { who, point, from, action, text: text.to_owned(), is_taken })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_read_or_refused_with_the_reason() {
        let steps = parse("worker-2/reduce@30:kill; checkpoint-fsync@0:delay:250;").unwrap();
        let read: Vec<_> =
            steps.iter().map(|step| (step.who.as_deref(), step.point, step.from, step.action)).collect();
        let expected = [
            (Some("worker-2"), Point::Reduce, 30, Action::Signal(Signal::KILL)),
            (None, Point::CheckpointFsync, 0, Action::Delay(Duration::from_millis(250))),
        ];
        assert_eq!(read, expected);
        for (text, what) in [
            ("reduce:kill", "there is no step"),
            ("reduce@3", "there is no action"),
            ("redu@3:kill", "there is no point 'redu'"),
            ("reduce@x:kill", "'x' is no number of steps"),
            ("reduce@3:die", "there is no action 'die'"),
            ("reduce@3:delay:x", "'x' are no milliseconds"),
            ("reduce@3:error", "reduce knows no error"),
            ("reduce@3:flip", "reduce has nothing to flip"),
        ] {
            let sentence = parse(text).unwrap_err();
            assert!(sentence.contains(what), "{sentence}");
        }
        for point in Point::ALL {
            assert_eq!(parse(&format!("{}@1:hold", point.name())).unwrap()[0].point, point);
        }
    }

    #[test]
    fn an_action_is_taken_once_from_its_step_on_and_leaves_an_event() {
        let folder = tempfile::tempdir().unwrap();
        let plan = || Plan {
            name: "worker-1".to_owned(),
            events: Some(folder.path().to_owned()),
            steps: parse("update@5:flip").unwrap(),
        };
        let first = plan();
        assert_eq!(first.take(&first.steps[0], 7), Some(Injected::Flip));
        let event = std::fs::read_to_string(folder.path().join("worker-1.update@5:flip")).unwrap();
        assert_eq!(event, format!("{} 7\n", std::process::id()));
        // A process of the same name that comes after it.
        let second = plan();
        assert_eq!(second.take(&second.steps[0], 8), None);
    }
}
