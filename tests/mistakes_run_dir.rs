//! A run directory that is used, damaged, full or read-only is said, and nothing that was right in it is lost.

mod common;

use std::path::{Path, PathBuf};

use common::{Folder, Run, children_of, eventually, files_below, skipped, with_own_mounts};
use rustix::process::Signal;

/// 16 steps are an epoch.
fn job(folder: &Folder) -> String {
    format!(
        "char-lstm --data {} --set hidden_size=16 --set seq_len=10 --set keep_prob=0.8",
        folder.text(12_000)
    )
}

/// The checkpoints of a run, oldest first.
fn checkpoints(run: &Run) -> Vec<PathBuf> {
    let files = files_below(&run.dir().join("checkpoints"));
    files.into_iter().filter(|path| path.extension().is_some_and(|end| end == "safetensors")).collect()
}

fn damage(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(path, bytes).unwrap();
}

/// Every file of a run with its bytes, but the lock, which says who tried last.
fn contents(run: &Run) -> Vec<(PathBuf, Vec<u8>)> {
    let files = files_below(run.dir()).into_iter().filter(|path| !path.ends_with("lock"));
    files.map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
}

fn assert_nothing_temporary(folder: &Path) {
    let left: Vec<_> =
        files_below(folder).into_iter().filter(|p| p.to_string_lossy().ends_with(".tmp")).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_run_directory_in_use_is_refused_and_its_run_goes_on() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    let mut process = run.start("--epochs 1000000 --workers 1");
    process.line_with("generation 1");
    let children = children_of(process.pid());
    let holder = children.iter().find(|(_, line)| line.contains("coordinator")).unwrap().0;
    for options in ["--workers 1", "--workers 1 --fresh"] {
        run.end(options).expect_refusal(
            2,
            &format!("{} is in use by process {holder}", run.dir().display()),
            "wait until it ends, or give another --run-dir",
        );
    }
    let steps = run.steps_so_far();
    eventually("more steps", || (run.steps_so_far() > steps).then_some(()));
    process.signal(Signal::INT);
    process.end().expect_exit(75);
    let steps = format!("--steps {}", run.hashes().step + 20);
    assert_eq!(run.train(&steps), folder.run("undisturbed", &job(&folder)).train(&steps));
}

#[test]
fn a_run_directory_of_another_job_is_refused_and_unchanged() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    run.train("--steps 20");
    let before = contents(&run);
    run.end("--steps 20 --seed 2 --set keep_prob=0.5").expect_refusal(
        2,
        "is of another job: keep_prob: 0.8 there, 0.5 here, seed: 1 there, 2 here",
        "give another --run-dir, or --fresh to delete this run and start over",
    );
    let other = job(&folder).replace("text-12000", "text-12500");
    folder.text(12_500);
    let other = Run::new(run.dir().to_owned(), &other);
    other.end("--steps 20").expect_refusal(
        2,
        "is of another job: digest of the data: ",
        "give another --run-dir",
    );
    let foreign = folder.empty("foreign");
    std::fs::write(foreign.join("thesis.tex"), "mine").unwrap();
    let foreign = Run::new(foreign, &job(&folder));
    foreign.end("--fresh").expect_refusal(
        2,
        "is not empty and is not a run directory: it has no job.toml and lock",
        "give another --run-dir",
    );
    assert_eq!(files_below(foreign.dir()), [foreign.dir().join("thesis.tex")]);
    let file = Run::new(foreign.dir().join("thesis.tex"), &job(&folder));
    file.end("--fresh").expect_refusal(2, "thesis.tex is a file, not a directory", "give another --run-dir");
    assert_eq!(std::fs::read_to_string(file.dir()).unwrap(), "mine");
    assert!(contents(&run) == before, "a refused start changed the run directory");
}

#[test]
fn a_damaged_newest_checkpoint_is_passed_over_and_the_result_is_the_same() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    // The end of a run is always written; the step before it leaves a second one.
    run.train("--steps 20");
    run.train("--steps 40");
    let newest = checkpoints(&run).pop().unwrap();
    damage(&newest);
    let resumed = run.start("--steps 60").end();
    resumed.expect_exit(0);
    resumed.expect_no_panic();
    let notice = format!("checkpoints/{}: its digest is ", newest.file_name().unwrap().to_str().unwrap());
    assert!(resumed.stdout.contains(&notice), "nobody said '{notice}':\n{}", resumed.stdout);
    assert_eq!(run.hashes(), folder.run("undisturbed", &job(&folder)).train("--steps 60"));
    assert_eq!(run.metric_steps("step"), Vec::from_iter(1..=60));
    assert_nothing_temporary(run.dir());
}

