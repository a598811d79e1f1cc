//! `lockstep data`: the data sets that go by a name: list, verify, fetch.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use coordinator::data::fetch::{Progress, Request, fetch};
use coordinator::data::known::Known;
use coordinator::data::locate::Places;
use protocol::problem::{Exit, Problem};

use super::{note, print};

#[derive(Debug, Args)]
#[command(disable_help_subcommand = true)]
pub(crate) struct DataArgs {
    #[command(subcommand)]
    command: DataCommand,
}

#[derive(Debug, Subcommand)]
enum DataCommand {
    /// Show the known data sets and where each lies
    List {
        #[command(flatten)]
        place: PlaceArg,
    },
    /// Read known data sets and check that they are what they should be
    Verify {
        /// tinyshakespeare, mnist or embedded [default: all]
        name: Option<String>,
        #[command(flatten)]
        place: PlaceArg,
    },
    /// Download a known data set, unless it is there
    Fetch {
        /// tinyshakespeare or mnist
        name: String,
        #[command(flatten)]
        place: PlaceArg,
        /// Folder on a server that has the files, instead of where they are published (may be repeated)
        #[arg(long = "mirror", value_name = "URL")]
        mirrors: Vec<String>,
    },
}

#[derive(Debug, Args)]
struct PlaceArg {
    /// The one folder of tinyshakespeare and mnist [default: LOCKSTEP_DATA_DIR, then the user's cache]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
}

impl PlaceArg {
    fn places(&self) -> Places {
        Places::of_process(self.data_dir.as_deref())
    }
}

pub(crate) fn run(args: DataArgs) -> Result<Exit, Problem> {
    match args.command {
        DataCommand::List { place } => list(&place.places())?,
        DataCommand::Verify { name, place } => verify(name.as_deref(), &place.places())?,
        DataCommand::Fetch { name, place, mirrors } => {
            let places = place.places();
            let mut shown = Shown { line: None, printed: Ok(()) };
            let request = Request { name, data_dir: place.data_dir, mirrors };
            fetch(&request, &places, &mut |progress| shown.show(&progress))?;
            shown.printed?;
        }
    }
    Ok(Exit::Done)
}

fn list(places: &Places) -> Result<(), Problem> {
    for known in Known::ALL {
        let mut lines = vec![format!("{:<16} {}", known.name(), known.about())];
        match known.files(places) {
            Ok(files) if files.is_empty() => lines.push("    compiled in".to_owned()),
            Ok(files) => lines.extend(files.iter().map(|(path, _)| format!("    {}", path.display()))),
            Err(problem) => {
                lines.push(format!("    {problem}"));
                lines.extend(problem.hint.iter().map(|hint| format!("    hint: {hint}")));
            }
        }
        print(&format!("{}\n", lines.join("\n")))?;
    }
    Ok(())
}

fn verify(name: Option<&str>, places: &Places) -> Result<(), Problem> {
    let sets = name.map_or_else(|| Ok(Known::ALL.to_vec()), Known::named)?;
    let (mut looked_at, mut wrong) = (0, 0);
    for part in sets.iter().flat_map(|known| known.verify(places)) {
        looked_at += 1;
        match part.result {
            Ok(()) => print(&format!("right: {}\n", part.what))?,
            Err(problem) => {
                wrong += 1;
                print(&format!("wrong: {problem}\n"))?;
            }
        }
    }
    if wrong == 0 {
        return Ok(());
    }
    Err(Problem::failed(format!("{wrong} of {looked_at} are missing or wrong"))
        .hint("get what is published again with `lockstep data fetch NAME`"))
}

/// One line on a terminal that shows how much has come; elsewhere only what has been decided.
struct Shown {
    /// When the line was last written, if it is there.
    line: Option<Instant>,
    /// Whether standard output took all that was decided. A download goes on without it.
    printed: Result<(), Problem>,
}

impl Shown {
    fn show(&mut self, progress: &Progress<'_>) {
        if let Progress::Received { url, bytes, total } = *progress {
            return self.received(url, bytes, total);
        }
        if self.line.take().is_some() {
            let _ = std::io::stderr().write_all(b"\r\x1b[K");
        }
        match *progress {
            Progress::Present(path) => self.say(&format!("already there and right: {}", path.display())),
            Progress::Written(path) => self.say(&format!("fetched and verified: {}", path.display())),
            Progress::Failed { url, why } => note(&format!("{url}: {why}; trying the next mirror")),
            Progress::Received { .. } => {}
        }
    }

    fn say(&mut self, line: &str) {
        if self.printed.is_ok() {
            self.printed = print(&format!("{line}\n"));
        }
    }

    fn received(&mut self, url: &str, bytes: u64, total: Option<u64>) {
        let is_fresh = self.line.is_some_and(|written| written.elapsed() < Duration::from_millis(100));
        if is_fresh || !std::io::stderr().is_terminal() {
            return;
        }
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let of = total.map(|total| format!(" of {:.1}", mib(total))).unwrap_or_default();
        let text = format!("\r\x1b[K{url}: {:.1}{of} MiB", mib(bytes));
        let _ = std::io::stderr().write_all(text.as_bytes());
        self.line = Some(Instant::now());
    }
}
