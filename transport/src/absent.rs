//! TLS in a build without it: nothing but the sentence that says so.

use protocol::problem::Problem;

/// What would let a process into the streams of a run. Nobody has one.
#[derive(Debug, Clone)]
pub struct Tls(pub(crate) Nobody);

/// Of this there is nothing; for those outside it is private, lest the compiler takes what they do with a [`Tls`] for a
/// mistake.
#[derive(Debug, Clone)]
pub(crate) enum Nobody {}

impl Tls {
    /// Always refused.
    ///
    /// # Errors
    /// This build has no TLS.
    pub fn from_pem(_: &str, _: &str) -> Result<Self, Problem> {
        Err(not_built())
    }
}

/// Whether this build has TLS: it has not.
///
/// # Errors
/// Always, with what to do about it.
pub fn available() -> Result<(), Problem> {
    Err(not_built())
}

/// Always refused.
///
/// # Errors
/// This build has no TLS.
pub fn new_certificate() -> Result<String, Problem> {
    Err(not_built())
}

fn not_built() -> Problem {
    Problem::usage("this build has no TLS").hint("build it with cargo build --release --features tls")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_would_need_tls_says_how_to_get_it() {
        let problems = [available(), new_certificate().map(drop), Tls::from_pem("", "").map(drop)];
        for problem in problems.map(Result::unwrap_err) {
            assert_eq!(problem.sentence, "this build has no TLS");
            assert_eq!(problem.hint.unwrap(), "build it with cargo build --release --features tls");
        }
    }
}
