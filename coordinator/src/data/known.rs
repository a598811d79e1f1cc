//! The data sets that go by a name: where each lies, and whether it is what its name promises.

use std::path::PathBuf;

use protocol::job::Task;
use protocol::problem::{Problem, nearest};

use super::locate::{NAMES, Places, Source, locate};
use super::{digits, fields, file, grouped, text};

/// A data set that goes by a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known {
    /// The text that is compiled in.
    EmbeddedText,
    /// The labelled lines that are written when they are opened.
    EmbeddedFields,
    /// The digits that are drawn when they are opened.
    EmbeddedDigits,
    /// The text of the char-rnn repository.
    Tinyshakespeare,
    /// The handwritten digits.
    Mnist,
}

/// One part of a data set that was looked at, usually a file, and what is wrong with it.
#[derive(Debug)]
pub struct Verified {
    /// What was looked at, for people.
    pub what: String,
    /// Whether it is the expected content.
    pub result: Result<(), Problem>,
}

impl Known {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::EmbeddedText, Self::EmbeddedFields, Self::EmbeddedDigits, Self::Tinyshakespeare, Self::Mnist];

    /// Those that go by `name`: the embedded data are three, a text, labelled lines and images.
    ///
    /// # Errors
    /// None does.
    pub fn named(name: &str) -> Result<Vec<Self>, Problem> {
        let named: Vec<Self> = Self::ALL.into_iter().filter(|known| known.name() == name).collect();
        if named.is_empty() {
            let meant = nearest(name, NAMES).map(|name| format!("did you mean '{name}'? "));
            return Err(Problem::usage(format!("no known data set is called '{name}'")).hint(format!(
                "{}known names: {}",
                meant.unwrap_or_default(),
                NAMES.join(", ")
            )));
        }
        Ok(named)
    }

    /// What `--data` calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::EmbeddedText | Self::EmbeddedFields | Self::EmbeddedDigits => "embedded",
            Self::Tinyshakespeare => "tinyshakespeare",
            Self::Mnist => "mnist",
        }
    }

    /// A few words for people.
    pub fn about(self) -> String {
        match self {
            Self::EmbeddedText => format!(
                "text, version {}, {} characters",
                text::EMBEDDED_TEXT_VERSION,
                grouped(text::EMBEDDED_TEXT.chars().count() as u64)
            ),
            Self::EmbeddedFields => format!(
                "labelled lines, version {}, {} of {} kinds",
                fields::EMBEDDED_FIELDS_VERSION,
                grouped(fields::LINES.into()),
                fields::KINDS.len()
            ),
            Self::EmbeddedDigits => format!(
                "images, version {}, {} + {}",
                digits::EMBEDDED_DIGITS_VERSION,
                grouped(digits::TRAIN_SAMPLES.into()),
                grouped(digits::TEST_SAMPLES.into())
            ),
            Self::Tinyshakespeare => "text, 1,115,394 characters".to_owned(),
            Self::Mnist => "images, 60,000 + 10,000".to_owned(),
        }
    }

    /// The files that a run would read, each with the sha256 of the unpacked content that it must have; none for
    /// what is compiled in.
    ///
    /// # Errors
    /// They are not there; the sentence says where they were looked for.
    pub fn files(self, places: &Places) -> Result<Vec<(PathBuf, &'static str)>, Problem> {
        let task = match self {
            Self::EmbeddedText | Self::Tinyshakespeare => Task::Chars,
            Self::EmbeddedFields => Task::Classify,
            Self::EmbeddedDigits | Self::Mnist => Task::Rows,
        };
        Ok(match locate(task, self.name(), places)? {
            Source::EmbeddedText | Source::EmbeddedFields | Source::EmbeddedDigits => Vec::new(),
            Source::Text { path, sha256, .. } => {
                sha256.into_iter().map(|sha256| (path.clone(), sha256)).collect()
            }
            Source::Images { train, test, .. } => [train, test]
                .into_iter()
                .flat_map(|set| [set.images, set.labels].into_iter().zip(set.sha256.into_iter().flatten()))
                .collect(),
        })
    }

    /// Reads all of it and compares it with what it must be.
    pub fn verify(self, places: &Places) -> Vec<Verified> {
        let embedded = |parts: &[&[u8]], expected: &str| {
            let what = format!("embedded {}", self.about());
            let result = file::compare(&what, parts, expected);
            Verified { what, result }
        };
        match self {
            Self::EmbeddedText => {
                vec![embedded(&[text::EMBEDDED_TEXT.as_bytes()], text::EMBEDDED_TEXT_SHA256)]
            }
            Self::EmbeddedFields => {
                vec![embedded(&[fields::text().as_bytes()], fields::EMBEDDED_FIELDS_SHA256)]
            }
            Self::EmbeddedDigits => {
                let (train, test) = (digits::train(), digits::test());
                let parts = [&train.pixels[..], &train.labels, &test.pixels, &test.labels];
                vec![embedded(&parts, digits::EMBEDDED_DIGITS_SHA256)]
            }
            Self::Tinyshakespeare | Self::Mnist => match self.files(places) {
                Err(problem) => vec![Verified { what: self.name().to_owned(), result: Err(problem) }],
                Ok(files) => files
                    .into_iter()
                    .map(|(path, sha256)| {
                        let read = file::read(&path, file::LIMIT_BYTES);
                        let result = read.and_then(|bytes| file::verify(&path, &bytes, sha256));
                        Verified { what: path.display().to_string(), result }
                    })
                    .collect(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::real_data;
    use super::*;

    #[test]
    fn embedded_data_are_what_they_were_when_their_version_was_given() {
        for known in Known::named("embedded").unwrap() {
            for Verified { what, result } in known.verify(&Places::default()) {
                assert_eq!(result, Ok(()), "{what}: a change needs a new version");
            }
        }
    }

    #[test]
    fn names_are_known_or_the_nearest_is_offered() {
        for known in Known::ALL {
            assert!(NAMES.contains(&known.name()) && Known::named(known.name()).unwrap().contains(&known));
        }
        let problem = Known::named("minst").unwrap_err();
        assert_eq!(problem.sentence, "no known data set is called 'minst'");
        assert_eq!(
            problem.hint.unwrap(),
            "did you mean 'mnist'? known names: embedded, tinyshakespeare, mnist"
        );
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        let root = tempfile::tempdir().unwrap();
        let places = Places { data_dir: Some(root.path().to_owned()), ..Places::default() };
        for known in [Known::Tinyshakespeare, Known::Mnist] {
            let verified = known.verify(&places);
            let sentence = &verified[0].result.as_ref().unwrap_err().sentence;
            assert!(
                sentence.starts_with(&format!("{} was not found, looked at ", known.name())),
                "{sentence}"
            );
        }
        std::fs::write(root.path().join("input.txt"), "not it").unwrap();
        let verified = Known::Tinyshakespeare.verify(&places);
        assert!(verified[0].result.as_ref().unwrap_err().sentence.contains("has content with sha256"));
    }

    #[test]
    fn real_data_are_right() {
        let Some(places) = real_data() else { return };
        for (known, files) in [(Known::Tinyshakespeare, 1), (Known::Mnist, 4)] {
            let verified = known.verify(&places);
            assert_eq!(verified.len(), files);
            assert!(verified.iter().all(|part| part.result.is_ok()), "{verified:#?}");
        }
    }
}
