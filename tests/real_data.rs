//! Any fleet gives the same bits on tinyshakespeare and MNIST. Needs both below `LOCKSTEP_DATA_DIR`; with
//! `LOCKSTEP_LONG=1` 200 steps instead of 20. `scripts/acceptance-same-bits` has the whole list.

mod common;

use common::{Folder, skipped};

/// Trains with 1, 2 and 3 workers; the hashes must be the same, and something must have been learnt.
fn assert_same_bits(test: &str, job: &str, loss_at_start: f64) {
    if std::env::var_os("LOCKSTEP_DATA_DIR").is_none() {
        return skipped(test, "LOCKSTEP_DATA_DIR is not set");
    }
    let steps = if std::env::var_os("LOCKSTEP_LONG").is_some_and(|value| value == "1") { 200 } else { 20 };
    let folder = Folder::new();
    let results = [1, 2, 3].map(|workers| {
        let run = folder.run(&format!("{workers}-workers"), job);
        let hashes = run.train(&format!("--steps {steps} --workers {workers}"));
        println!("{workers} workers: {hashes:?}");
        let loss = run.inspect()["val_loss"].as_f64().unwrap();
        assert!(loss < loss_at_start, "validation loss {loss}");
        hashes
    });
    assert_eq!(results[0].step, steps);
    assert_eq!(results[1], results[0], "2 workers");
    assert_eq!(results[2], results[0], "3 workers");
}

#[test]
fn char_lstm_on_tinyshakespeare_gives_the_same_bits() {
    assert_same_bits(
        "real_data::char_lstm_on_tinyshakespeare_gives_the_same_bits",
        "char-lstm --data tinyshakespeare --set keep_prob=0.9",
        65_f64.ln(),
    );
}

#[test]
fn lines_of_tinyshakespeare_give_the_same_bits() {
    assert_same_bits(
        "real_data::lines_of_tinyshakespeare_give_the_same_bits",
        "char-lstm --data tinyshakespeare --set text.mode=lines --set keep_prob=0.9",
        65_f64.ln(),
    );
}

#[test]
fn mnist_gru_gives_the_same_bits() {
    assert_same_bits("real_data::mnist_gru_gives_the_same_bits", "mnist-gru --data mnist", 10_f64.ln());
}
