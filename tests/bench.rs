//! `lockstep bench`: what it prints and what it refuses. How fast anything is depends on the machine and is not tested.

mod common;

use common::{Ended, Process, lockstep};
use serde_json::Value;

fn bench(words: &str) -> Ended {
    Process::start(lockstep().arg("bench").args(words.split_whitespace())).end()
}

fn objects(ended: &Ended) -> Vec<Value> {
    ended.stdout.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
}

/// A share of the multiply-adds in registers. How large depends on what else the machine does in each of the two moments.
fn expect_share(object: &Value) -> f64 {
    let share = object["of_fma_rate"].as_f64().unwrap();
    assert!(share > 0.0, "{object}");
    share
}

const TINY: &str = "--set hidden_size=16 --set seq_len=6 --steps 5 --seconds 0";

#[test]
fn the_roofline_has_all_rates_and_ends_as_the_shares_say() {
    if kernels::Simd::detect() == kernels::Simd::PORTABLE {
        println!("skipped: the roofline: without AVX2 it takes minutes");
        return;
    }
    let ended = bench("roofline --json --threads 2");
    let objects = objects(&ended);
    let (rates, memory): (Vec<_>, Vec<_>) = objects.iter().partition(|object| object["kind"] == "rate");
    let threads = |objects: &[&Value]| {
        objects.iter().map(|object| object["threads"].as_u64().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(threads(&memory), [1, 2]);
    assert!(rates.len() >= 2 && threads(&rates[..2]) == [1, 2], "{objects:?}");
    assert!(memory.iter().all(|object| object["read_gb_s"].as_f64() > Some(0.0)), "{objects:?}");
    // What is printed is rounded, what is judged is not.
    const ROUNDED: f64 = 1e-4;
    let is_within = |slack: f64| {
        rates.iter().all(|rate| {
            let least = if rate["precision"] == "f32" { 0.85 } else { 0.0 };
            (least - slack..=1.0 + slack).contains(&expect_share(rate))
        })
    };
    if ended.stderr.is_empty() {
        ended.expect_exit(0);
        assert!(is_within(ROUNDED), "{objects:?}");
    } else {
        ended.expect_failure(1, &["the product of two 1024 x 1024 matrices runs at ", "hint: "]);
        assert!(!is_within(-ROUNDED), "{objects:?}");
    }
}

#[test]
fn steps_of_one_and_of_two_workers_learn_alike() {
    let step = |words: &str| {
        let ended = bench(&format!("step char-gru --json {TINY} {words}"));
        ended.expect_exit(0);
        let object = objects(&ended).remove(0);
        expect_share(&object);
        let order = ["ms_min", "ms_med", "ms_p90", "ms_max"].map(|key| object[key].as_f64().unwrap());
        assert!(order[0] > 0.0 && order.is_sorted(), "{object}");
        assert!(object["reduce_ms_med"].as_f64().unwrap() <= order[1], "{object}");
        assert_eq!((&object["n"], &object["hidden_size"]), (&5.into(), &16.into()), "{object}");
        assert!(object["start_to_first_step_s"].as_f64() > Some(0.0), "{object}");
        object
    };
    let (alone, shared) = (step("--threads 2"), step("--workers 2 --threads 1 --clip shard"));
    assert_eq!((&alone["workers"], &alone["clip"]), (&1.into(), &"global".into()));
    assert_eq!((&shared["workers"], &shared["clip"]), (&2.into(), &"shard".into()));
    // No gradient is long enough to be clipped.
    assert_eq!(alone["loss"], shared["loss"]);
}

#[test]
fn a_step_is_described_for_people() {
    let ended = bench("step mnist-rnn --threads 1 --set hidden_size=16 --steps 3 --seconds 0");
    ended.expect_exit(0);
    for words in [
        "mnist-rnn  1 layer of 16 units, T 28, batch 150, 8 shards, f32\n",
        "1 worker with 1 thread each",
        "ms, median of 3; ",
        " % of the ",
        "\nloss ",
    ] {
        assert!(ended.stdout.contains(words), "{words}: {}", ended.stdout);
    }
}

#[test]
fn kernels_are_measured_at_the_sizes_that_are_asked_for() {
    let ended = bench("kernels mnist-gru --hidden 16 --batch 8 --steps 4 --json");
    ended.expect_exit(0);
    let objects = objects(&ended);
    for kernel in ["gru forward", "gru backward", "weight gradient product", "adam", "tree addition"] {
        assert!(objects.iter().any(|object| object["kernel"] == kernel), "{kernel}: {objects:?}");
    }
    for object in objects {
        let sizes = ["hidden_size", "batch_size", "seq_len"].map(|key| object[key].as_u64().unwrap());
        assert_eq!(sizes, [16, 8, 4]);
        assert!(object["ns_per_unit"].as_f64() > Some(0.0), "{object}");
        match object["unit"].as_str().unwrap() {
            "unit" => assert_eq!(object["units"], 4 * 8 * 16),
            _ => assert!(object["units"].as_u64() > Some(0)),
        }
        if !object["of_fma_rate"].is_null() {
            expect_share(&object);
        }
    }
}

#[test]
fn what_cannot_be_measured_is_refused_before_anything_runs() {
    let cases = [
        ("step --workers 9 --seconds 0", "9 workers cannot share 8 shards"),
        ("step char-lstn", "char-lstn"),
        ("step --seconds -1", "--seconds -1 is no time to measure for"),
        ("step --set hidden_size", "--set hidden_size has no '='"),
        ("step --clip everything", "everything"),
        ("step --simd avx1024", "--simd: unknown simd level `avx1024`"),
        ("kernels char-lstm char-lstn", "char-lstn"),
        ("kernels --batch 2", "batch"),
        ("roofline --simd avx1024", "--simd: unknown simd level `avx1024`"),
    ];
    for (words, sentence) in cases {
        let ended = bench(words);
        ended.expect_failure(2, &[sentence]);
        assert_eq!(ended.stdout, "", "{words}");
    }
    for words in ["step --steps 0", "step --workers 0", "step --seconds soon", "kernels --steps 0"] {
        bench(words).expect_failure(2, &["error: "]);
    }
}
