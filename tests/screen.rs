//! What a run shows: on a terminal, without one, as JSON, and as a picture.

mod common;

use std::fs::File;
use std::io::Read;
use std::process::{Child, Command, Stdio};

use common::{Folder, Run, eventually, get, lockstep};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use serde_json::Value;

/// 16 steps are an epoch.
fn job(folder: &Folder) -> String {
    let text = folder.text(12_000);
    format!("char-lstm --data {text} --set hidden_size=16 --set seq_len=10")
}

fn picture(run: &Run) -> String {
    std::fs::read_to_string(run.dir().join("loss.svg")).unwrap()
}

#[test]
fn without_a_terminal_a_run_is_plain_lines() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    let ended = run.end("--epochs 3 --workers 2");
    ended.expect_exit(0);
    let lines: Vec<&str> = ended.stdout.lines().collect();
    assert!(!ended.stdout.contains(['\x1b', '\r']), "{}", ended.stdout);
    assert!(lines[0].starts_with("╭─ Lockstep: char-lstm ─"), "{}", lines[0]);
    let box_end = lines.iter().position(|line| line.starts_with('╰')).unwrap();
    let width = lines[0].chars().count();
    assert!(lines[..=box_end].iter().all(|line| line.chars().count() == width), "{}", ended.stdout);

    let epochs: Vec<&&str> =
        lines.iter().filter(|line| line.starts_with("epoch ") && line.contains("val ")).collect();
    assert_eq!(epochs.len(), 3, "{}", ended.stdout);
    for part in [
        "  train ",
        "  val ",
        " bits/char  ",
        "  grad ",
        "  lr 0.002  ",
        " samples/s  ",
        "  comm ",
        "  2 workers  ",
    ] {
        assert!(epochs[0].contains(part), "no '{part}' in {}", epochs[0]);
    }
    let dir = run.dir().display().to_string();
    let summary = lines.iter().position(|line| line.starts_with("done: 48 steps in ")).unwrap();
    for (label, value) in [
        ("run directory", dir.clone()),
        ("checkpoint", format!("{dir}/latest")),
        ("metrics", format!("{dir}/metrics.jsonl")),
        ("losses", format!("{dir}/loss.svg")),
        ("next", format!("lockstep sample {dir}")),
        ("", format!("lockstep inspect {dir}")),
    ] {
        let line = lines[summary..].iter().find(|line| line.ends_with(&format!(" {value}")));
        assert!(
            line.is_some_and(|line| line.trim().starts_with(label)),
            "no '{label} {value}':\n{}",
            ended.stdout
        );
    }
}

#[test]
fn with_json_every_line_is_an_object() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    let ended = run.end("--epochs 2 --json");
    ended.expect_exit(0);
    let lines: Vec<Value> = ended.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of_kind = |kind: &str| lines.iter().filter(|line| line["kind"] == kind).collect::<Vec<_>>();
    assert_eq!(lines[0]["kind"], "job");
    assert_eq!(lines[0]["facts"]["run directory"], run.dir().to_str().unwrap());
    let epochs = of_kind("epoch");
    assert_eq!(epochs.len(), 2);
    for key in [
        "train_loss",
        "val_loss",
        "val_accuracy",
        "grad_norm",
        "learning_rate",
        "samples_per_second",
        "seconds",
    ] {
        assert!(epochs[1][key].is_f64(), "{key} of {}", epochs[1]);
    }
    let [end] = of_kind("end")[..] else { panic!("{}", ended.stdout) };
    assert_eq!(end, lines.last().unwrap());
    assert!(end["facts"]["losses"].is_string() && !ended.stdout.contains("lockstep sample"), "{end}");
}

