//! What every refused command has in common: an exit code, a sentence, a hint, and nothing else changed.

use super::process::Ended;

impl Ended {
    /// Checks the exit code, that the sentence of the failure has this part, and the hint this one (none if it is
    /// empty), and that nobody was shown a bug.
    #[track_caller]
    pub(crate) fn expect_refusal(&self, code: i32, sentence: &str, hint: &str) {
        self.expect_exit(code);
        self.expect_no_panic();
        let line = |start: &str| self.stderr.lines().find(|line| line.starts_with(start)).unwrap_or_default();
        assert!(
            line("error: ").contains(sentence) && !sentence.is_empty(),
            "no sentence with '{sentence}':\n{}",
            self.stderr
        );
        assert!(line("hint: ").contains(hint), "no hint with '{hint}':\n{}", self.stderr);
        assert_eq!(line("hint: ").is_empty(), hint.is_empty(), "a hint nobody expects:\n{}", self.stderr);
    }

    /// Checks that no process has shown a bug.
    #[track_caller]
    pub(crate) fn expect_no_panic(&self) {
        let output = format!("{}{}", self.stdout, self.stderr);
        for sign in ["panicked", "RUST_BACKTRACE", "src/"] {
            assert!(!output.contains(sign), "a bug was shown:\n{output}");
        }
    }
}
