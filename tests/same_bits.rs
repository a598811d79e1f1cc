//! The fleet that computes a run never changes a bit of its result.

mod common;

use common::{Coordinator, Folder, Hashes, Meddling, Run, train_in_process};
use protocol::problem::Exit;

/// Workers and threads of each; the first is what the others are compared with.
const FLEETS: [(u32, u32); 7] = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (4, 1), (8, 1)];

/// All combinations.
const MANY_FLEETS: [(u32, u32); 10] =
    [(1, 1), (2, 1), (3, 1), (4, 1), (8, 1), (1, 2), (2, 2), (3, 2), (4, 2), (8, 2)];

/// Small enough that a run takes no time, with sizes that no vector width divides.
const SMALL_TEXT: &str = "--set hidden_size=18 --set seq_len=9 --set validation_fraction=0.3 --steps 12";
const SMALL_IMAGES: &str = "--set hidden_size=18 --set train_samples=1500 --steps 12";

/// Trains the job with each of these fleets; hashes and checkpoint files must be the same.
fn assert_same_bits(folder: &Folder, job: &str, fleets: &[(u32, u32)]) {
    println!("{job}");
    let mut expected: Option<(Hashes, Vec<u8>)> = None;
    for &(workers, threads) in fleets {
        let run = folder.run("run", job);
        let hashes = run.train(&format!("--fresh --workers {workers} --threads {threads}"));
        println!("  {workers} workers x {threads} threads: {hashes:?}");
        let checkpoint = run.checkpoint();
        let expected = expected.get_or_insert_with(|| (hashes.clone(), checkpoint.clone()));
        assert_eq!(hashes, expected.0, "{workers} workers x {threads} threads: {job}");
        assert!(checkpoint == expected.1, "the checkpoint file of {workers} x {threads} differs: {job}");
    }
}

#[test]
fn any_number_of_workers_and_threads_gives_the_same_bits() {
    let folder = Folder::new();
    let text = folder.text(12_000);
    let job = format!("char-lstm --data {text} --set keep_prob=0.8 {SMALL_TEXT}");
    assert_same_bits(&folder, &job, &MANY_FLEETS);
}

#[test]
fn every_cell_and_batch_cut_of_a_text_gives_the_same_bits() {
    let folder = Folder::new();
    let text = folder.text(12_000);
    let cases = [
        ("char-lstm", "batch_size=64 --shards 7 --set keep_prob=0.8"),
        ("char-lstm", "batch_size=150 --shards 8 --set keep_prob=0.8"),
        ("char-gru", "batch_size=150 --shards 7 --set keep_prob=0.8 --set num_layers=1"),
        ("char-gru", "batch_size=50 --shards 8"),
        ("char-lstm", "batch_size=50 --shards 7 --set cell=rnn --set num_layers=3 --set keep_prob=0.8"),
    ];
    for (preset, settings) in cases {
        let job = format!("{preset} --data {text} {SMALL_TEXT} --set {settings}");
        assert_same_bits(&folder, &job, &FLEETS);
    }
}

#[test]
fn every_cell_and_batch_cut_of_images_gives_the_same_bits() {
    let folder = Folder::new();
    let cases = [
        ("mnist-gru", "batch_size=150 --shards 8"),
        ("mnist-gru", "batch_size=64 --shards 7 --set num_layers=2 --set keep_prob=0.8"),
        ("mnist-lstm", "batch_size=50 --shards 8 --set keep_prob=0.8 --set num_layers=2"),
        ("mnist-rnn", "batch_size=150 --shards 7"),
    ];
    for (preset, settings) in cases {
        assert_same_bits(&folder, &format!("{preset} {SMALL_IMAGES} --set {settings}"), &FLEETS);
    }
}

#[test]
fn lines_and_labelled_lines_give_the_same_bits() {
    let folder = Folder::new();
    let text = folder.text(12_000);
    let lines = format!("char-lstm --data {text} {SMALL_TEXT} --set mode=lines --set keep_prob=0.8");
    let fields = "classify-text --steps 12 --set hidden_size=9 --set num_layers=2 --set keep_prob=0.8";
    let jobs = [
        format!("{lines} --set batch_size=33 --shards 8"),
        format!(
            "{lines} --set batch_size=20 --shards 7 --set pad=pre --set max_len=24 --set embedding_size=5"
        ),
        format!("{fields} --set batch_size=50 --shards 8"),
        format!("{fields} --set batch_size=33 --shards 8 --set pad=pre --set max_len=12 --set cell=gru"),
    ];
    for job in jobs {
        assert_same_bits(&folder, &job, &[(1, 1), (1, 2), (3, 1), (8, 1)]);
    }
}

