//! A worker that is slower than the others is named, and changes nothing.

mod common;

use std::time::Duration;

use common::{Folder, Meddling, train_in_process};
use protocol::problem::Exit;

/// Takes 40 s, because nobody is named before three windows have passed; a short run only has the same bits.
#[test]
fn a_slow_worker_is_named_and_changes_nothing() {
    let is_long = std::env::var_os("LOCKSTEP_LONG").is_some();
    let folder = Folder::new();
    let text = folder.text(12_000);
    let settings = format!("--set steps={} --set checkpoint_seconds=60", if is_long { 800 } else { 20 });
    let job = format!(
        "char-lstm --set data={text} --set hidden_size=16 --set seq_len=10 --set keep_prob=0.8 --set epochs=0"
    );
    let (run, undisturbed) = (folder.run("run", &job), folder.run("undisturbed", &job));
    let slow = Meddling { delay: Duration::from_millis(50), ..Meddling::HONEST };
    let quick = Meddling { delay: Duration::from_millis(10), ..Meddling::HONEST };
    assert_eq!(train_in_process(&run, &settings, vec![quick.clone(), slow, quick]).unwrap(), Exit::Done);
    assert_eq!(train_in_process(&undisturbed, &settings, vec![Meddling::HONEST]).unwrap(), Exit::Done);
    assert_eq!(run.hashes(), undisturbed.hashes());
    let journal = std::fs::read_to_string(run.dir().join("journal")).unwrap();
    let named =
        |name: &str| journal.matches(&format!("worker {name} is slow: for 30 s it has computed")).count();
    let expected = [0, usize::from(is_long), 0];
    assert_eq!(["worker-1", "worker-2", "worker-3"].map(named), expected, "{journal}");
}
