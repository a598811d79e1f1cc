//! Signals × phases × victims: what becomes of a run whose processes are killed, stopped or asked to stop exactly where a
//! failpoint holds one of them. What is expected is the table in `docs/design/failures.md`, which this test reads: the two
//! cannot part.
//!
//! By default a part in which each phase, and each signal with each kind of victim, occurs; `scripts/matrix` runs all cells.

mod common;

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::{Ended, Event, Events, Folder, Hashes, Process, children_of};
use rustix::process::{Pid, Signal, kill_process};

/// Where each phase is held: by which process where workers are hit, by which where the coordinator alone is; and what
/// happens before. In two phases a worker must have been lost and come again.
const PHASES: [(&str, &str, &str, &str); 11] = [
    ("compute", "worker/compute@20", "worker/compute@20", ""),
    ("reduce", "worker/reduce@20", "worker/reduce@20", ""),
    ("optimizer to report", "worker/update@20", "worker/update@20", ""),
    ("state transfer", "worker/state-transfer@18", "worker/state-transfer@18", REJOIN),
    ("slice streaming", "worker/feed@20", "coordinator/feed@20", ""),
    ("evaluation", "worker/evaluation@16", "worker/evaluation@16", ""),
    ("sampling", "worker/sampling@16", "worker/sampling@16", ""),
    ("checkpoint", "worker/checkpoint@16", "coordinator/checkpoint-fsync@16", SLOW),
    ("admission", "worker/admission@18", "coordinator/admission@18", REJOIN),
    ("epoch end", "worker/epoch-end@16", "coordinator/epoch-end@16", ""),
    ("recovery", "worker/recovery@18", "coordinator/recovery@18", "worker-3/compute@18:kill;"),
];

/// A checkpoint is written while the run goes on: it must not be over before the signal.
const SLOW: &str = "coordinator/feed@40:delay:2000;";

/// A worker dies, and the run is slow enough for it to come again.
const REJOIN: &str = "worker-3/compute@18:kill;coordinator/feed@40:delay:3000;";

const SIGNALS: [(&str, Signal); 3] =
    [("SIGKILL", Signal::KILL), ("SIGSTOP", Signal::STOP), ("SIGTERM", Signal::TERM)];
const VICTIMS: [&str; 4] = ["one worker", "two workers", "the coordinator", "all processes"];

/// Cells that run at the same time: they mostly wait.
const AT_ONCE: usize = 4;

/// 16 steps are an epoch; each ends with an evaluation, a text and a checkpoint.
fn job(folder: &Folder) -> String {
    let text = folder.text(12_000);
    format!("char-lstm --data {text} --set hidden_size=16 --set seq_len=10 --set keep_prob=0.8 --steps 60")
}

#[derive(Debug, Clone, Copy)]
struct Cell {
    phase: usize,
    signal: usize,
    victims: usize,
}

impl Cell {
    fn name(self) -> String {
        format!("{} to {} in {}", SIGNALS[self.signal].0, VICTIMS[self.victims], PHASES[self.phase].0)
    }
}

