//! Names the revision that is compiled, and how: `LOCKSTEP_REVISION` and `LOCKSTEP_FEATURES` for `src/args.rs`.

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let here = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let revision = revision(&here).unwrap_or_else(|| "unknown".to_owned());
    println!("cargo:rustc-env=LOCKSTEP_REVISION={revision}");
    println!("cargo:rustc-env=LOCKSTEP_FEATURES={}", features().join(" "));
}

/// The commit that is checked out, if this is a checkout: a copy without its history that lies in somebody else's
/// repository has none.
fn revision(here: &Path) -> Option<String> {
    let top = PathBuf::from(git(here, &["rev-parse", "--show-toplevel"])?);
    if top.canonicalize().ok()? != here.canonicalize().ok()? {
        return None;
    }
    // HEAD says which branch, the branch's file and the log of HEAD which commit. In a worktree these lie elsewhere.
    let branch = git(here, &["symbolic-ref", "--quiet", "HEAD"]);
    for name in ["HEAD".to_owned(), "logs/HEAD".to_owned()].into_iter().chain(branch) {
        let path = git(here, &["rev-parse", "--git-path", &name]).map(|path| here.join(path));
        // A file that is not there would count as changed each time.
        if let Some(path) = path.filter(|path| path.exists()) {
            println!("cargo:rerun-if-changed={}", path.display());
        }
    }
    git(here, &["rev-parse", "--short=12", "HEAD"])
}

/// What git prints; nothing if there is no git or it fails.
fn git(here: &Path, arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").arg("-C").arg(here).args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    (output.status.success() && !text.trim().is_empty()).then(|| text.trim().to_owned())
}

/// Every build computes on the CPU; more by the package's features.
fn features() -> Vec<String> {
    let variables = std::env::vars().filter_map(|(name, _)| {
        Some(name.strip_prefix("CARGO_FEATURE_")?.to_ascii_lowercase().replace('_', "-"))
    });
    let mut more: Vec<String> = variables.filter(|name| name != "default" && name != "cpu").collect();
    more.sort();
    std::iter::once("cpu".to_owned()).chain(more).collect()
}