#[test]
fn a_text_with_wrapped_targets_that_starts_anew_at_lines_gives_the_same_bits() {
    let folder = Folder::new();
    let text = folder.text(12_000);
    let newline = r#"reset_at="\n""#;
    let job = format!("char-gru --data {text} {SMALL_TEXT} --set targets=wrap");
    assert_same_bits(&folder, &format!("{job} --set {newline}"), &[(1, 1), (3, 1), (8, 1)]);
    let with_resets = folder.run("run", &job).hashes();
    let without = folder.run("other", &job).train("--workers 1");
    assert_ne!(without.parameter, with_resets.parameter, "the resets did nothing");
}

/// Its numbers go through copies on the host, or, for a worker alone, from buffer to buffer.
#[test]
fn a_device_whose_memory_is_not_the_hosts_gives_the_same_bits() {
    let folder = Folder::new();
    let text = folder.text(12_000);
    for clip in ["global", "shard"] {
        let settings =
            "--set batch_size=33 --set shards=7 --set hidden_size=18 --set seq_len=9 --set epochs=0";
        let job = format!("char-lstm --set data={text} {settings} --set clip={clip} --set clip_norm=0.02");
        let expected = folder.run(&format!("cpu-{clip}"), &job).train("--steps 8 --workers 2");
        for workers in 1..=5 {
            let run = folder.run(&format!("{clip}-{workers}"), &job);
            let fleet = vec![Meddling::HONEST; workers];
            assert_eq!(train_in_process(&run, "--set steps=8", fleet), Ok(Exit::Done));
            assert_eq!(run.hashes(), expected, "{workers} workers, clip {clip}");
        }
    }
}

#[test]
fn every_way_to_clip_gives_the_same_bits() {
    let folder = Folder::new();
    let text = folder.text(12_000);
    let mut results = Vec::new();
    for clip in ["global", "shard", "none"] {
        // A norm that every step exceeds, so that clipping is not a way of doing nothing.
        let job = format!("char-lstm --data {text} {SMALL_TEXT} --set clip={clip} --set clip_norm=0.02");
        assert_same_bits(&folder, &job, &[(1, 1), (3, 1), (8, 2)]);
        results.push(folder.run("run", &job).hashes().parameter);
    }
    results.sort();
    results.dedup();
    assert_eq!(results.len(), 3, "two ways to clip gave the same parameters");
}

#[test]
fn products_of_bf16_give_the_same_bits() {
    let folder = Folder::new();
    let text = folder.text(12_000);
    let job = format!("char-gru --data {text} {SMALL_TEXT} --set keep_prob=0.8 --set batch_size=50");
    let exact = folder.run("f32", &job).train("--workers 1");
    let job = format!("{job} --set precision=bf16");
    assert_same_bits(&folder, &job, &FLEETS);
    assert_ne!(folder.run("run", &job).hashes(), exact, "the precision did nothing");
}

/// Two workers, one of which computes with other instructions than the best it has.
fn assert_instructions_do_not_matter(folder: &Folder, name: &str, job: &str) {
    let expected = folder.run(&format!("{name}-alone"), job).train("--workers 1");
    for simd in ["avx2", "portable"] {
        let name = format!("{name}-{simd}");
        let run: Run = folder.run(&name, job);
        let coordinator = Coordinator::start(&run, "--workers 2", None);
        let here = folder.empty(&format!("{name}-workers"));
        let workers = [coordinator.worker(&here, ""), coordinator.worker(&here, &format!("--simd {simd}"))];
        for process in workers.into_iter().chain([coordinator.process]) {
            process.end().expect_exit(0);
        }
        assert_eq!(run.hashes(), expected, "one of two workers with {simd}: {job}");
    }
}

#[test]
fn the_vector_instructions_of_a_worker_do_not_matter() {
    let folder = Folder::new();
    let job = format!("char-lstm --data {} --set keep_prob=0.8 {SMALL_TEXT}", folder.text(12_000));
    assert_instructions_do_not_matter(&folder, "f32", &job);
    assert_instructions_do_not_matter(&folder, "bf16", &format!("{job} --set precision=bf16"));
}

#[test]
fn workers_beyond_the_shards_stand_by() {
    let folder = Folder::new();
    let text = folder.text(12_000);
    let job = format!("char-lstm --data {text} --shards 7 {SMALL_TEXT}");
    let expected = folder.run("two", &job).train("--workers 2");
    let run = folder.run("eight", &job);
    let ended = run.end("--workers 8");
    ended.expect_exit(0);
    let warning = "1 of 8 workers stand by: there are only 7 shards (hint: --shards 8)";
    assert_eq!(ended.stdout.matches(warning).count(), 1, "{}", ended.stdout);
    assert_eq!(run.hashes(), expected);
}

#[test]
fn another_seed_gives_other_bits() {
    let folder = Folder::new();
    let job = format!("char-lstm --data {} {SMALL_TEXT}", folder.text(12_000));
    let [one, two] = [1, 2]
        .map(|seed| folder.run(&format!("seed-{seed}"), &job).train(&format!("--seed {seed} --workers 1")));
    assert_ne!(one.parameter, two.parameter);
}
