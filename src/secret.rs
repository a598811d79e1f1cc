//! Files that only their owner can read: the run token, the run's certificate with its key.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use protocol::handshake::Token;
use protocol::problem::Problem;

/// What such a file is called, and how one comes about.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kind {
    /// As in "the token file".
    pub(crate) name: &'static str,
    /// As in "it holds no token".
    pub(crate) content: &'static str,
    /// What to do without one.
    pub(crate) hint: &'static str,
    /// Nothing longer is one, whatever file was named by mistake.
    pub(crate) limit_bytes: u64,
}

/// Reads a file that only its owner can read.
pub(crate) fn read(path: &Path, kind: Kind) -> Result<String, Problem> {
    let (shown, Kind { name, content, limit_bytes, .. }) = (path.display(), kind);
    let unreadable = |error: io::Error| {
        let problem = Problem::usage(format!("cannot read the {name} {shown}: {error}"));
        if error.kind() == ErrorKind::NotFound { problem.hint(kind.hint) } else { problem }
    };
    let file = File::open(path).map_err(unreadable)?;
    // Of the open file, not of the path: between two looks at a path its file can be another.
    let metadata = file.metadata().map_err(unreadable)?;
    let mode = metadata.permissions().mode() & 0o777;
    if metadata.is_file() && mode & 0o077 != 0 {
        return Err(Problem::usage(format!(
            "the {name} {shown} is open to others than its owner (mode {mode:04o})"
        ))
        .hint(format!("chmod 600 {shown}")));
    }
    let mut bytes = Vec::new();
    file.take(limit_bytes + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    let text = String::from_utf8(bytes).ok().filter(|text| text.len() as u64 <= limit_bytes);
    text.ok_or_else(|| {
        Problem::usage(format!(
            "the {name} {shown} holds no {content}: it is no text of up to {limit_bytes} bytes"
        ))
        .hint(kind.hint)
    })
}

/// Makes such a file unless there is something at `path`; says whether it did. `option` is where another place is named.
///
/// The file gets its name when its content is whole, so that nobody ever reads half of it, and never in place of one
/// that somebody else has just made. Nobody but its owner can read it from its first moment on.
pub(crate) fn make(path: &Path, text: &str, kind: Kind, option: &str) -> Result<bool, Problem> {
    let failed = |error: io::Error| {
        Problem::usage(format!("cannot make the {} {}: {error}", kind.name, path.display()))
            .hint(format!("choose a place that can be written with {option}"))
    };
    if path.symlink_metadata().is_ok() {
        return Ok(false);
    }
    let name = path.file_name().ok_or_else(|| failed(ErrorKind::IsADirectory.into()))?;
    // Two makers, perhaps on two machines with one disk, do not get into each other's way.
    let unique = Token::generate().map_err(|error| failed(io::Error::other(error)))?;
    let temporary = path.with_file_name(format!(".{}.{}.tmp", name.display(), &unique[..8]));
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::hard_link(&temporary, path)
    })();
    let _ = fs::remove_file(&temporary);
    match written {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(failed(error)),
    }
}
