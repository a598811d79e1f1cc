//! Checkpoints while a run trains: when they come, how many stay, and that training waits for no disk, whatever the disk
//! does meanwhile.

mod common;

use std::path::Path;
use std::process::Command;

use common::{Folder, Process, Run, eventually, get, skipped, with_own_mounts};
use rustix::process::Signal;
use serde_json::Value;

/// Steps of the checkpoints that are on record, in the order in which they were written.
fn written(run: &Run) -> Vec<u64> {
    let journal = std::fs::read_to_string(run.dir().join("journal")).unwrap();
    let records = journal.lines().map(|line| serde_json::from_str::<Value>(&line[9..]).unwrap());
    records.filter(|line| line["kind"] == "checkpoint").map(|line| line["step"].as_u64().unwrap()).collect()
}

/// The files of checkpoints that are there.
fn kept(run: &Run) -> Vec<String> {
    let files = common::files_below(&run.dir().join("checkpoints"));
    let names = files.iter().map(|path| path.file_name().unwrap().to_string_lossy().into_owned());
    names.filter(|name| name.ends_with(".safetensors")).collect()
}

#[test]
fn checkpoints_come_after_the_steps_that_were_asked_for_and_as_many_stay_as_were() {
    let folder = Folder::new();
    let job = format!("char-lstm --data {} --set hidden_size=16 --set seq_len=10", folder.text(80_000));
    let run = folder.run("run", &job);
    let intervals = "--set checkpoint_steps=25 --set digest_steps=10 --set keep_checkpoints=2";
    run.train(&format!("--steps 100 --workers 2 {intervals}"));
    // A step of 25 has no digests to compare, one of 30 has. While one is written, others may be passed.
    let (last, before) = written(&run).split_last().map(|(last, before)| (*last, before.to_vec())).unwrap();
    assert_eq!((last, before.first()), (100, Some(&30)), "{before:?}");
    assert!(before.iter().all(|step| [30, 50, 80].contains(step)), "{before:?}");
    assert_eq!(kept(&run).len(), 2, "{:?}", kept(&run));
    assert!(kept(&run).contains(&"step-00000100.safetensors".to_owned()));
    run.end("--steps 100 --set keep_checkpoints=0")
        .expect_failure(2, &["keep_checkpoints is 0, it must be at least 1"]);
}

#[test]
fn the_checkpoint_of_the_best_epoch_stays_and_can_be_used() {
    let folder = Folder::new();
    // So large a rate makes the network worse again after a while.
    let job = format!(
        "char-lstm --data {} --set hidden_size=16 --set seq_len=10 --set learning_rate=0.3 --set clip=none \
         --set divergence_factor=0 --set keep_checkpoints=1",
        folder.text(12_000)
    );
    let run = folder.run("run", &job);
    run.train("--epochs 8 --workers 1");
    let text = std::fs::read_to_string(run.dir().join("metrics.jsonl")).unwrap();
    let epochs = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let losses = epochs.filter(|line| line["kind"] == "epoch").map(|line| line["val_loss"].as_f64().unwrap());
    let best = losses.enumerate().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap().0 as u64 + 1;
    let file = format!("step-{:08}.safetensors", 16 * best);
    // An epoch's state may be passed while another is written; that of the best is kept if it was written.
    if written(&run).contains(&(16 * best)) {
        assert!(kept(&run).contains(&file), "{:?} lacks {file}", kept(&run));
        let link = std::fs::read_link(run.dir().join("best")).unwrap();
        assert_eq!(link, Path::new("checkpoints").join(file));
        let mut eval = common::lockstep();
        Process::start(eval.arg("eval").arg(run.dir().join("best"))).end().expect_exit(0);
    }
    assert!(kept(&run).len() <= 2, "{:?}", kept(&run));
}

#[test]
fn training_does_not_wait_for_a_disk_that_hangs() {
    let folder = Folder::new();
    let job = format!("char-lstm --data {} --set hidden_size=32 --set seq_len=10", folder.text(1_500_000));
    let run = folder.run("run", &format!("{job} --set checkpoint_steps=1000 --set checkpoint_seconds=86400"));
    let mut process = run.start("--epochs 1000 --workers 1");
    process.line_with("generation 1");
    // Whoever opens a pipe to write waits until somebody reads.
    std::fs::create_dir_all(run.dir().join("checkpoints")).unwrap();
    let pipe = run.dir().join("checkpoints/.step-00001000.safetensors.tmp");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    eventually("steps beyond the checkpoint", || (run.steps_so_far() >= 1300).then_some(()));
    assert!(!run.dir().join("latest").exists(), "the checkpoint was written");
    // A pipe cannot be synced: this checkpoint fails, and those after it do not.
    std::io::copy(&mut std::fs::File::open(&pipe).unwrap(), &mut std::io::sink()).unwrap();
    process.line_with("the checkpoint was not written: cannot write ");
    eventually("another checkpoint", || run.dir().join("latest").exists().then_some(()));
    process.signal(Signal::TERM);
    process.end().expect_exit(75);
    assert_eq!(run.metric_steps("step"), Vec::from_iter(1..=run.hashes().step));
}