#[test]
fn the_picture_shows_the_whole_run_however_it_came_about() {
    let folder = Folder::new();
    let job = job(&folder);
    let (once, resumed) = (folder.run("once", &job), folder.run("resumed", &job));
    once.train("--epochs 6 --workers 1");
    resumed.train("--epochs 2 --workers 3");
    let first = picture(&resumed);
    resumed.train("--steps 70 --workers 2");
    resumed.train("--epochs 6 --workers 1");
    let document = picture(&once);
    assert_ne!(document, first);
    assert!(document == picture(&resumed), "the pictures differ");
    let document = roxmltree::Document::parse(&document).unwrap();
    let texts: Vec<&str> = document.descendants().filter_map(|node| node.text()).map(str::trim).collect();
    for text in ["char-lstm: 2 × lstm 16", "training", "validation", "step", "loss, nats"] {
        assert!(texts.contains(&text), "no '{text}' in {texts:?}");
    }
    assert!(texts.iter().any(|text| text.starts_with("96 steps · epoch 6: training loss ")), "{texts:?}");

    let process = resumed.start("--fresh --steps 1000000");
    eventually("the old picture to go", || (!resumed.dir().join("loss.svg").exists()).then_some(()));
    drop(process);
}

#[test]
fn a_picture_that_cannot_be_written_is_a_notice() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    run.train("--epochs 1");
    let picture = run.dir().join("loss.svg");
    std::fs::remove_file(&picture).unwrap();
    std::fs::create_dir(&picture).unwrap();
    std::fs::write(picture.join("in the way"), "").unwrap();
    let ended = run.end("--epochs 3");
    ended.expect_exit(0);
    assert!(ended.stdout.contains(&format!("cannot write {}: ", picture.display())), "{}", ended.stdout);
    assert_eq!(run.hashes().step, 48);
}

#[test]
fn the_picture_is_served_beside_the_status() {
    let folder = Folder::new();
    let run = folder.run("run", &job(&folder));
    let mut process = run.start("--epochs 2 --linger 600");
    let line = process.line_with("http://");
    let address = line.split("http://").nth(1).unwrap().split('/').next().unwrap().to_owned();
    process.line_with("done: 32 steps");
    let answer = get(&address, "/loss.svg");
    assert_eq!((answer.code, answer.content_type.as_str()), (200, "image/svg+xml"));
    assert_eq!(answer.body, picture(&run));
    assert!(get(&address, "/").body.contains("loss.svg"));
}

/// A run on a terminal of its own.
struct Terminal {
    child: Child,
    controller: Option<File>,
    shown: Vec<u8>,
}

impl Terminal {
    fn start(run: &Run, options: &str, columns: u16, term: &str) -> Self {
        Self::start_with(run, options, columns, term, &[])
    }

    fn start_with(run: &Run, options: &str, columns: u16, term: &str, variables: &[(&str, &str)]) -> Self {
        let controller = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&controller).unwrap();
        unlockpt(&controller).unwrap();
        let size = Winsize { ws_row: 40, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&controller, size).unwrap();
        let name = ptsname(&controller, Vec::new()).unwrap().into_string().unwrap();
        let open = || Stdio::from(File::options().read(true).write(true).open(&name).unwrap());
        let mut command: Command = lockstep();
        command.arg("train").args(run.words()).args(options.split_whitespace());
        command.env("TERM", term).env_remove("NO_COLOR").env_remove("CLICOLOR_FORCE").env_remove("CLICOLOR");
        command.envs(variables.iter().copied());
        let child = command.stdin(open()).stdout(open()).stderr(open()).spawn().unwrap();
        Self { child, controller: Some(File::from(controller)), shown: Vec::new() }
    }

    /// Reads until the terminal shows this.
    fn shows(&mut self, part: &str) {
        while !String::from_utf8_lossy(&self.shown).contains(part) {
            assert!(self.read(), "no '{part}' in {:?}", String::from_utf8_lossy(&self.shown));
        }
    }

    /// Everything that was written, and the exit code.
    fn end(mut self) -> (String, Option<i32>) {
        while self.read() {}
        let code = self.child.wait().unwrap().code();
        (String::from_utf8_lossy(&self.shown).into_owned(), code)
    }

    /// Whether there was more to read.
    fn read(&mut self) -> bool {
        let mut buffer = [0; 4096];
        match self.controller.as_mut().unwrap().read(&mut buffer) {
            Ok(count @ 1..) => {
                self.shown.extend_from_slice(&buffer[..count]);
                true
            }
            // That nobody has the other side open any more is an error here.
            _ => false,
        }
    }

    fn hang_up(&mut self) {
        self.controller = None;
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What stays on the terminal: what follows on each line after it was last wiped, without colours. The bar is the only
/// thing that is wiped, and nothing else moves the cursor.
fn left_on_screen(written: &str) -> Vec<String> {
    let last =
        |line: &str| line.trim_end_matches('\r').rsplit("\r\x1b[2K").next().unwrap_or_default().to_owned();
    written.split('\n').map(|line| without_colours(&last(line))).collect()
}

fn without_colours(text: &str) -> String {
    let mut parts = text.split("\x1b[");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| {
        let (code, rest) = part.split_once('m').unwrap_or_else(|| panic!("an unexpected movement: {part:?}"));
        assert!(code.chars().all(|char| char.is_ascii_digit()), "an unexpected movement: {part:?}");
        text + rest
    })
}

