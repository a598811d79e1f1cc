//! From defaults, preset, file and settings to one job; and in which keys two jobs differ.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::Serialize;
use toml::{Table, Value};

use crate::problem::{Problem, nearest};

use super::JobFile;

const DEFAULTS: &str = include_str!("../default.toml");
const PRESETS: &str = include_str!("../presets.toml");

/// Names of the presets with a line about each.
pub fn presets() -> Vec<(String, String)> {
    let about = |preset: &Value| preset["about"].as_str().unwrap_or_default().to_owned();
    parse_embedded(PRESETS).iter().map(|(name, preset)| (name.clone(), about(preset))).collect()
}

impl JobFile {
    /// Merges the defaults, the preset, a job file's text and `KEY=VALUE` settings.
    ///
    /// A key of a setting may be bare (`hidden_size`) or carry its section (`job.hidden_size`).
    ///
    /// # Errors
    /// An unknown preset, section or key, a value of the wrong kind or out of range.
    pub fn resolve(preset: &str, file: Option<&str>, settings: &[(String, String)]) -> Result<Self, Problem> {
        let defaults = parse_embedded(DEFAULTS);
        let mut merged = defaults.clone();
        merge(&mut merged, preset_table(preset)?, &format!("preset {preset}"))?;
        if let Some(text) = file {
            let table = text.parse::<Table>().map_err(|error| {
                Problem::usage(format!("the job file is not valid TOML: {}", error.message()))
            })?;
            merge(&mut merged, table, "the job file")?;
        }
        for (key, value) in settings {
            merge(&mut merged, setting(&defaults, key, value)?, &format!("{key}={value}"))?;
        }
        let file: Self = serde_path_to_error::deserialize(merged).map_err(|error| {
            let (key, cause) = (error.path().to_string(), error.into_inner());
            Problem::usage(format!("{key} is not usable: {}", cause.message()))
        })?;
        file.check()?;
        Ok(file)
    }
}

/// A key in which two of one section differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The key.
    pub key: String,
    /// Our value, as TOML.
    pub here: String,
    /// The other one.
    pub there: String,
}

/// `hidden_size: 128 there, 256 here`
impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} there, {} here", self.key, self.there, self.here)
    }
}

/// The keys in which two sections, both `[job]` or both `[run]`, differ.
pub fn differences<S: Serialize>(here: &S, there: &S) -> Vec<Difference> {
    let values = |section: &S| {
        let table = Table::try_from(section).expect("a section of plain values is a TOML table");
        dotted("", &table)
    };
    let (here, there) = (values(here), values(there));
    let shown = |section: &BTreeMap<String, Value>, key: &str| {
        section.get(key).map_or("unset".to_owned(), Value::to_string)
    };
    // A key that is left out where it is empty may be on one side only.
    let keys: BTreeSet<&String> = here.keys().chain(there.keys()).collect();
    keys.into_iter()
        .filter(|key| here.get(*key) != there.get(*key))
        .map(|key| Difference { key: key.clone(), here: shown(&here, key), there: shown(&there, key) })
        .collect()
}

/// The values of a table and the tables in it, by dotted key.
fn dotted(prefix: &str, table: &Table) -> BTreeMap<String, Value> {
    let mut values = BTreeMap::new();
    for (key, value) in table {
        match value {
            Value::Table(table) => values.append(&mut dotted(&format!("{prefix}{key}."), table)),
            value => drop(values.insert(format!("{prefix}{key}"), value.clone())),
        }
    }
    values
}

fn parse_embedded(text: &str) -> Table {
    text.parse().expect("the embedded TOML is valid: a test reads it")
}

fn preset_table(name: &str) -> Result<Table, Problem> {
    let mut presets = parse_embedded(PRESETS);
    let Some(Value::Table(mut preset)) = presets.remove(name) else {
        let known: Vec<&str> = presets.keys().map(String::as_str).collect();
        let meant = nearest(name, known.iter().copied()).map(|n| format!("did you mean '{n}'? "));
        return Err(Problem::usage(format!("unknown preset '{name}'")).hint(format!(
            "{}known presets: {}",
            meant.unwrap_or_default(),
            known.join(", ")
        )));
    };
    preset.remove("about");
    Ok(preset)
}

/// Copies `from` over `into`, whose sections and keys are all that are known.
fn merge(into: &mut Table, from: Table, origin: &str) -> Result<(), Problem> {
    for (section, values) in from {
        let sections: Vec<String> = into.keys().cloned().collect();
        let Some(target) = into.get_mut(&section) else {
            return Err(unknown("section", &section, sections.iter().map(String::as_str), origin));
        };
        merge_value(target, values, &section, origin)?;
    }
    Ok(())
}

/// Replaces one value, or the keys of one table, by `value`; `path` is its dotted key.
fn merge_value(target: &mut Value, value: Value, path: &str, origin: &str) -> Result<(), Problem> {
    match (target, value) {
        (Value::Table(target), Value::Table(values)) => {
            for (key, value) in values {
                let known: Vec<String> = target.keys().cloned().collect();
                let Some(old) = target.get_mut(&key) else {
                    return Err(unknown("key", &key, known.iter().map(String::as_str), origin));
                };
                merge_value(old, value, &format!("{path}.{key}"), origin)?;
            }
        }
        (Value::Table(_), _) => {
            return Err(Problem::usage(format!("{path} in {origin} is a value, it must be a section"))
                .hint(format!("write [{path}] and the keys below it")));
        }
        (target @ Value::Float(_), Value::Integer(number)) => *target = Value::Float(number as f64),
        (target, value) if value.type_str() == target.type_str() => *target = value,
        (target, value) => {
            return Err(Problem::usage(format!(
                "{path} in {origin} is the {} {value}, it must be of type {}",
                value.type_str(),
                target.type_str()
            )));
        }
    }
    Ok(())
}

fn unknown<'a>(kind: &str, name: &str, known: impl Iterator<Item = &'a str>, origin: &str) -> Problem {
    let known: Vec<&str> = known.collect();
    let problem = Problem::usage(format!("unknown {kind} '{name}' in {origin}"));
    match nearest(name, known.iter().copied()) {
        Some(meant) => problem.hint(format!("did you mean '{meant}'?")),
        None => problem.hint(format!("known: {}", known.join(", "))),
    }
}

/// A `KEY=VALUE` setting as a table with one key. The key may leave out the sections it is in. A value that is not
/// TOML is taken as a string.
fn setting(defaults: &Table, key: &str, value: &str) -> Result<Table, Problem> {
    let known = dotted("", defaults);
    let is_meant =
        |path: &&String| *path == key || path.strip_suffix(key).is_some_and(|rest| rest.ends_with('.'));
    let Some(path) = known.keys().find(is_meant) else {
        let segments = key.split('.').count();
        let names = known.keys().map(|path| match path.rmatch_indices('.').nth(segments - 1) {
            Some((dot, _)) => &path[dot + 1..],
            None => path,
        });
        return Err(unknown("key", key, names, &format!("{key}={value}")));
    };
    let parsed = format!("value = {value}")
        .parse::<Table>()
        .ok()
        .and_then(|mut table| table.remove("value"))
        .unwrap_or_else(|| Value::String(value.to_owned()));
    let nested = path
        .rsplit('.')
        .fold(parsed, |value, name| Value::Table(Table::from_iter([(name.to_owned(), value)])));
    let Value::Table(table) = nested else { unreachable!("a path has a name") };
    Ok(table)
}
