//! What a user is told when something goes wrong: one sentence with the value, a hint, an exit code.

use std::fmt;

/// How a process ends. Documented in README; schedulers act on these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// The run is done.
    Done = 0,
    /// The run failed; the message says why. Another start of the same command may do better.
    Failed = 1,
    /// The command line, the job file or the data is not usable; nothing was started.
    Usage = 2,
    /// The run was asked to stop and did: start the same command again to go on from the newest checkpoint.
    Requeue = 75,
    /// The run failed, and would fail again: no other start of the same command, on whatever machines, ends otherwise.
    Final = 93,
}

/// A failure that a user can cause or mend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// One sentence, lowercase, with the value at fault.
    pub sentence: String,
    /// What to do about it.
    pub hint: Option<String>,
    /// The exit code it leads to.
    pub exit: Exit,
}

impl Problem {
    /// The command line, the job or the data is not usable.
    pub fn usage(sentence: impl Into<String>) -> Self {
        Self { sentence: sentence.into(), hint: None, exit: Exit::Usage }
    }

    /// The run failed.
    pub fn failed(sentence: impl Into<String>) -> Self {
        Self { sentence: sentence.into(), hint: None, exit: Exit::Failed }
    }

    /// The run failed, and would fail again.
    pub fn for_good(sentence: impl Into<String>) -> Self {
        Self { sentence: sentence.into(), hint: None, exit: Exit::Final }
    }

    /// Adds what to do about it.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sentence)
    }
}

impl std::error::Error for Problem {}

/// The known name nearest to `name` by edit distance, if it is near enough to be what was meant.
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known
        .into_iter()
        .map(|candidate| (edit_distance(name, candidate), candidate))
        .min()
        .filter(|(distance, candidate)| *distance <= 1 + candidate.len() / 4)
        .map(|(_, candidate)| candidate)
}

/// Levenshtein distance by one row of the table.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_name_is_offered_only_when_near() {
        let known = ["hidden_size", "batch_size", "seed"];
        assert_eq!(nearest("hiden_size", known), Some("hidden_size"));
        assert_eq!(nearest("sed", known), Some("seed"));
        assert_eq!(nearest("optimizer", known), None);
    }
}