#[test]
fn a_run_without_a_usable_checkpoint_is_not_started_over_by_itself() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    run.train("--steps 20");
    run.train("--steps 40");
    checkpoints(&run).iter().for_each(|path| damage(path));
    let damaged: Vec<Vec<u8>> = checkpoints(&run).iter().map(|path| std::fs::read(path).unwrap()).collect();
    run.end("--steps 60").expect_refusal(
        93,
        "checkpoints is usable: checkpoints/step-00000040.safetensors: its digest is ",
        "restore one of these files from a copy, or give --fresh to start over",
    );
    let after: Vec<Vec<u8>> = checkpoints(&run).iter().map(|path| std::fs::read(path).unwrap()).collect();
    assert!(damaged == after, "what could be restored was touched");
    let again = run.train("--steps 60 --fresh");
    assert_eq!(again, folder.run("undisturbed", &job(&folder)).train("--steps 60"));
}

#[test]
fn a_full_disk_is_said_and_the_run_goes_on_when_there_is_room() {
    let folder = Folder::new();
    let text = folder.text(12_000);
    let (disk, copy) = (folder.empty("disk"), folder.empty("copy"));
    // One checkpoint of this job has about 700 kB: the first three fit.
    let job = format!("char-lstm --data {text} --set hidden_size=64 --set seq_len=10");
    let script = format!(
        "mount -t tmpfs -o size=2200k none $DIR || exit 99
         train() {{ $LOCKSTEP train {job} --steps 100 --workers 1 --run-dir $DIR/run; }}
         train; echo code $?; find $DIR -name '*.tmp'
         $LOCKSTEP inspect $DIR/run || exit 98
         mount -o remount,size=20m $DIR || exit 97
         train || exit 96
         cp -r $DIR/run/. {}",
        copy.display()
    );
    let Some(process) = with_own_mounts(&script, &disk) else {
        return skipped("mistakes_run_dir::a_full_disk", "this machine lets nobody mount");
    };
    let ended = process.end();
    println!("{}{}", ended.stdout, ended.stderr);
    ended.expect_refusal(
        0,
        "No space left on device",
        "free some space and start the same command again; nothing that was written is lost",
    );
    for part in ["the checkpoint was not written: cannot write ", "code 1\n", "epochs done       "] {
        assert!(ended.stdout.contains(part), "nothing says '{part}'");
    }
    assert!(!ended.stdout.lines().any(|line| line.ends_with(".tmp")), "a temporary file is left");
    let undisturbed = folder.run("undisturbed", &job).train("--steps 100");
    assert_eq!(Run::new(copy, &job).hashes(), undisturbed);
}

#[test]
fn a_read_only_disk_is_said() {
    let folder = Folder::new();
    let disk = folder.empty("disk");
    let job = job(&folder);
    let script = format!(
        "mount -t tmpfs none $DIR || exit 99
         $LOCKSTEP train {job} --steps 20 --run-dir $DIR/old >/dev/null || exit 98
         mount -o remount,ro $DIR || exit 97
         $LOCKSTEP train {job} --steps 20 --run-dir $DIR/new; echo new $?
         $LOCKSTEP train {job} --steps 40 --run-dir $DIR/old; echo old $?
         $LOCKSTEP inspect $DIR/old || exit 96"
    );
    let Some(process) = with_own_mounts(&script, &disk) else {
        return skipped("mistakes_run_dir::a_read_only_disk", "this machine lets nobody mount");
    };
    let ended = process.end();
    let hint = "choose a place that can be written with --run-dir";
    ended.expect_refusal(0, &format!("cannot create {}/new: Read-only file system", disk.display()), hint);
    let second = format!("error: cannot open {}/old/lock: Read-only file system", disk.display());
    assert!(ended.stderr.contains(&second) && ended.stderr.matches(hint).count() == 2, "{}", ended.stderr);
    assert!(ended.stdout.contains("new 1\n") && ended.stdout.contains("old 1\n"), "{}", ended.stdout);
}
