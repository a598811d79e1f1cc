//! From the name or path in `[run] data` to files, or to the data that is compiled in.

use std::ffi::OsString;
use std::fs::Metadata;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use protocol::job::Task;
use protocol::problem::{Problem, nearest};

/// Names that are not paths. A file of such a name is given as `./mnist`.
pub(super) const NAMES: [&str; 3] = ["embedded", "tinyshakespeare", "mnist"];

/// sha256 of the text, 1,115,394 bytes, as the char-rnn repository has it.
pub const TINYSHAKESPEARE_SHA256: &str = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed";

/// Data of the task `classify`, in hints.
const LABELLED: &str = "--data embedded, or a file with a label, a tab and a text in each line";

/// The four files of MNIST.
pub const MNIST: [MnistFile; 4] = [
    MnistFile {
        stem: "train-images",
        kind: "idx3-ubyte",
        sha256: "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    },
    MnistFile {
        stem: "train-labels",
        kind: "idx1-ubyte",
        sha256: "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    },
    MnistFile {
        stem: "t10k-images",
        kind: "idx3-ubyte",
        sha256: "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    },
    MnistFile {
        stem: "t10k-labels",
        kind: "idx1-ubyte",
        sha256: "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
];

/// One of MNIST's four files.
#[derive(Debug, Clone, Copy)]
pub struct MnistFile {
    /// Its name's first part.
    pub stem: &'static str,
    /// Its name's second part, after a dash as published or a dot as many tools unpack it.
    pub kind: &'static str,
    /// sha256 of the unpacked content, which is what is checked: another compression is as good.
    pub sha256: &'static str,
}

impl MnistFile {
    /// The names it goes by, the published one first.
    pub fn names(&self) -> [String; 4] {
        ["-|.gz", "-|", ".|.gz", ".|"].map(|form| {
            let (joint, end) = form.split_once('|').expect("each form has a bar");
            format!("{}{joint}{}{end}", self.stem, self.kind)
        })
    }
}

/// Folders that may hold named data: the one that was asked for, else the others in the order they are searched.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Places {
    /// What `--data-dir` names. Nothing else is searched then: what is missing there is not taken from elsewhere.
    pub data_dir: Option<PathBuf>,
    /// What `LOCKSTEP_DATA_DIR` names.
    pub lockstep_data_dir: Option<PathBuf>,
    /// `$XDG_CACHE_HOME/lockstep`, or `~/.cache/lockstep`.
    pub cache_dir: Option<PathBuf>,
}

impl Places {
    /// The places this process is told of.
    pub fn of_process(data_dir: Option<&Path>) -> Self {
        Self::new(data_dir, |name| std::env::var_os(name))
    }

    /// The places that these variables of an environment name. An empty variable counts as unset.
    pub fn new(data_dir: Option<&Path>, variable: impl Fn(&str) -> Option<OsString>) -> Self {
        let folder = |name: &str| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let cache = folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")));
        Self {
            data_dir: data_dir.map(Path::to_owned),
            lockstep_data_dir: folder("LOCKSTEP_DATA_DIR"),
            cache_dir: cache.map(|cache| cache.join("lockstep")),
        }
    }

    /// Those that are searched, in that order.
    pub fn folders(&self) -> impl Iterator<Item = &PathBuf> {
        let searched = match &self.data_dir {
            Some(asked_for) => [Some(asked_for), None],
            None => [self.lockstep_data_dir.as_ref(), self.cache_dir.as_ref()],
        };
        searched.into_iter().flatten()
    }
}

/// Where data comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Source {
    EmbeddedText,
    EmbeddedFields,
    EmbeddedDigits,
    Text { name: String, path: PathBuf, sha256: Option<&'static str> },
    Images { name: String, train: SetFiles, test: SetFiles },
}

/// The two files of a set of labelled images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SetFiles {
    pub(super) images: PathBuf,
    pub(super) labels: PathBuf,
    /// What their contents must be, if they go by the name of a known data set.
    pub(super) sha256: Option<[&'static str; 2]>,
}

/// Finds what `data` names, for this task.
///
/// # Errors
/// Nothing is there, or it is data of another task.
pub(super) fn locate(task: Task, data: &str, places: &Places) -> Result<Source, Problem> {
    match (data, task) {
        ("embedded", Task::Chars) => Ok(Source::EmbeddedText),
        ("embedded", Task::Rows) => Ok(Source::EmbeddedDigits),
        ("embedded", Task::Classify) => Ok(Source::EmbeddedFields),
        ("tinyshakespeare", Task::Chars) => named_text(places),
        ("mnist", Task::Rows) => named_images(places),
        ("tinyshakespeare", Task::Rows) => {
            Err(wrong_task("tinyshakespeare is a text", task, "--data embedded, or mnist"))
        }
        ("mnist", Task::Chars) => {
            Err(wrong_task("mnist is images", task, "--data embedded, or tinyshakespeare"))
        }
        ("tinyshakespeare", Task::Classify) => {
            Err(wrong_task("tinyshakespeare is a text without labels", task, LABELLED))
        }
        ("mnist", Task::Classify) => Err(wrong_task("mnist is images", task, LABELLED)),
        (path, task) => at_path(task, Path::new(path)),
    }
}

/// Where the data that `data` names lies: a file, or a folder with the files; none if it is compiled in.
///
/// # Errors
/// Nothing is there, or it is data of another task.
pub fn place_of(task: Task, data: &str, places: &Places) -> Result<Option<PathBuf>, Problem> {
    Ok(match locate(task, data, places)? {
        Source::EmbeddedText | Source::EmbeddedFields | Source::EmbeddedDigits => None,
        Source::Text { path, .. } => Some(path),
        Source::Images { train, .. } => train.images.parent().map(Path::to_owned),
    })
}

fn wrong_task(what: &str, task: Task, instead: &str) -> Problem {
    let (reads, other) = match task {
        Task::Chars => ("task \"chars\" reads a text", "\"rows\""),
        Task::Rows => ("task \"rows\" reads images", "\"chars\""),
        Task::Classify => ("task \"classify\" reads labelled lines of text", "\"chars\" or \"rows\""),
    };
    Problem::usage(format!("{what}, but {reads}"))
        .hint(format!("choose {instead}; or a preset of task {other}"))
}

fn named_text(places: &Places) -> Result<Source, Problem> {
    let candidates: Vec<PathBuf> = places
        .folders()
        .flat_map(|folder| ["tinyshakespeare/input.txt", "input.txt"].map(|file| folder.join(file)))
        .collect();
    match candidates.iter().find(|path| path.is_file()) {
        Some(path) => Ok(Source::Text {
            name: "tinyshakespeare".to_owned(),
            path: path.clone(),
            sha256: Some(TINYSHAKESPEARE_SHA256),
        }),
        None => Err(not_found("tinyshakespeare", &candidates, "any text file")),
    }
}

fn named_images(places: &Places) -> Result<Source, Problem> {
    let candidates: Vec<PathBuf> =
        places.folders().flat_map(|folder| [folder.join("mnist"), folder.clone()]).collect();
    for folder in &candidates {
        if MNIST.iter().any(|file| find(folder, file).is_some()) {
            return images_in(folder, "mnist", true);
        }
    }
    Err(not_found("mnist", &candidates, "a folder with four such files"))
}

fn not_found(name: &str, candidates: &[PathBuf], instead: &str) -> Problem {
    let looked_at: Vec<String> = candidates.iter().map(|path| path.display().to_string()).collect();
    let sentence = match looked_at.is_empty() {
        true => format!("{name} was not found: no folder to look in is known"),
        false => format!("{name} was not found, looked at {}", looked_at.join(", ")),
    };
    Problem::usage(sentence).hint(format!(
        "get it with `lockstep data fetch {name}`, name its folder with --data-dir or LOCKSTEP_DATA_DIR, or give \
         {instead} with --data PATH"
    ))
}

/// The four files of a folder.
fn images_in(folder: &Path, name: &str, verified: bool) -> Result<Source, Problem> {
    let paths = MNIST.map(|file| find(folder, &file));
    if let [Some(train_images), Some(train_labels), Some(test_images), Some(test_labels)] = paths {
        let sha256 = |set: usize| verified.then(|| [MNIST[set].sha256, MNIST[set + 1].sha256]);
        return Ok(Source::Images {
            name: name.to_owned(),
            train: SetFiles { images: train_images, labels: train_labels, sha256: sha256(0) },
            test: SetFiles { images: test_images, labels: test_labels, sha256: sha256(2) },
        });
    }
    let missing: Vec<String> = MNIST
        .iter()
        .zip(&paths)
        .filter(|(_, path)| path.is_none())
        .map(|(file, _)| format!("{}-{}", file.stem, file.kind))
        .collect();
    Err(Problem::usage(format!("{} lacks {}", folder.display(), missing.join(", ")))
        .hint("each may be plain or end in .gz, and be written with a dot: train-images.idx3-ubyte"))
}

fn find(folder: &Path, file: &MnistFile) -> Option<PathBuf> {
    file.names().into_iter().map(|name| folder.join(name)).find(|path| path.is_file())
}

fn at_path(task: Task, path: &Path) -> Result<Source, Problem> {
    let shown = path.display();
    let metadata = path.metadata().map_err(|error| match error.kind() {
        ErrorKind::NotFound => nothing_at(path),
        _ => Problem::usage(format!("{shown} cannot be read: {error}")),
    })?;
    match (task, kind(&metadata)) {
        (Task::Chars | Task::Classify, Kind::File) => {
            let name = path.file_name().map_or_else(|| shown.to_string(), |name| name.display().to_string());
            Ok(Source::Text { name, path: path.to_owned(), sha256: None })
        }
        (Task::Rows, Kind::Folder) => images_in(path, &shown.to_string(), false),
        (Task::Chars, Kind::Folder) => {
            Err(wrong_task(&format!("{shown} is a folder"), task, "the path of a text file"))
        }
        (Task::Classify, Kind::Folder) => Err(wrong_task(&format!("{shown} is a folder"), task, LABELLED)),
        (Task::Rows, Kind::File) => {
            Err(wrong_task(&format!("{shown} is a file"), task, "the folder with the four image files"))
        }
        (_, Kind::Other) => Err(Problem::usage(format!("{shown} is neither a file nor a folder"))),
    }
}

fn nothing_at(path: &Path) -> Problem {
    let shown = path.to_string_lossy();
    let meant = nearest(&shown, NAMES).map(|name| format!("did you mean '{name}'? "));
    Problem::usage(format!("data is '{shown}', but there is no such file or folder")).hint(format!(
        "{}known names: {}; anything else is a path",
        meant.unwrap_or_default(),
        NAMES.join(", ")
    ))
}

enum Kind {
    File,
    Folder,
    Other,
}

fn kind(metadata: &Metadata) -> Kind {
    match () {
        () if metadata.is_file() => Kind::File,
        () if metadata.is_dir() => Kind::Folder,
        () => Kind::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{job, refusal, run};
    use super::super::{file, open_in};
    use super::*;
    use crate::hex::sha256_hex;
    use std::fs;

    fn touch(path: PathBuf) -> PathBuf {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, "some text").unwrap();
        path
    }

    #[test]
    fn the_cache_is_that_of_xdg_or_of_the_home() {
        let folders = |data_dir: Option<&str>, variables: &[(&str, &str)]| -> Vec<String> {
            let places = Places::new(data_dir.map(Path::new), |name| {
                variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into())
            });
            places.folders().map(|folder| folder.display().to_string()).collect()
        };
        let all = [("HOME", "/home/ada"), ("XDG_CACHE_HOME", "/cache"), ("LOCKSTEP_DATA_DIR", "/data")];
        assert_eq!(folders(None, &[("HOME", "/home/ada")]), ["/home/ada/.cache/lockstep"]);
        assert_eq!(folders(None, &all), ["/data", "/cache/lockstep"]);
        assert!(folders(None, &[("XDG_CACHE_HOME", ""), ("LOCKSTEP_DATA_DIR", "")]).is_empty());
        assert_eq!(
            folders(Some("/flag"), &all),
            ["/flag"],
            "no other folder stands in for the one asked for"
        );
    }

    #[test]
    fn the_first_place_that_holds_the_text_wins() {
        let root = tempfile::tempdir().unwrap();
        let [flag, env, cache] = ["flag", "env", "cache"].map(|name| root.path().join(name));
        let places =
            Places { data_dir: None, lockstep_data_dir: Some(env.clone()), cache_dir: Some(cache.clone()) };
        let found = || match locate(Task::Chars, "tinyshakespeare", &places).unwrap() {
            Source::Text { path, .. } => path,
            other => panic!("{other:?}"),
        };
        let (sentence, hint) = refusal(locate(Task::Chars, "tinyshakespeare", &places));
        let looked_at: Vec<String> = [&env, &cache]
            .iter()
            .flat_map(|folder| [folder.join("tinyshakespeare/input.txt"), folder.join("input.txt")])
            .map(|path| path.display().to_string())
            .collect();
        assert_eq!(sentence, format!("tinyshakespeare was not found, looked at {}", looked_at.join(", ")));
        assert_eq!(
            hint,
            "get it with `lockstep data fetch tinyshakespeare`, name its folder with --data-dir or \
             LOCKSTEP_DATA_DIR, or give any text file with --data PATH"
        );
        for file in [cache.join("input.txt"), env.join("input.txt"), env.join("tinyshakespeare/input.txt")] {
            let touched = touch(file);
            assert_eq!(found(), touched);
        }
        let asked_for = Places { data_dir: Some(flag.clone()), ..places.clone() };
        let (sentence, _) = refusal(locate(Task::Chars, "tinyshakespeare", &asked_for));
        let shown = flag.display();
        let looked_at = format!("{shown}/tinyshakespeare/input.txt, {shown}/input.txt");
        assert_eq!(sentence, format!("tinyshakespeare was not found, looked at {looked_at}"));
    }

    #[test]
    fn images_are_found_under_all_their_names() {
        let root = tempfile::tempdir().unwrap();
        let places = Places { cache_dir: Some(root.path().to_owned()), ..Places::default() };
        let (sentence, hint) = refusal(locate(Task::Rows, "mnist", &places));
        let shown = root.path().display();
        assert_eq!(sentence, format!("mnist was not found, looked at {shown}/mnist, {shown}"));
        assert!(hint.ends_with("a folder with four such files with --data PATH"), "{hint}");

        let folder = root.path().join("mnist");
        let train_images = touch(folder.join("train-images-idx3-ubyte.gz"));
        let labels = touch(folder.join("train-labels.idx1-ubyte"));
        let test_images = touch(folder.join("t10k-images-idx3-ubyte"));
        let (sentence, _) = refusal(locate(Task::Rows, "mnist", &places));
        assert_eq!(sentence, format!("{shown}/mnist lacks t10k-labels-idx1-ubyte"));

        let test_labels = touch(folder.join("t10k-labels.idx1-ubyte.gz"));
        let Source::Images { name, train, test } = locate(Task::Rows, "mnist", &places).unwrap() else {
            panic!("mnist is images")
        };
        assert_eq!(name, "mnist");
        assert_eq!((train.images, train.labels), (train_images, labels));
        assert_eq!((test.images, test.labels), (test_images, test_labels));
        assert_eq!(test.sha256, Some([MNIST[2].sha256, MNIST[3].sha256]));

        let Source::Images { train, .. } = locate(Task::Rows, folder.to_str().unwrap(), &places).unwrap()
        else {
            panic!("the folder holds images")
        };
        assert_eq!(train.sha256, None, "a path is not verified");
        assert_eq!(place_of(Task::Rows, "mnist", &places).unwrap(), Some(folder));
        assert_eq!(place_of(Task::Chars, "embedded", &places).unwrap(), None);
    }

    #[test]
    fn data_of_another_task_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().display().to_string();
        let text = touch(root.path().join("a.txt")).display().to_string();
        let labelled = "but task \"classify\" reads labelled lines of text";
        let cases = [
            (Task::Chars, "mnist", "mnist is images, but task \"chars\" reads a text".to_owned()),
            (
                Task::Rows,
                "tinyshakespeare",
                "tinyshakespeare is a text, but task \"rows\" reads images".to_owned(),
            ),
            (Task::Chars, &folder, format!("{folder} is a folder, but task \"chars\" reads a text")),
            (Task::Rows, &text, format!("{text} is a file, but task \"rows\" reads images")),
            (Task::Classify, "mnist", format!("mnist is images, {labelled}")),
            (
                Task::Classify,
                "tinyshakespeare",
                format!("tinyshakespeare is a text without labels, {labelled}"),
            ),
            (Task::Classify, &folder, format!("{folder} is a folder, {labelled}")),
        ];
        for (task, data, expected) in cases {
            let (sentence, hint) = refusal(locate(task, data, &Places::default()));
            assert_eq!(sentence, expected);
            assert!(hint.starts_with("choose "), "{hint}");
        }
    }

    #[test]
    fn a_path_without_a_file_is_named_with_the_known_names() {
        assert_eq!(
            refusal(locate(Task::Rows, "minst", &Places::default())),
            (
                "data is 'minst', but there is no such file or folder".into(),
                "did you mean 'mnist'? known names: embedded, tinyshakespeare, mnist; anything else is a path".into()
            )
        );
        let (_, hint) = refusal(locate(Task::Chars, "embeded", &Places::default()));
        assert!(hint.starts_with("did you mean 'embedded'? known names: "), "{hint}");
        let (sentence, _) = refusal(locate(Task::Chars, "/dev/null", &Places::default()));
        assert_eq!(sentence, "/dev/null is neither a file nor a folder");
        let (sentence, _) = refusal(locate(Task::Chars, "tinyshakespeare", &Places::default()));
        assert_eq!(sentence, "tinyshakespeare was not found: no folder to look in is known");
    }

    #[test]
    fn a_named_data_set_with_another_content_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let path = touch(root.path().join("input.txt"));
        let places = Places { data_dir: Some(root.path().to_owned()), ..Places::default() };
        let opened = open_in(&job("char-lstm", &[]), &run("tinyshakespeare"), &places);
        let (sentence, _) = refusal(opened.map(|_| ()));
        let found = sha256_hex([&b"some text"[..]]);
        assert_eq!(
            sentence,
            format!("{} has content with sha256 {found}, expected {TINYSHAKESPEARE_SHA256}", path.display())
        );
    }

    #[test]
    fn a_text_by_its_path_has_the_same_digest_packed_or_plain() {
        let root = tempfile::tempdir().unwrap();
        let text = "all work and no play makes jack a dull boy\n".repeat(20);
        let job = job("char-lstm", &[("batch_size", 4), ("seq_len", 10), ("shards", 2)]);
        let facts = [text.as_bytes().to_vec(), file::gzipped(text.as_bytes())].map(|stored| {
            let path = root.path().join("dull.txt");
            fs::write(&path, stored).unwrap();
            open_in(&job, &run(path.to_str().unwrap()), &Places::default()).unwrap().facts().clone()
        });
        assert_eq!(facts[0], facts[1]);
        assert_eq!(facts[0].name, "dull.txt, 860 characters, 19 distinct");
    }
}
