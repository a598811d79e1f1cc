//! From bytes to characters, and from characters to tokens.

use protocol::job::Pad;
use protocol::problem::Problem;

use super::vocabulary::PADDING;

/// A token is a u16; one value stays free.
pub(super) const MOST_DISTINCT: usize = 65_535;

/// The characters of a data set, ascending: a character's token is its place among them.
pub(super) struct Tokenizer {
    vocabulary: Vec<char>,
    /// By code point; of a character that the data lack, 0.
    token_of: Vec<u16>,
}

impl Tokenizer {
    /// Of the distinct ones among these characters of the data that people know as `name`.
    ///
    /// # Errors
    /// They are too many.
    pub(super) fn new(name: &str, characters: impl Iterator<Item = char>) -> Result<Self, Problem> {
        let mut seen = vec![false; char::MAX as usize + 1];
        for character in characters {
            seen[character as usize] = true;
        }
        let vocabulary: Vec<char> =
            ('\0'..=char::MAX).filter(|&character| seen[character as usize]).collect();
        if vocabulary.len() > MOST_DISTINCT {
            return Err(Problem::usage(format!(
                "{name} holds {} distinct characters, the most supported is {MOST_DISTINCT}",
                vocabulary.len()
            )));
        }
        let mut token_of = vec![0; seen.len()];
        for (token, &character) in vocabulary.iter().enumerate() {
            token_of[character as usize] = token as u16;
        }
        Ok(Self { vocabulary, token_of })
    }

    /// Of the distinct ones among the characters of lines, of one more, and of padding if there is any in front.
    ///
    /// # Errors
    /// They are too many, or padding is one of the lines' own characters.
    pub(super) fn of_lines<'a>(
        name: &str,
        lines: impl Iterator<Item = &'a str> + Clone,
        besides: Option<char>,
        pad: Pad,
    ) -> Result<Self, Problem> {
        let padding = (pad == Pad::Pre).then_some(PADDING);
        if padding.is_some_and(|padding| lines.clone().any(|line| line.contains(padding))) {
            return Err(Problem::usage(format!(
                "{name} has {PADDING:?}, the character that lines are padded with"
            ))
            .hint("leave out text.pad, or take the character out of the text"));
        }
        Self::new(name, lines.flat_map(str::chars).chain(besides).chain(padding))
    }

    /// The characters in the order of their tokens.
    pub(super) fn vocabulary(&self) -> &[char] {
        &self.vocabulary
    }

    /// The token of a character, `None` if the data lack it.
    pub(super) fn token(&self, character: char) -> Option<u16> {
        let token = self.token_of[character as usize];
        (self.vocabulary.get(usize::from(token)) == Some(&character)).then_some(token)
    }

    /// The tokens of a text of the data's characters.
    pub(super) fn tokens<'a>(&'a self, text: &'a str) -> impl Iterator<Item = u16> + 'a {
        text.chars().map(|character| self.token_of[character as usize])
    }
}

/// The text of the data that people know as `name`, without the byte order mark that some editors write first.
///
/// # Errors
/// It is not UTF-8.
pub(super) fn decode<'a>(name: &str, bytes: &'a [u8]) -> Result<&'a str, Problem> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let offset = error.valid_up_to();
        Problem::usage(format!("{name} is not UTF-8: byte {:#04x} at offset {offset}", bytes[offset]))
            .hint("convert the text to UTF-8")
    })?;
    Ok(text.strip_prefix('\u{feff}').unwrap_or(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_places_in_the_vocabulary() {
        let tokenizer = Tokenizer::new("it", "zebra äöü".chars()).unwrap();
        assert_eq!(tokenizer.vocabulary().iter().collect::<String>(), " aberzäöü");
        assert_eq!(tokenizer.tokens("aü z").collect::<Vec<_>>(), [1, 8, 0, 5]);
        assert_eq!([' ', 'ü', 'c'].map(|character| tokenizer.token(character)), [Some(0), Some(8), None]);
    }

    #[test]
    fn what_is_not_utf8_is_named_by_its_place() {
        let problem = decode("x.txt", b"na\xc3\xafve \xff text").unwrap_err();
        assert_eq!(problem.sentence, "x.txt is not UTF-8: byte 0xff at offset 7");
    }
}