#[test]
fn on_a_terminal_a_bar_is_drawn_and_nothing_of_it_is_left() {
    let folder = Folder::new();
    // Long enough for the bar, and an epoch's line above it.
    let job = job(&folder) + " --set hidden_size=64";
    for (columns, term) in [(80, "xterm"), (200, "xterm"), (40, "xterm"), (80, "dumb")] {
        let run = folder.run(&format!("{columns}-{term}"), &job);
        let (written, code) = Terminal::start(&run, "--epochs 12 --workers 1", columns, term).end();
        assert_eq!(code, Some(0), "{written}");
        let left = left_on_screen(&written);
        let text = left.join("\n");
        let is_drawn = written.contains("━") && written.contains("192  ");
        assert_eq!(is_drawn, term != "dumb", "{columns} columns on {term}: {written:?}");
        assert!(!text.contains('━') && !text.contains('\r'), "{columns} columns on {term}: {text}");
        let done = left.iter().position(|line| line.starts_with("done: 192 steps in ")).unwrap();
        assert!(left[..done].iter().any(|line| line.starts_with("epoch   1  train ")), "{text}");
        assert!(left[..done].iter().any(|line| line.starts_with("epoch  12  train ")), "{text}");
        assert!(left.last().unwrap().is_empty(), "the last line is not ended: {text}");
        // Paths are never cut; all that comes before the summary fits.
        for line in &left[..done] {
            let width = line.chars().count();
            assert!(width <= usize::from(columns) || term == "dumb", "{width} of {columns} columns: {line}");
        }
    }
}

#[test]
fn colours_are_left_out_where_they_are_not_wanted() {
    let folder = Folder::new();
    let run = folder.run("run", &(job(&folder) + " --set hidden_size=64"));
    let (written, _) =
        Terminal::start_with(&run, "--epochs 12 --workers 1", 80, "xterm", &[("NO_COLOR", "1")]).end();
    assert!(written.contains('━'), "{written:?}");
    let codes: Vec<&str> = written.split("\x1b[").skip(1).filter(|part| !part.starts_with("2K")).collect();
    assert!(codes.is_empty(), "{codes:?}");
}

#[test]
fn a_terminal_that_goes_away_does_not_end_the_run() {
    let folder = Folder::new();
    let job = job(&folder) + " --set hidden_size=64";
    let expected = folder.run("undisturbed", &job).train("--epochs 20 --workers 1");
    let run = folder.run("run", &job);
    let mut terminal = Terminal::start(&run, "--epochs 20 --workers 1", 80, "xterm");
    terminal.shows("epoch   1");
    terminal.hang_up();
    // What the shell of a closed terminal does; the signal reaches the supervisor only.
    kill_process(Pid::from_child(&terminal.child), Signal::HUP).unwrap();
    let code = eventually("the end of the run", || terminal.child.try_wait().unwrap()).code();
    assert_eq!(code, Some(0));
    assert_eq!(run.hashes(), expected);
    assert!(expected.step == 320 && picture(&run).contains("320 steps"));
}