/// What the table in the documents says of a signal to some processes.
fn expected() -> Vec<Vec<String>> {
    let path = format!("{}/docs/design/failures.md", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(path).unwrap();
    let words = |line: &str| line.split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>();
    let rows: Vec<_> = text.lines().map(words).collect();
    let phases = rows.iter().find(|row| row.get(1).is_some_and(|cell| cell == "phases of the matrix"));
    let listed: Vec<_> = phases.expect("the row of phases")[2].split(", ").map(str::to_owned).collect();
    assert_eq!(listed, PHASES.map(|phase| phase.0), "the document's phases are those of the test");
    let of = |signal: &str, victims: &str| {
        let is_it = |row: &&Vec<String>| row.len() > 3 && row[1] == signal && row[2] == victims;
        rows.iter().find(is_it).unwrap_or_else(|| panic!("no row for {signal} to {victims}"))[3].clone()
    };
    SIGNALS.map(|(signal, _)| VICTIMS.map(|victims| of(signal, victims)).to_vec()).to_vec()
}

fn send(pid: u32, signal: Signal) {
    // Whoever has ended meanwhile need not be told.
    let _ = kill_process(Pid::from_raw(pid as i32).unwrap(), signal);
}

/// The processes that are hit.
fn victims(cell: Cell, held: &Event, process: &Process) -> Vec<u32> {
    let children = children_of(process.pid());
    let (workers, coordinator): (Vec<_>, Vec<_>) =
        children.into_iter().partition(|(_, line)| line.contains("--name worker-"));
    let coordinator = coordinator.into_iter().map(|(pid, _)| pid);
    let others = workers.into_iter().map(|(pid, _)| pid).filter(|pid| *pid != held.pid);
    match cell.victims {
        0 => vec![held.pid],
        1 => std::iter::once(held.pid).chain(others.take(1)).collect(),
        2 => coordinator.collect(),
        _ => coordinator.chain(others).chain([held.pid]).collect(),
    }
}

/// Lets everybody go who holds at a point, until the run has ended.
fn end(mut process: Process, events: &Events, point: &str) -> Ended {
    let deadline = Instant::now() + Duration::from_secs(100);
    while !process.has_ended() && Instant::now() < deadline {
        events.at(point).iter().for_each(Event::release);
        std::thread::sleep(Duration::from_millis(5));
    }
    process.end()
}

/// Runs one cell; gives what became of it.
fn run(cell: Cell, folder: &Folder, job: &str, undisturbed: &Hashes) -> String {
    let (_, at_worker, at_coordinator, before) = PHASES[cell.phase];
    let point = if cell.victims == 2 { at_coordinator } else { at_worker };
    let name = format!("{}-{}-{}", cell.phase, cell.signal, cell.victims);
    let run = folder.run(&name, job);
    let events = Events::new(folder, &format!("{name}-events"));
    let mut process = events.start(&run, "--workers 3", &format!("{before}{point}:hold"));
    let point = format!("{}:hold", point.split_once('/').unwrap().1);
    let deadline = Instant::now() + Duration::from_secs(60);
    let held = loop {
        if let Some(held) = events.at(&point).pop() {
            break held;
        }
        if process.has_ended() || Instant::now() > deadline {
            return format!("was not held at {point}:\n{}", process.output());
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let victims = victims(cell, &held, &process);
    let signal = SIGNALS[cell.signal].1;
    victims.iter().for_each(|pid| send(*pid, signal));
    if signal == Signal::STOP {
        held.release();
        if cell.victims < 2 {
            // The others go on without them, and they find that out when they go on.
            process.line_with("nothing came from it for 5 s");
        } else {
            std::thread::sleep(Duration::from_millis(1500));
        }
        victims.iter().for_each(|pid| send(*pid, Signal::CONT));
    }
    let ended = end(process, &events, &point);
    let became = match ended.code() {
        Some(0) => "goes on",
        Some(75) => "stops with 75",
        Some(1) => "fails with 1",
        _ => return format!("ended with {}:\n{}{}", ended.status, ended.stdout, ended.stderr),
    };
    // What did not finish is gone on with; either way each step is on record once, and the state is the undisturbed one.
    let hashes = if became == "goes on" { run.hashes() } else { run.train("--workers 2") };
    if hashes != *undisturbed {
        return format!("{became} with other bits: {hashes:?}\n{}{}", ended.stdout, ended.stderr);
    }
    let steps = run.metric_steps("step");
    if steps != Vec::from_iter(1..=undisturbed.step) {
        return format!("{became} with these steps on record: {steps:?}");
    }
    became.to_owned()
}

#[test]
fn every_cell_of_the_matrix_gives_what_the_table_says() {
    let expected = expected();
    let cube = PHASES.len() * SIGNALS.len() * VICTIMS.len();
    let all = (0..cube).map(|at| Cell {
        phase: at / (SIGNALS.len() * VICTIMS.len()),
        signal: at / VICTIMS.len() % SIGNALS.len(),
        victims: at % VICTIMS.len(),
    });
    let is_long = std::env::var_os("LOCKSTEP_LONG").is_some();
    // Along the diagonals each phase meets two of the twelve pairs, and each pair one phase or more.
    let is_chosen = |cell: &Cell| {
        let pair = cell.signal * VICTIMS.len() + cell.victims;
        is_long || pair == cell.phase || pair == (cell.phase + 7) % 12
    };
    let cells: Vec<Cell> = all.filter(is_chosen).collect();
    let folder = Folder::new();
    // Once: the text must not be written while others read it.
    let job = job(&folder);
    let undisturbed = folder.run("undisturbed", &job).train("--workers 1");

    let (next, wrong) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let started = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(&cell) = cells.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let since = Instant::now();
                    let attempt = std::panic::AssertUnwindSafe(|| run(cell, &folder, &job, &undisturbed));
                    let became = std::panic::catch_unwind(attempt).unwrap_or_else(|_| "panicked".to_owned());
                    let seconds = since.elapsed().as_secs_f64();
                    println!("{:<60} {:<14} {seconds:5.1} s", cell.name(), became.lines().next().unwrap());
                    if became != expected[cell.signal][cell.victims] {
                        wrong.lock().unwrap().push(format!("{}: {became}", cell.name()));
                    }
                }
            });
        }
    });
    let wrong = wrong.into_inner().unwrap();
    println!("{} of {cube} cells in {:?}, {} wrong", cells.len(), started.elapsed(), wrong.len());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
