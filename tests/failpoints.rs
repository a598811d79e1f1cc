//! A process stops exactly where a test wants it to, and says that it was there.

mod common;

use common::{Events, Folder, Process, lockstep};

#[test]
fn a_process_dies_at_its_failpoint_once_and_leaves_an_event() {
    let folder = Folder::new();
    let job = format!("char-lstm --data {} --set hidden_size=16 --set seq_len=10", folder.text(12_000));
    let (run, events) = (folder.run("run", &job), Events::new(&folder, "events"));
    let mut process = events.start(&run, "--steps 300 --workers 2", "worker-2/reduce@30:kill");
    process.line_with("worker worker-2 was lost: ");
    process.end().expect_exit(0);
    let there = events.at("reduce@30:kill");
    assert_eq!(there.len(), 1, "{there:?}");
    assert_eq!((&*there[0].who, there[0].step), ("worker-2", 30));
    assert_eq!(run.hashes(), folder.run("undisturbed", &job).train("--steps 300 --workers 1"));
}

#[test]
fn a_plan_that_cannot_be_read_is_refused() {
    let mut command = lockstep();
    command.args(["worker", "--coordinator", "127.0.0.1:1"]).env("LOCKSTEP_FAIL", "redu@3:kill");
    Process::start(&mut command)
        .end()
        .expect_failure(2, &["error: LOCKSTEP_FAIL: 'redu@3:kill': there is no point 'redu'"]);
}
