//! The text that the network writes at each epoch's end: what is asked for, and what people are shown of it.

use protocol::job::{JobFile, Task};
use protocol::message::SampleRequest;

use crate::data::DataFacts;
use crate::data::vocabulary::Vocabulary;

/// Asks for texts and reads them.
pub(crate) struct EpochSample {
    vocabulary: Vocabulary,
    request: SampleRequest,
}

impl EpochSample {
    /// The texts of a run, `None` if it has none: on request, or because its network names classes.
    pub(crate) fn new(file: &JobFile, facts: &DataFacts) -> Option<Self> {
        if file.job.task != Task::Chars {
            return None;
        }
        let vocabulary = Vocabulary::of_job(&file.job.text, facts.vocabulary.as_ref()?.iter().copied());
        let request = SampleRequest {
            prime: vocabulary.default_prime(),
            length: file.run.sample_chars,
            temperature: file.run.sample_temperature,
            // Always the same random numbers, so that epochs differ by what was learnt.
            seed: file.job.seed,
        };
        (request.length > 0).then_some(Self { vocabulary, request })
    }

    /// What workers are asked for.
    pub(crate) fn request(&self) -> SampleRequest {
        self.request.clone()
    }

    /// The text of what a worker sent, no longer than was asked for.
    pub(crate) fn text(&self, tokens: &[u32]) -> String {
        self.vocabulary.text(&tokens[..tokens.len().min(self.request.length as usize)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Dataset, open};

    fn sample(preset: &str, settings: &[(&str, &str)]) -> Option<EpochSample> {
        let settings: Vec<_> =
            settings.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let file = JobFile::resolve(preset, None, &settings).unwrap();
        let data: Box<dyn Dataset> = open(&file.job, &file.run, None).unwrap();
        EpochSample::new(&file, data.facts())
    }

    #[test]
    fn texts_are_asked_for_where_there_are_any() {
        assert!(sample("mnist-rnn", &[]).is_none());
        assert!(sample("classify-text", &[]).is_none());
        assert!(sample("char-lstm", &[("sample_chars", "0")]).is_none());
        let sample = sample("char-lstm", &[("sample_chars", "3"), ("seed", "7")]).unwrap();
        let request = sample.request();
        assert_eq!((request.length, request.temperature, request.seed), (3, 0.7, 7));
        assert_eq!(sample.text(&request.prime), "\n");
    }

    #[test]
    fn what_was_not_asked_for_is_not_read() {
        let sample = sample("char-lstm", &[("sample_chars", "3")]).unwrap();
        assert_eq!(sample.text(&[0, 1, u32::MAX, 2]).chars().count(), 2);
        assert_eq!(sample.text(&[0; 9]).chars().count(), 3);
    }

    #[test]
    fn padding_is_no_part_of_a_text_of_lines() {
        let sample = sample("char-lstm", &[("mode", "lines"), ("pad", "pre"), ("max_len", "100")]).unwrap();
        assert_eq!(sample.text(&sample.request().prime), "\n");
        assert_eq!(sample.text(&[0, 1, 0, 1]), "\n\n");
    }
}
