//! Thousands of runs, each with faults of its own.

use std::ops::Range;
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};

use super::network::Node;
use super::oracle::Expected;
use super::replica::Job;
use super::script::{Fault, Script, Timed};
use super::world::{Report, World};
use crate::membership::{Decide, broken, membership};

/// Where files cost no disk.
const MEMORY: &str = "/dev/shm";

/// Parts into which the work is cut: one worker may be one too many.
const SHARDS: u32 = 5;

/// Runs scripts one after another.
struct Simulator {
    folder: tempfile::TempDir,
    job: Rc<Job>,
    expected: Expected,
    runtime: Runtime,
    runs: u64,
}

impl Simulator {
    fn new() -> Self {
        let folder = match Path::new(MEMORY).is_dir() {
            true => tempfile::tempdir_in(MEMORY),
            false => tempfile::tempdir(),
        };
        let folder = folder.unwrap();
        let job = Rc::new(Job::new(folder.path(), SHARDS));
        let expected = Expected::of(&job);
        let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        Self { folder, job, expected, runtime, runs: 0 }
    }

    fn run(&mut self, script: &Script, decide: Decide) -> Report {
        self.play(script, decide, |world| world)
    }

    fn play(&mut self, script: &Script, decide: Decide, with: impl FnOnce(World<'_>) -> World<'_>) -> Report {
        self.runs += 1;
        let dir = self.folder.path().join(format!("run-{}", self.runs));
        let world = World::new(self.job.clone(), &self.expected, &dir, decide, script);
        let report = self.runtime.block_on(with(world).run());
        std::fs::remove_dir_all(&dir).unwrap();
        report
    }

    /// The shortest script found that still fails, and what happens then.
    fn shrink(&mut self, script: Script, decide: Decide) -> (Script, Report) {
        let shrunk = script.shrunk(|shorter| self.run(shorter, decide).violation.is_some());
        let report = self.play(&shrunk, decide, |world| world.with_story());
        (shrunk, report)
    }
}

/// The first script that fails, of those that these numbers stand for, made shorter; and what happens then.
fn first_failure(
    numbers: Range<u64>,
    decide: Decide,
    script: impl Fn(u64) -> Script + Sync,
) -> Option<(Script, Report)> {
    let (next, failed) = (AtomicU64::new(numbers.start), AtomicU64::new(u64::MAX));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut simulator = Simulator::new();
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= numbers.end.min(failed.load(Ordering::Relaxed)) {
                        return;
                    }
                    if simulator.run(&script(number), decide).violation.is_some() {
                        failed.fetch_min(number, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let failed = failed.into_inner();
    (failed < u64::MAX).then(|| Simulator::new().shrink(script(failed), decide))
}

fn assert_no_failure(numbers: Range<u64>, script: impl Fn(u64) -> Script + Sync) {
    let (count, started) = (numbers.end - numbers.start, std::time::Instant::now());
    if let Some((script, Report { violation, story, .. })) = first_failure(numbers, membership, script) {
        panic!("{}\n{script}\n{}", violation.unwrap_or_default(), story.join("\n"));
    }
    println!("{count} runs in {:?}", started.elapsed());
}

/// How many seeds are tried.
fn seeds(default: u64) -> u64 {
    let given = std::env::var("LOCKSTEP_SEEDS").ok();
    given.map_or(default, |seeds| seeds.parse().expect("LOCKSTEP_SEEDS is a number"))
}

#[test]
fn a_run_that_nobody_disturbs_is_the_expected_one() {
    let mut simulator = Simulator::new();
    for workers in 1..=5 {
        let script = Script::calm(u64::from(workers), workers);
        let report = simulator.run(&script, membership);
        assert_eq!((report.violation.as_deref(), report.generation), (None, 1), "{workers} workers");
        assert_eq!(simulator.run(&script, membership), report, "the same again");
    }
}

#[test]
fn shards_that_are_dealt_by_speed_move_and_change_nothing() {
    let mut simulator = Simulator::new();
    let mut generations = 0;
    for seed in 1..=20 {
        let script = Script::calm(seed, 2 + seed as u32 % 3).by_speed();
        let report = simulator.run(&script, membership);
        assert_eq!(report.violation.as_deref(), None, "{script}");
        assert_eq!(simulator.run(&script, membership), report, "the same again");
        generations += report.generation;
    }
    assert!(generations >= 30, "shards were dealt anew {} times in 20 runs", generations - 20);
}

#[test]
fn whatever_happens_the_run_ends_with_the_undisturbed_state() {
    assert_no_failure(0..seeds(2000), Script::draw);
}

/// Two workers, a third that joins, and whoever is there killed before or after any one message.
#[test]
fn a_kill_at_any_point_of_the_protocol_changes_nothing() {
    let join = Timed { at: Duration::from_millis(300), fault: Fault::Join(3) };
    let joined = Script { faults: vec![join], ..Script::calm(1, 2) };
    for script in [joined.clone(), joined.by_speed()] {
        let points = Simulator::new().run(&script, membership).points;
        let every = if seeds(0) > 0 { 1 } else { 3 };
        assert_no_failure(0..points / every, |number| {
            let mut script = script.clone();
            script.faults.push(Timed { at: Duration::ZERO, fault: Fault::KillAt(number * every) });
            script
        });
    }
}

#[test]
fn a_coordinator_that_is_killed_finds_its_workers_as_they_were() {
    let mut simulator = Simulator::new();
    for at in (100..900).step_by(50).map(Duration::from_millis) {
        let kill = Timed { at, fault: Fault::Kill(Node::Coordinator) };
        let report = simulator.run(&Script { faults: vec![kill], ..Script::calm(1, 3) }, membership);
        assert_eq!((report.violation.as_deref(), report.generation), (None, 1), "killed after {at:?}");
    }
}

#[test]
fn a_broken_membership_is_found() {
    for (what, decide) in broken::ALL {
        let (script, report) =
            first_failure(0..2000, decide, Script::draw).unwrap_or_else(|| panic!("not found: {what}"));
        println!("{what}:\n  {}\n{script}", report.violation.unwrap_or_default());
        assert_eq!(Simulator::new().run(&script, membership).violation, None, "{what}");
    }
}
