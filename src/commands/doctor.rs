//! `lockstep doctor`: what a run would find on this machine, and what is in its way.

mod gpu;
mod machine;
mod places;

use clap::Args;
use protocol::problem::{Exit, Problem};
use serde_json::{Value, json};

use super::print;
use crate::args::BUILD;

#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// As one JSON object
    #[arg(long)]
    json: bool,
}

/// What one look has shown.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Check {
    name: &'static str,
    finding: Finding,
    text: String,
    /// What can be done about it.
    hint: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Finding {
    /// Nothing to say but what it is.
    Ok,
    /// Training works, but less well or not with everything.
    Note,
    /// Training does not work here.
    Problem,
}

impl Check {
    fn new(name: &'static str, finding: Finding, text: impl Into<String>) -> Self {
        Self { name, finding, text: text.into(), hint: None }
    }

    fn ok(name: &'static str, text: impl Into<String>) -> Self {
        Self::new(name, Finding::Ok, text)
    }

    fn note(name: &'static str, text: impl Into<String>) -> Self {
        Self::new(name, Finding::Note, text)
    }

    fn problem(name: &'static str, text: impl Into<String>) -> Self {
        Self::new(name, Finding::Problem, text)
    }

    fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl Finding {
    fn word(self) -> &'static str {
        match self {
            Finding::Ok => "ok",
            Finding::Note => "note",
            Finding::Problem => "problem",
        }
    }
}

pub(crate) fn run(args: &DoctorArgs) -> Result<Exit, Problem> {
    let mut checks = vec![Check::ok("version", BUILD)];
    checks.extend(machine::checks());
    checks.extend(places::checks());
    checks.extend(gpu::checks());
    print(&if args.json { format!("{}\n", as_json(&checks)) } else { as_lines(&checks) })?;
    Ok(if is_usable(&checks) { Exit::Done } else { Exit::Failed })
}

fn is_usable(checks: &[Check]) -> bool {
    checks.iter().all(|check| check.finding != Finding::Problem)
}

/// A line per check, a line more per hint, and the conclusion.
fn as_lines(checks: &[Check]) -> String {
    let width = checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
    let mut lines = String::new();
    for Check { name, finding, text, hint } in checks {
        lines += &format!("{:<7}  {name:<width$}  {text}\n", finding.word());
        if let Some(hint) = hint {
            lines += &format!("{:7}  {:width$}  hint: {hint}\n", "", "");
        }
    }
    lines + if is_usable(checks) { "lockstep can train here\n" } else { "lockstep cannot train here\n" }
}

fn as_json(checks: &[Check]) -> Value {
    let checks: Vec<Value> = checks
        .iter()
        .map(|Check { name, finding, text, hint }| {
            json!({"name": name, "finding": finding.word(), "text": text, "hint": hint})
        })
        .collect();
    json!({"version": BUILD, "usable": checks.iter().all(|check| check["finding"] != "problem"), "checks": checks})
}

/// Bytes for people: `7.6 GiB`.
fn bytes(count: u64) -> String {
    let (mut size, mut unit) = (count as f64, "bytes");
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if size < 1024.0 {
            break;
        }
        (size, unit) = (size / 1024.0, next);
    }
    if unit == "bytes" { format!("{count} bytes") } else { format!("{size:.1} {unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some() -> Vec<Check> {
        vec![Check::ok("cpu", "fast"), Check::note("memory", "little").hint("buy some")]
    }

    #[test]
    fn a_check_is_a_line_and_its_hint_another() {
        assert_eq!(
            as_lines(&some()),
            "ok       cpu     fast\n\
             note     memory  little\n\
             \x20                hint: buy some\n\
             lockstep can train here\n"
        );
    }

    #[test]
    fn only_a_problem_makes_the_machine_unusable() {
        assert!(is_usable(&some()) && as_json(&some())["usable"] == true);
        let mut checks = some();
        checks.push(Check::problem("ports", "none"));
        assert!(!is_usable(&checks) && as_json(&checks)["usable"] == false);
        assert!(as_lines(&checks).ends_with("\nlockstep cannot train here\n"));
    }

    #[test]
    fn sizes_read_well() {
        let cases = [
            (0, "0 bytes"),
            (1023, "1023 bytes"),
            (1536, "1.5 KiB"),
            (8 << 30, "8.0 GiB"),
            (u64::MAX, "16777216.0 TiB"),
        ];
        for (count, text) in cases {
            assert_eq!(bytes(count), text);
        }
    }
}