/// A training run on a small disk of its own, and what happens to the disk.
struct SmallDisk {
    folder: Folder,
    job: String,
    process: Process,
    http: String,
}

impl SmallDisk {
    /// `change` is done to the disk when [`change`](Self::change) says so, `undo` after [`undo`](Self::undo).
    fn start(test: &str, hidden_size: u32, change: &str, undo: &str) -> Option<Self> {
        let folder = Folder::new();
        let (disk, copy) = (folder.empty("disk"), folder.path().join("copy"));
        let job = format!(
            "char-lstm --data {} --set hidden_size={hidden_size} --set seq_len=10 --set keep_prob=0.8",
            folder.text(12_000)
        );
        let at = |name: &str| folder.path().join(name).display().to_string();
        let script = format!(
            "mount -t tmpfs -o size=2200k none $DIR || exit 99
             until_there() {{ until [ -e $1 ]; do sleep 0.05; done; }}
             $LOCKSTEP train {job} --epochs 1000000 --workers 2 --run-dir $DIR/run &
             until_there {}; {change}
             until_there {}; {undo}
             until_there {}; kill -TERM $!; wait $!; echo code $?
             cp -r $DIR/run {}",
            at("change"),
            at("undo"),
            at("stop"),
            copy.display()
        );
        let Some(mut process) = with_own_mounts(&script, &disk) else {
            skipped(test, "this machine lets nobody mount");
            return None;
        };
        let line = process.line_with("http://");
        let http = line.split("http://").nth(1).unwrap().split('/').next().unwrap().to_owned();
        Some(Self { folder, job, process, http })
    }

    fn say(&self, what: &str) {
        std::fs::write(self.folder.path().join(what), "").unwrap();
    }

    /// The value of a series of `/metrics`.
    fn metric(&self, series: &str) -> f64 {
        let text = get(&self.http, "/metrics").body;
        let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        value.unwrap_or_else(|| panic!("no {series} in\n{text}")).parse().unwrap()
    }

    fn wait_until(&self, series: &str, is_enough: impl Fn(f64) -> bool) {
        eventually(series, || is_enough(self.metric(series)).then_some(()));
    }

    /// Waits for some more steps.
    fn wait_for_steps(&self) {
        let step = self.metric("lockstep_step");
        self.wait_until("lockstep_step", |now| now >= step + 20.0);
    }

    /// Stops the run, and checks that it goes on to what an undisturbed one ends with.
    fn end(self) {
        let before = self.metric("lockstep_checkpoints_total{outcome=\"written\"}");
        self.wait_until("lockstep_checkpoints_total{outcome=\"written\"}", |now| now > before);
        assert!(self.metric("lockstep_checkpoint_timestamp_seconds") > 1.7e9);
        self.say("stop");
        let ended = self.process.end();
        assert!(ended.stdout.contains("code 75\n"), "{}{}", ended.stdout, ended.stderr);
        let run = Run::new(self.folder.path().join("copy"), &self.job);
        let steps = format!("--steps {} --workers 1", run.hashes().step + 20);
        let resumed = run.train(&steps);
        assert_eq!(resumed, self.folder.run("undisturbed", &self.job).train(&steps));
        assert_eq!(run.metric_steps("step"), Vec::from_iter(1..=resumed.step));
        let mut inspect = common::lockstep();
        Process::start(inspect.args(["inspect", "--audit"]).arg(run.dir())).end().expect_exit(0);
    }
}

#[test]
fn a_disk_that_is_full_stops_neither_training_nor_its_records() {
    // One checkpoint of this job has about 700 kB: three fit and no fourth beside them.
    let test = "checkpoints::a_disk_that_is_full";
    let Some(mut disk) = SmallDisk::start(test, 64, "true", "mount -o remount,size=40m $DIR || exit 97")
    else {
        return;
    };
    disk.say("change");
    disk.process.line_with("the checkpoint was not written: cannot write ");
    disk.process
        .line_with("No space left on device (os error 28); the run goes on, and its records wait in memory");
    disk.wait_for_steps();
    assert_eq!(disk.metric("lockstep_records_waiting"), 1.0);
    assert!(disk.metric("lockstep_checkpoints_total{outcome=\"failed\"}") > 0.0);
    disk.say("undo");
    disk.process.line_with("the records that waited in memory are written");
    assert_eq!(disk.metric("lockstep_records_waiting"), 0.0);
    disk.end();
}

#[test]
fn a_folder_that_becomes_read_only_does_not_stop_training() {
    let change = "mount --bind $DIR/run/checkpoints $DIR/run/checkpoints && \
                  mount -o remount,bind,ro $DIR/run/checkpoints || exit 97";
    let test = "checkpoints::a_folder_that_becomes_read_only";
    let Some(mut disk) = SmallDisk::start(test, 16, change, "umount $DIR/run/checkpoints || exit 96") else {
        return;
    };
    disk.wait_until("lockstep_checkpoints_total{outcome=\"written\"}", |written| written > 0.0);
    disk.say("change");
    let line = disk.process.line_with("the checkpoint was not written: ");
    assert!(line.contains("Read-only file system"), "{line}");
    disk.wait_for_steps();
    assert_eq!(disk.metric("lockstep_records_waiting"), 0.0);
    disk.say("undo");
    disk.end();
}
