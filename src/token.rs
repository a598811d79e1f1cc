//! The run token: from a file that nobody else can read, or from the environment.

use std::env::VarError;
use std::path::{Path, PathBuf};

use clap::Args;
use protocol::handshake::Token;
use protocol::problem::Problem;

use crate::commands::note;
use crate::secret::{self, Kind};

const FILE: Kind = Kind {
    name: "token file",
    content: "token",
    hint: "a coordinator makes a token file that does not exist",
    limit_bytes: 4096,
};

/// Where the run token comes from.
#[derive(Debug, Args)]
pub(crate) struct TokenArgs {
    /// File with the run token, instead of LOCKSTEP_TOKEN; a coordinator makes one that does not exist
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

impl TokenArgs {
    /// The token of a process that only reads it; empty when there is none.
    pub(crate) fn read(&self) -> Result<Token, Problem> {
        match &self.token_file {
            Some(path) => read(path),
            None => match std::env::var("LOCKSTEP_TOKEN") {
                Err(VarError::NotUnicode(_)) => Err(Problem::usage("LOCKSTEP_TOKEN is not UTF-8")),
                text => Ok(Token::new(&text.unwrap_or_default())),
            },
        }
    }

    /// The same for a coordinator: a token file that does not exist is made.
    pub(crate) fn read_or_make(&self) -> Result<Token, Problem> {
        if let Some(path) = &self.token_file
            && make(path)?
        {
            note(&format!("made a run token: give every worker --token-file {}", path.display()));
        }
        self.read()
    }
}

/// Reads a token file.
fn read(path: &Path) -> Result<Token, Problem> {
    let token = Token::new(&secret::read(path, FILE)?);
    if token.is_empty() {
        let shown = path.display();
        return Err(Problem::usage(format!("the token file {shown} is empty"))
            .hint(format!("delete it: `lockstep coordinator --token-file {shown}` makes a new one")));
    }
    Ok(token)
}

/// Makes a token file unless there is something at `path`; says whether it did.
fn make(path: &Path) -> Result<bool, Problem> {
    let token = Token::generate()
        .map_err(|error| Problem::failed(format!("the system has no randomness for a token: {error}")))?;
    secret::make(path, &format!("{token}\n"), FILE, "--token-file")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    fn args(path: &Path) -> TokenArgs {
        TokenArgs { token_file: Some(path.to_owned()) }
    }

    #[test]
    fn a_file_that_does_not_exist_is_made_for_its_owner_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        assert!(args(&path).read().is_err(), "a worker makes no token");
        let made = args(&path).read_or_make().unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_to_string(&path).unwrap().trim().len(), 32);
        assert!(args(&path).read_or_make().unwrap() == made && args(&path).read().unwrap() == made);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "a temporary file is left");
    }

    #[test]
    fn of_many_makers_at_once_one_wins_and_all_read_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        let tokens: Vec<Token> = std::thread::scope(|scope| {
            let makers: Vec<_> =
                (0..8).map(|_| scope.spawn(|| args(&path).read_or_make().unwrap())).collect();
            makers.into_iter().map(|maker| maker.join().unwrap()).collect()
        });
        assert!(tokens.iter().all(|token| *token == args(&path).read().unwrap()));
    }

    #[test]
    fn a_file_that_others_can_open_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        fs::write(&path, "0123456789abcdef").unwrap();
        for mode in [0o644, 0o640, 0o604, 0o620, 0o660] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let problem = args(&path).read_or_make().unwrap_err();
            let expected = format!(
                "the token file {} is open to others than its owner (mode {mode:04o})",
                path.display()
            );
            assert_eq!(problem.sentence, expected);
            assert_eq!(problem.hint.unwrap(), format!("chmod 600 {}", path.display()));
        }
        for mode in [0o600, 0o400] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            args(&path).read().unwrap();
        }
    }

    #[test]
    fn what_is_no_token_is_refused_in_a_sentence() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        for (content, part) in
            [(&b" \n"[..], "is empty"), (&[0xff; 9], "holds no token"), (&[b'x'; 5000], "holds no token")]
        {
            fs::write(&path, content).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            let problem = args(&path).read().unwrap_err();
            assert!(problem.sentence.contains(part), "{problem}");
        }
        for odd in [dir.path(), Path::new("/"), &dir.path().join("no/such/folder"), &path.join("below")] {
            let problem = args(odd).read_or_make().unwrap_err();
            assert!(problem.sentence.contains("the token file"), "{problem}");
        }
        assert!(args(Path::new("/dev/zero")).read().unwrap_err().sentence.contains("the token file"));
    }
}
