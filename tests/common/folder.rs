//! A temporary folder with the texts and run directories of one test.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::Run;

/// Deleted with everything in it when it is dropped.
pub(crate) struct Folder(TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// An empty folder in it.
    pub(crate) fn empty(&self, name: &str) -> PathBuf {
        let path = self.path().join(name);
        std::fs::create_dir(&path).unwrap();
        path
    }

    /// A text of so many characters, always the same: words of a small vocabulary, so that there is something to
    /// learn, in an order that does not repeat.
    pub(crate) fn text(&self, characters: usize) -> String {
        const WORDS: [&str; 8] = ["the", "tree", "adds", "shards", "in", "one", "order", "naïve"];
        let mut text = String::new();
        let mut random = 1_u64;
        while text.chars().count() < characters {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            text += WORDS[(random >> 61) as usize];
            text.push(if random >> 40 & 7 == 0 { '\n' } else { ' ' });
        }
        let path = self.path().join(format!("text-{characters}.txt"));
        std::fs::write(&path, text.chars().take(characters).collect::<String>()).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// The run directory `name` in it, for the job of these words of a command line.
    pub(crate) fn run(&self, name: &str, job: &str) -> Run {
        Run::new(self.path().join(name), job)
    }
}

/// Every file below a folder, in order; none if there is no such folder.
pub(crate) fn files_below(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut files: Vec<PathBuf> = entries
        .flatten()
        .flat_map(|entry| if entry.path().is_dir() { files_below(&entry.path()) } else { vec![entry.path()] })
        .collect();
    files.sort();
    files
}
