//! The characters of a text as tokens and back.

use std::collections::HashMap;
use std::fmt;

use protocol::job::{Pad, TextSpec};
use protocol::problem::Problem;

/// Fills lines up in front, where a job pads them so; text has no such character then.
pub const PADDING: char = '\0';

/// Its token: it is the first character there is.
pub const PADDING_TOKEN: u16 = 0;

/// Characters by token id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vocabulary {
    characters: Vec<char>,
    token_of: HashMap<char, u32>,
    /// Whether one of the tokens is padding: it stands for no character of a text.
    has_padding: bool,
}

impl Vocabulary {
    /// The characters in the order of their token ids.
    pub fn new(characters: impl IntoIterator<Item = char>) -> Self {
        let characters: Vec<char> = characters.into_iter().collect();
        let token_of = characters.iter().copied().zip(0..).collect();
        Self { characters, token_of, has_padding: false }
    }

    /// The characters of a network that was trained on lines of this `[job.text]`.
    pub fn of_job(text: &TextSpec, characters: impl IntoIterator<Item = char>) -> Self {
        Self { has_padding: text.pad == Pad::Pre, ..Self::new(characters) }
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.characters.len()
    }

    /// Whether there is no token; no text has such a vocabulary.
    pub fn is_empty(&self) -> bool {
        self.characters.is_empty()
    }

    /// The character of a token, `None` if there is no such token or it is padding.
    pub fn character(&self, token: u32) -> Option<char> {
        if self.has_padding && token == u32::from(PADDING_TOKEN) {
            return None;
        }
        self.characters.get(token as usize).copied()
    }

    /// The text of tokens; what is no token or padding is left out.
    pub fn text(&self, tokens: &[u32]) -> String {
        tokens.iter().filter_map(|&token| self.character(token)).collect()
    }

    /// The tokens of a text.
    ///
    /// # Errors
    /// The text, which people know as `name`, has a character that has no token.
    pub fn tokens(&self, name: &str, text: &str) -> Result<Vec<u32>, Problem> {
        text.chars()
            .map(|character| {
                self.token_of.get(&character).copied().ok_or_else(|| {
                    Problem::usage(format!("{name} has {character:?}, which the network has never seen"))
                        .hint(format!("it knows {self}"))
                })
            })
            .collect()
    }

    /// What a text starts from if nobody says otherwise: the start of a line, else the first character there is.
    pub fn default_prime(&self) -> Vec<u32> {
        vec![self.token_of.get(&'\n').copied().unwrap_or(0)]
    }

    /// The characters that only this vocabulary has.
    pub fn without(&self, other: &Self) -> Self {
        let only = |character: &char| !other.token_of.contains_key(character);
        Self::new(self.characters.iter().copied().filter(only))
    }
}

/// For people: `'\n' ' ' '!' 'a'-'z'`, neighbours joined and cut after some.
impl fmt::Display for Vocabulary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MOST_RANGES: usize = 40;
        let mut sorted = self.characters.clone();
        sorted.sort_unstable();
        let ranges: Vec<&[char]> = sorted.chunk_by(|&a, &b| a as u32 + 1 == b as u32).collect();
        for (index, range) in ranges.iter().take(MOST_RANGES).enumerate() {
            let space = if index > 0 { " " } else { "" };
            match range {
                [one] => write!(f, "{space}{one:?}")?,
                [one, two] => write!(f, "{space}{one:?} {two:?}")?,
                [first, .., last] => write!(f, "{space}{first:?}-{last:?}")?,
                [] => {}
            }
        }
        if ranges.len() > MOST_RANGES {
            write!(f, " and others, {} in all", self.len())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::job::JobFile;

    #[test]
    fn a_text_comes_back_from_its_tokens() {
        let vocabulary = Vocabulary::new("\n aeïx".chars());
        assert_eq!(vocabulary.tokens("it", "ïa\nx").unwrap(), [4, 2, 0, 5]);
        assert_eq!(vocabulary.text(&[4, 2, 0, 5]), "ïa\nx");
        assert_eq!(vocabulary.text(&[4, 6, 2]), "ïa", "there is no token 6");
    }

    #[test]
    fn padding_is_no_part_of_a_text() {
        let mut text = JobFile::resolve("char-lstm", None, &[]).unwrap().job.text;
        let of_job = |text: &TextSpec| Vocabulary::of_job(text, "\0\nab".chars()).text(&[0, 2, 0, 3]);
        assert_eq!(of_job(&text), "\0a\0b");
        text.pad = Pad::Pre;
        assert_eq!(of_job(&text), "ab");
    }

    #[test]
    fn an_unknown_character_is_named_with_those_that_are_known() {
        let problem = Vocabulary::new("\n abcxyé".chars()).tokens("the prime", "aQ").unwrap_err();
        assert_eq!(problem.sentence, "the prime has 'Q', which the network has never seen");
        assert_eq!(problem.hint.unwrap(), r"it knows '\n' ' ' 'a'-'c' 'x' 'y' 'é'");
        let scattered = Vocabulary::new((0..100).map(|i| char::from_u32(0x4e00 + 2 * i).unwrap()));
        assert!(scattered.to_string().ends_with(" and others, 100 in all"));
    }

    #[test]
    fn a_text_starts_with_a_new_line_where_there_is_one() {
        assert_eq!(Vocabulary::new("\t\na".chars()).default_prime(), [1]);
        assert_eq!(Vocabulary::new("ab".chars()).default_prime(), [0]);
    }

    #[test]
    fn what_only_one_side_has_is_told() {
        let (a, b) = (Vocabulary::new("abcd".chars()), Vocabulary::new("bdx".chars()));
        assert_eq!((a.without(&b).to_string(), b.without(&a).to_string()), ("'a' 'c'".into(), "'x'".into()));
        assert!(a.without(&a).is_empty());
    }
}
