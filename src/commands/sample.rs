//! `lockstep sample`: text from a trained network, shown as it is made.

use std::io::{self, BufWriter, ErrorKind, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use coordinator::data::vocabulary::Vocabulary;
use coordinator::store::checkpoint::Checkpoint;
use model::device::{Backend, DeviceError};
use model::sample::{SampleOptions, Sampler};
use protocol::job::Task;
use protocol::problem::{Exit, Problem};

use super::CheckpointArg;
use crate::args::SimdArg;
use crate::device::{DeviceArg, WithBackend, open};

/// Text waits at most this long for the rest of its line.
const FLUSH_INTERVAL: Duration = Duration::from_millis(20);

#[derive(Debug, Args)]
pub(crate) struct SampleArgs {
    #[command(flatten)]
    checkpoint: CheckpointArg,
    /// Number of characters, besides the prime
    #[arg(long, value_name = "N", default_value_t = 1000)]
    length: u64,
    /// Below 1 likely characters become likelier, above 1 less so
    #[arg(
        long,
        value_name = "T",
        default_value_t = 0.7,
        conflicts_with = "greedy",
        allow_negative_numbers = true
    )]
    temperature: f64,
    /// Choose from the N likeliest characters only
    #[arg(long, value_name = "N", conflicts_with = "greedy")]
    top_n: Option<usize>,
    /// Always take the likeliest character
    #[arg(long)]
    greedy: bool,
    /// Text that the sample continues
    #[arg(long, value_name = "TEXT", conflicts_with = "prime_file", allow_hyphen_values = true)]
    prime: Option<String>,
    /// File with the text that the sample continues
    #[arg(long, value_name = "FILE")]
    prime_file: Option<PathBuf>,
    /// Another seed, another text
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    device: DeviceArg,
    #[command(flatten)]
    simd: SimdArg,
}

pub(crate) fn run(args: &SampleArgs) -> Result<Exit, Problem> {
    let options = args.options();
    options.check()?;
    let given = args.prime()?;
    let (device, simd) = (args.device.resolve()?, args.simd.resolve()?);
    let loaded = args.checkpoint.load("lockstep sample RUN_DIR")?;
    let checkpoint = &loaded.checkpoint;
    let vocabulary = vocabulary_of(checkpoint, &loaded.path)?;
    let prime = match given.as_str() {
        "" => vocabulary.default_prime(),
        text => vocabulary.tokens("the prime", text)?,
    };
    let length = args.length;
    device.run(simd, 1, Writing { checkpoint, vocabulary, given, prime, options, length })
}

/// What is to be written.
struct Writing<'a> {
    checkpoint: &'a Checkpoint,
    vocabulary: Vocabulary,
    /// The text to go on from, as it was given.
    given: String,
    /// The same in tokens, or what stands for an empty one.
    prime: Vec<u32>,
    options: SampleOptions,
    length: u64,
}

impl WithBackend for Writing<'_> {
    type Output = Result<Exit, Problem>;

    fn with<B: Backend>(self, backend: B) -> Self::Output {
        let Self { checkpoint, vocabulary, given, prime, options, length } = self;
        let failed = |error: DeviceError| Problem::failed(error.to_string());
        let layout = checkpoint.image.layout();
        let job = &checkpoint.job;
        let opened = open(&backend, job, &checkpoint.image, job.seq_len as usize);
        let (mut device, parameters) = opened.map_err(failed)?;

        let mut text = TextStream::new();
        let written = text.write(&given);
        let mut sampler =
            Sampler::new(&mut device, &layout.shape, &parameters, &prime, options).map_err(failed)?;
        let written = written.and_then(|()| {
            for _ in 0..length {
                let token = sampler.next().expect("a sample has no end").map_err(io::Error::other)?;
                vocabulary.character(token).map_or(Ok(()), |character| text.write_character(character))?;
            }
            text.end()
        });
        match written {
            // Whoever reads has seen enough.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(Exit::Done),
            Err(error) => Err(Problem::failed(format!("the sample was cut off: {error}"))),
            Ok(()) => Ok(Exit::Done),
        }
    }
}

impl SampleArgs {
    fn options(&self) -> SampleOptions {
        let top_n = if self.greedy { Some(1) } else { self.top_n };
        SampleOptions { temperature: self.temperature, top_n, seed: self.seed }
    }

    /// The text to go on from, as it was given.
    fn prime(&self) -> Result<String, Problem> {
        let Some(path) = &self.prime_file else {
            return Ok(self.prime.clone().unwrap_or_default());
        };
        std::fs::read_to_string(path).map_err(|error| {
            Problem::usage(format!("cannot read the prime from {}: {error}", path.display()))
                .hint("--prime-file takes a UTF-8 text; --prime takes the text itself")
        })
    }
}

/// The characters of a checkpoint, one for each class.
fn vocabulary_of(checkpoint: &Checkpoint, path: &Path) -> Result<Vocabulary, Problem> {
    let refuse = |what_it_does: &str| {
        Err(Problem::usage(format!(
            "{} is of a network that {what_it_does}: there is no text to sample",
            path.display()
        ))
        .hint("sample from a run of a preset whose task is \"chars\", such as char-lstm"))
    };
    let characters = match (checkpoint.job.task, &checkpoint.vocabulary) {
        (Task::Chars, Some(characters)) => characters,
        (Task::Classify, _) => return refuse("names the class of a text"),
        _ => return refuse("reads images"),
    };
    let vocabulary = Vocabulary::of_job(&checkpoint.job.text, characters.chars());
    let classes = checkpoint.image.layout().shape.classes;
    if vocabulary.len() != classes {
        return Err(Problem::failed(format!(
            "{} has {} characters for {classes} classes",
            path.display(),
            vocabulary.len()
        )));
    }
    Ok(vocabulary)
}

/// Text on its way to standard output: in whole lines, and in pieces where a line takes long.
struct TextStream {
    out: BufWriter<io::Stdout>,
    /// A terminal would obey control characters; what a network wrote may only be looked at there.
    is_terminal: bool,
    flushed: Instant,
    last: char,
}

impl TextStream {
    fn new() -> Self {
        let out = io::stdout();
        Self { is_terminal: out.is_terminal(), out: BufWriter::new(out), flushed: Instant::now(), last: '\n' }
    }

    fn write(&mut self, text: &str) -> io::Result<()> {
        text.chars().try_for_each(|character| self.write_character(character))
    }

    fn write_character(&mut self, character: char) -> io::Result<()> {
        let is_obeyed = self.is_terminal && character.is_control() && !matches!(character, '\n' | '\t');
        write!(self.out, "{}", if is_obeyed { char::REPLACEMENT_CHARACTER } else { character })?;
        self.last = character;
        if character == '\n' || self.flushed.elapsed() >= FLUSH_INTERVAL {
            self.out.flush()?;
            self.flushed = Instant::now();
        }
        Ok(())
    }

    /// Ends the last line.
    fn end(&mut self) -> io::Result<()> {
        if self.last != '\n' {
            self.write_character('\n')?;
        }
        self.out.flush()
    }
}
