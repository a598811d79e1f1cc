//! The embedded fields: labelled lines written when they are opened, so that the task `classify` needs no file.
//!
//! Each line is a short field as forms and logs have them, labelled with its kind. A kind has a few forms; a form is a
//! text with places in braces that are filled at random. Forms of different kinds look alike in part, and in some
//! lines a character is missing or doubled. The numbers come from counter-based streams and from integer arithmetic:
//! every machine writes the same text.

use protocol::random::{Purpose, Stream};

/// Counts the changes of the text: a run on embedded data is only repeatable while it stays.
pub(super) const EMBEDDED_FIELDS_VERSION: u32 = 1;

/// sha256 of the text.
pub(super) const EMBEDDED_FIELDS_SHA256: &str =
    "501260a424773097f77ba3c16c2c605f747ffa4880a53ee25eec52f4449a1e98";

pub(super) const LINES: u32 = 6000;

/// The fields do not depend on a job's seed.
const SEED: u64 = 0x6669_656c_6473;

/// In one of so many lines a character is missing, in as many one is doubled.
const NOISE: u32 = 20;

/// A kind of field: its label and its forms.
type Kind = (&'static str, &'static [&'static str]);

/// The kinds. In braces: `{LOW-HIGH}`, a number, with leading zeros where LOW has them; `{A|B}`, one of these; or one of
/// [`Place`]'s words.
#[rustfmt::skip]
pub(super) const KINDS: [Kind; 10] = [
    ("date", &["{1-31}.{1-12}.{1950-2029}", "{1950-2029}-{01-12}-{01-31}", "{01-12}/{01-31}/{00-99}", "{1-31} {month} {1950-2029}",
               "{month} {1-31}, {1950-2029}", "{month} {1950-2029}", "{1-31}.{1-12}.{00-29}"]),
    ("time", &["{0-23}:{00-59}", "{00-23}:{00-59}:{00-59}", "{1-12}:{00-59} {am|pm}", "{00-23}:{00-59}:{00-59}.{000-999}", "{1-12} {am|pm}",
               "{0-23}h{00-59}", "{0-23}.{00-59}"]),
    ("email", &["{word}@{host}", "{word}.{word}@{host}", "{word}{0-99}@{host}", "{first}.{word}@{word}.{host}", "{word}+{word}@{host}"]),
    ("url", &["{http|https}://{host}", "{http|https}://{word}.{host}/{word}", "www.{host}", "www.{host}/{word}/{word}.html",
              "{host}/{word}", "https://{host}/{word}?{word}={0-999}", "http://{0-255}.{0-255}.{0-255}.{0-255}:{80-9999}/"]),
    ("address", &["{0-255}.{0-255}.{0-255}.{0-255}", "{10.0|127.0|192.168}.{0-255}.{0-255}:{80-9999}", "10.{0-255}.{0-255}.0/{8-30}",
                  "fe80::{hex}:{hex}:{hex}", "2001:{hex}:{hex}::{hex}"]),
    ("price", &["${1-999}.{00-99}", "{1-999},{00-99} €", "{1-999} {EUR|USD|GBP}", "${1-99},{000-999}.{00-99}", "{1-9}.{000-999},{00-99} EUR",
                "£{1-99}.{00-99}", "{1-99}.{00-99}"]),
    ("version", &["{0-20}.{0-30}.{0-99}", "{|v}{0-20}.{0-30}", "v{0-9}.{0-30}.{0-99}", "{0-9}.{0-9}.{0-9}-{alpha|beta|rc}{1-9}",
                  "{1-9}.{0-99}.{0-999}.{0-9999}", "{word}-{0-9}.{0-30}.{0-9}"]),
    ("phone", &["+{1-99} {100-999} {1000000-9999999}", "({100-999}) {100-999}-{0000-9999}", "{100-999}-{100-999}-{0000-9999}",
                "0{10-999}/{10000-999999}", "{100-999}.{100-999}.{0000-9999}", "+{1-99}{1000000000-1999999999}", "0{100-999} {100000-999999}"]),
    ("path", &["/{word}/{word}", "/{usr|var|home|etc}/{word}/{word}.{ext}", "./{word}.{ext}", "~/{word}/{word}.{ext}", "{word}/{word}.{ext}",
               "C:\\{Word}\\{word}.{ext}", "../{word}/{word}-{0-9}.{0-9}.{ext}"]),
    ("name", &["{First} {Word}", "{Word}, {First}", "{Dr.|Mr.|Ms.} {Word}", "{First} {First} {Word}", "{first} {word}", "{First} {Word}-{Word}",
               "{First}"]),
];

const MONTHS: [&str; 15] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
    "Jan",
    "Sep",
    "Dec",
];
const FIRST_NAMES: [&str; 24] = [
    "ada",
    "alan",
    "barbara",
    "carl",
    "dorothy",
    "edsger",
    "emmy",
    "frances",
    "grace",
    "hedy",
    "ida",
    "john",
    "katherine",
    "leonhard",
    "mary",
    "niklaus",
    "olga",
    "paul",
    "rosa",
    "sofia",
    "tim",
    "ursula",
    "viktor",
    "wanda",
];
const ENDS_OF_HOSTS: [&str; 7] = ["com", "org", "net", "de", "io", "co.uk", "example"];
const ENDS_OF_FILES: [&str; 9] = ["txt", "log", "rs", "html", "tar.gz", "jpg", "conf", "dat", "py"];
const ONSETS: [&str; 20] =
    ["b", "c", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "st", "br", "gr"];
const VOWELS: [&str; 7] = ["a", "e", "i", "o", "u", "ai", "ou"];
const CODAS: [&str; 8] = ["", "", "", "n", "r", "l", "s", "t"];

/// The whole text: lines of a label, a tab and a field.
pub(super) fn text() -> String {
    let mut text = String::new();
    for line in 0..LINES {
        let mut random = Stream::new(SEED, Purpose::Fields, [line, 0]);
        let (label, forms) = one_of(&KINDS, &mut random);
        let field = filled(one_of(forms, &mut random), &mut random);
        let field = noisy(&field, &mut random);
        text.extend([label, "\t", &field, "\n"]);
    }
    text
}

fn one_of<T: Copy>(choices: &[T], random: &mut Stream) -> T {
    choices[random.below(choices.len() as u32) as usize]
}

/// A form with all its places filled.
fn filled(form: &str, random: &mut Stream) -> String {
    let mut field = String::new();
    let mut rest = form;
    while let Some((before, after)) = rest.split_once('{') {
        let (place, after) = after.split_once('}').expect("every place ends");
        field += before;
        field += &filling(place, random);
        rest = after;
    }
    field + rest
}

/// What fills a place.
fn filling(place: &str, random: &mut Stream) -> String {
    match place {
        "word" => word(random),
        "Word" => capitalised(&word(random)),
        "first" => one_of(&FIRST_NAMES, random).to_owned(),
        "First" => capitalised(one_of(&FIRST_NAMES, random)),
        "month" => one_of(&MONTHS, random).to_owned(),
        "host" => word(random) + "." + one_of(&ENDS_OF_HOSTS, random),
        "ext" => one_of(&ENDS_OF_FILES, random).to_owned(),
        "hex" => format!("{:x}", random.below(1 << 16)),
        _ if place.contains('|') => {
            let choices: Vec<&str> = place.split('|').collect();
            one_of(&choices, random).to_owned()
        }
        _ => {
            let (low, high) = place.split_once('-').expect("a place is a word, a choice or a range");
            let [first, last] = [low, high].map(|bound| bound.parse::<u32>().expect("a range has numbers"));
            let number = first + random.below(last - first + 1);
            format!("{number:0width$}", width = low.len())
        }
    }
}

/// One to three syllables.
fn word(random: &mut Stream) -> String {
    let mut word = String::new();
    for _ in 0..1 + random.below(3) {
        word.extend([one_of(&ONSETS, random), one_of(&VOWELS, random)]);
    }
    word + one_of(&CODAS, random)
}

fn capitalised(word: &str) -> String {
    word[..1].to_uppercase() + &word[1..]
}

/// The field, in some lines without one of its characters or with one twice.
fn noisy(field: &str, random: &mut Stream) -> String {
    let times = match random.below(NOISE) {
        0 => 0,
        1 => 2,
        _ => return field.to_owned(),
    };
    let place = random.below(field.chars().count() as u32) as usize;
    let repeated = |(at, character)| std::iter::repeat_n(character, if at == place { times } else { 1 });
    field.chars().enumerate().flat_map(repeated).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn every_kind_is_as_frequent_as_chance_has_it() {
        let text = text();
        assert_eq!(text.lines().count(), LINES as usize);
        let mut counts = BTreeMap::new();
        for line in text.lines() {
            let (label, field) = line.split_once('\t').unwrap();
            *counts.entry(label).or_insert(0) += 1;
            assert!((2..=45).contains(&field.chars().count()), "{line}");
        }
        assert_eq!(counts.len(), KINDS.len());
        // Five standard deviations of a binomial count around 600 are 116.
        assert!(counts.values().all(|count| (484..716).contains(count)), "{counts:?}");
    }

    #[test]
    fn places_are_filled_as_their_words_say() {
        let mut random = Stream::new(1, Purpose::Fields, [0, 0]);
        for _ in 0..200 {
            let number: u32 = filled("{000-105}", &mut random).parse().unwrap();
            assert!(number <= 105);
            assert_eq!(filled("{000-105}", &mut random).len(), 3);
            assert!(["<x>", "<yy>"].contains(&filled("<{x|yy}>", &mut random).as_str()));
        }
        for (_, forms) in KINDS {
            for form in forms {
                let field = filled(form, &mut random);
                assert!(!field.contains(['{', '}']), "{form} became {field}");
            }
        }
    }

    #[test]
    fn noise_takes_or_doubles_one_character() {
        let mut random = Stream::new(1, Purpose::Fields, [0, 0]);
        let mut lengths = [0u32; 3];
        for _ in 0..1000 * NOISE {
            lengths[noisy("äbcd", &mut random).chars().count() - 3] += 1;
        }
        assert!(lengths[0].abs_diff(1000) < 200 && lengths[2].abs_diff(1000) < 200, "{lengths:?}");
    }

    /// The share of lines that a rule gets right which knows the commonest kind for each value of `feature`.
    fn share_told_by<F: Ord>(text: &str, feature: impl Fn(&str) -> F) -> f64 {
        let mut counts: BTreeMap<F, BTreeMap<&str, u32>> = BTreeMap::new();
        for line in text.lines() {
            let (label, field) = line.split_once('\t').unwrap();
            *counts.entry(feature(field)).or_default().entry(label).or_insert(0) += 1;
        }
        let right: u32 = counts.values().map(|kinds| kinds.values().max().unwrap()).sum();
        f64::from(right) / f64::from(LINES)
    }

    #[test]
    fn no_simple_rule_names_the_kind() {
        let text = text();
        let characters = |field: &str| field.chars().collect::<std::collections::BTreeSet<char>>();
        let punctuation = |field: &str| {
            let mut characters = characters(field);
            characters.retain(|character| !character.is_alphanumeric());
            characters
        };
        for (rule, share, most) in [
            ("length", share_told_by(&text, str::len), 0.4),
            ("first character", share_told_by(&text, |field| field.chars().next()), 0.7),
            ("last character", share_told_by(&text, |field| field.chars().next_back()), 0.6),
            ("punctuation", share_told_by(&text, punctuation), 0.95),
        ] {
            println!("told by {rule}: {:.1} %", 100.0 * share);
            assert!(share < most, "{rule}: {share}");
        }
    }
}
