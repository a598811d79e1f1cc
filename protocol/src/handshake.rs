//! The first bytes of every connection: readable by any version, and proof of the run token before anything else
//! is decoded.
//!
//! ```text
//! opener  → magic "LOCKSTEP" | u16 version | u8 plane | 32 bytes nonce
//! answerer→ magic "LOCKSTEP" | u16 version | u8 0 | 32 bytes nonce
//! opener  → HMAC-SHA256(token, "opener"   ‖ both hellos)
//! answerer→ HMAC-SHA256(token, "answerer" ‖ both hellos)
//! ```
//! Integers are little-endian. Each side draws a fresh nonce, so a recorded handshake proves nothing later. This
//! module only makes and checks bytes; whoever owns the socket moves them.

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::message::PROTOCOL_VERSION;
use crate::problem::Problem;

const MAGIC: [u8; 8] = *b"LOCKSTEP";

/// Size of each side's first message.
pub const HELLO_BYTES: usize = 8 + 2 + 1 + 32;

/// Size of each side's proof.
pub const PROOF_BYTES: usize = 32;

/// Fewest characters of a token that protects a port which other machines can reach.
pub const SHORTEST_TOKEN: usize = 16;

/// Size of what TLS answers to a first message that is not TLS: an alert, shorter than a [hello](HELLO_BYTES).
pub const TLS_ALERT_BYTES: usize = 7;

/// Checks the first bytes of the other side, at least two, when it should speak without TLS.
///
/// # Errors
/// They are TLS's own: a record of an alert or of a handshake.
pub fn check_plain(first: &[u8]) -> Result<(), Problem> {
    match first {
        [21 | 22, 3, ..] => {
            Err(Problem::failed("the other side of the connection speaks TLS, this one does not")
                .hint("give every process of the run the same --tls FILE, or none of them"))
        }
        _ => Ok(()),
    }
}

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Plane {
    /// A worker's control connection to the coordinator.
    Control = 1,
    /// A data-plane connection between two workers.
    Data = 2,
}

/// The secret that all processes of a run share; empty when none was given (loopback only).
#[derive(Clone, PartialEq, Eq)]
pub struct Token(Vec<u8>);

impl Token {
    /// The token with this text, as given by the user.
    pub fn new(text: &str) -> Self {
        Self(text.trim().as_bytes().to_vec())
    }

    /// A fresh random token as text: 32 hexadecimal digits.
    ///
    /// # Errors
    /// The operating system has no randomness to give.
    pub fn generate() -> Result<String, getrandom::Error> {
        let mut bytes = [0u8; 16];
        getrandom::fill(&mut bytes)?;
        Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
    }

    /// Whether nobody can guess it: too short a secret is found by trying.
    pub fn is_strong(&self) -> bool {
        String::from_utf8_lossy(&self.0).chars().count() >= SHORTEST_TOKEN
    }

    /// Whether there is no secret.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The token of one generation's data plane: a member of an older one cannot connect.
    pub fn for_generation(&self, generation: u64) -> Self {
        let mut mac = self.mac();
        mac.update(b"generation");
        mac.update(&generation.to_le_bytes());
        Self(mac.finalize().into_bytes().to_vec())
    }

    /// The token as it is proved inside one encrypted channel; `secret` is what only the channel's two ends know. A proof
    /// of it is worth nothing in another channel.
    pub fn for_channel(&self, secret: &[u8; 32]) -> Self {
        let mut mac = self.mac();
        mac.update(b"channel");
        mac.update(secret);
        Self(mac.finalize().into_bytes().to_vec())
    }

    fn mac(&self) -> Hmac<Sha256> {
        Hmac::new_from_slice(&self.0).expect("HMAC takes a key of any length")
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(…)")
    }
}

/// A random number that no other process has.
///
/// # Errors
/// The operating system has no randomness to give.
pub fn incarnation() -> Result<u64, getrandom::Error> {
    let mut bytes = [0u8; 8];
    getrandom::fill(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// Which end of the connection this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Opener,
    Answerer,
}

/// One side of a handshake under way.
#[derive(Debug)]
pub struct Handshake {
    side: Side,
    plane: Plane,
    token: Token,
    hello: [u8; HELLO_BYTES],
}

impl Handshake {
    /// The side that opened the connection.
    ///
    /// # Errors
    /// The operating system has no randomness to give.
    pub fn opener(plane: Plane, token: &Token) -> Result<Self, getrandom::Error> {
        let mut nonce = [0; 32];
        getrandom::fill(&mut nonce)?;
        Ok(Self::with_nonce(Side::Opener, plane, token, nonce))
    }

    /// The side that accepted the connection.
    ///
    /// # Errors
    /// The operating system has no randomness to give.
    pub fn answerer(plane: Plane, token: &Token) -> Result<Self, getrandom::Error> {
        let mut nonce = [0; 32];
        getrandom::fill(&mut nonce)?;
        Ok(Self::with_nonce(Side::Answerer, plane, token, nonce))
    }

    fn with_nonce(side: Side, plane: Plane, token: &Token, nonce: [u8; 32]) -> Self {
        let mut hello = [0; HELLO_BYTES];
        hello[..8].copy_from_slice(&MAGIC);
        hello[8..10].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
        hello[10] = if side == Side::Opener { plane as u8 } else { 0 };
        hello[11..].copy_from_slice(&nonce);
        Self { side, plane, token: token.clone(), hello }
    }

    /// This side's first message.
    pub fn hello(&self) -> [u8; HELLO_BYTES] {
        self.hello
    }

    /// Takes the other side's first message; gives this side's proof and what the other's must be.
    ///
    /// # Errors
    /// The other side is not Lockstep, speaks another version, or wants another kind of connection.
    pub fn proofs(&self, theirs: &[u8; HELLO_BYTES]) -> Result<Proofs, Problem> {
        check_plain(theirs)?;
        if theirs[..8] != MAGIC {
            return Err(Problem::failed("the other side of the connection is not Lockstep")
                .hint("check the host and the port"));
        }
        let version = u16::from_le_bytes([theirs[8], theirs[9]]);
        if version != PROTOCOL_VERSION {
            return Err(Problem::failed(format!(
                "the other side speaks protocol {version}, this one {PROTOCOL_VERSION}"
            ))
            .hint("build both from one commit"));
        }
        if self.side == Side::Answerer && theirs[10] != self.plane as u8 {
            return Err(Problem::failed(format!(
                "a connection for plane {} came to the port for plane {}",
                theirs[10], self.plane as u8
            ))
            .hint("workers connect to the coordinator's control port"));
        }
        let (first, second) = match self.side {
            Side::Opener => (&self.hello, theirs),
            Side::Answerer => (theirs, &self.hello),
        };
        let proof = |label: &[u8]| {
            let mut mac = self.token.mac();
            mac.update(label);
            mac.update(first);
            mac.update(second);
            mac.finalize().into_bytes().into()
        };
        let (opener, answerer) = (proof(b"opener"), proof(b"answerer"));
        Ok(match self.side {
            Side::Opener => Proofs { ours: opener, theirs: answerer },
            Side::Answerer => Proofs { ours: answerer, theirs: opener },
        })
    }
}

/// The two proofs of a handshake.
#[derive(Debug)]
pub struct Proofs {
    /// To be sent. The opener sends first; the answerer only after it has checked.
    pub ours: [u8; PROOF_BYTES],
    theirs: [u8; PROOF_BYTES],
}

impl Proofs {
    /// Checks the other side's proof in constant time.
    ///
    /// # Errors
    /// The other side has another token.
    pub fn check(&self, received: &[u8; PROOF_BYTES]) -> Result<(), Problem> {
        if bool::from(subtle::ConstantTimeEq::ct_eq(&self.theirs[..], &received[..])) {
            return Ok(());
        }
        Err(Problem::failed("the other side of the connection has another run token")
            .hint("give every process of the run the same token in LOCKSTEP_TOKEN or with --token-file"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(opener: &str, answerer: &str) -> (Handshake, Handshake) {
        (
            Handshake::with_nonce(Side::Opener, Plane::Control, &Token::new(opener), [1; 32]),
            Handshake::with_nonce(Side::Answerer, Plane::Control, &Token::new(answerer), [2; 32]),
        )
    }

    /// Both proofs for the token `secret` and these two hellos, and the token of generation 7, computed with Python's
    /// hmac module.
    const GOLDEN_OPENER: &str = "9e08e9bd88418a096fcb722dfd35be48185119d3649f5e715039579ee5a0f444";
    const GOLDEN_ANSWERER: &str = "180883238c7a5d7578632d418c6008f1ffde0324d8094910f3bdfbb6043f4327";
    const GOLDEN_GENERATION: &str = "6f96fe5ad12d7f50eba4cd03b3d0cfdd8eaa3df43eda2e0d96644edee06ac444";

    #[test]
    fn the_first_bytes_and_the_proofs_are_those_of_the_version() {
        let (opener, answerer) = pair("secret", "secret");
        assert_eq!(opener.hello(), *[&b"LOCKSTEP\x06\x00\x01"[..], &[1; 32]].concat());
        assert_eq!(answerer.hello(), *[&b"LOCKSTEP\x06\x00\x00"[..], &[2; 32]].concat());
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let proofs = opener.proofs(&answerer.hello()).unwrap();
        assert_eq!([hex(&proofs.ours), hex(&proofs.theirs)], [GOLDEN_OPENER, GOLDEN_ANSWERER]);
        let proofs = answerer.proofs(&opener.hello()).unwrap();
        assert_eq!([hex(&proofs.theirs), hex(&proofs.ours)], [GOLDEN_OPENER, GOLDEN_ANSWERER]);
        assert_eq!(hex(&Token::new("secret").for_generation(7).0), GOLDEN_GENERATION);
    }

    #[test]
    fn equal_tokens_agree_and_others_do_not() {
        let (opener, answerer) = pair("secret", "secret\n");
        let (a, b) = (opener.proofs(&answerer.hello()).unwrap(), answerer.proofs(&opener.hello()).unwrap());
        assert!(a.check(&b.ours).is_ok() && b.check(&a.ours).is_ok());
        assert!(a.check(&a.ours).is_err(), "a reflected proof");

        let (opener, answerer) = pair("secret", "other");
        let (a, b) = (opener.proofs(&answerer.hello()).unwrap(), answerer.proofs(&opener.hello()).unwrap());
        assert!(a.check(&b.ours).is_err() && b.check(&a.ours).is_err());
    }

    #[test]
    fn other_versions_and_programs_are_named() {
        let (opener, answerer) = pair("", "");
        let mut hello = answerer.hello();
        hello[8] = 9;
        assert_eq!(
            opener.proofs(&hello).unwrap_err().sentence,
            "the other side speaks protocol 9, this one 6"
        );
        let mut hello = answerer.hello();
        hello[0] = b'H';
        assert!(opener.proofs(&hello).unwrap_err().sentence.contains("not Lockstep"));
        let mut hello = opener.hello();
        hello[10] = Plane::Data as u8;
        assert!(answerer.proofs(&hello).is_err());
    }

    #[test]
    fn tls_is_named_where_it_is_not_expected() {
        let (_, answerer) = pair("", "");
        let mut client_hello = [0; HELLO_BYTES];
        client_hello[..3].copy_from_slice(&[22, 3, 1]);
        let problem = answerer.proofs(&client_hello).unwrap_err();
        assert_eq!(problem.sentence, "the other side of the connection speaks TLS, this one does not");
        assert!(check_plain(&[21, 3, 3, 0, 2, 2, 50]).is_err());
        assert!(check_plain(&answerer.hello()).is_ok());
    }

    #[test]
    fn a_short_token_is_weak() {
        for (text, is_strong) in
            [("", false), ("fifteen letters", false), ("ßßßßßßßß", false), ("sixteen letters!", true)]
        {
            assert_eq!(Token::new(text).is_strong(), is_strong, "{text}");
        }
        assert!(Token::new(&Token::generate().unwrap()).is_strong());
    }

    #[test]
    fn each_generation_has_its_own_token() {
        let token = Token::new("secret");
        assert_ne!(token.for_generation(1), token.for_generation(2));
        assert_ne!(token.for_generation(1), token);
    }

    #[test]
    fn each_channel_has_its_own_token() {
        let token = Token::new("secret");
        assert_eq!(token.for_channel(&[1; 32]), token.for_channel(&[1; 32]));
        assert_ne!(token.for_channel(&[1; 32]), token.for_channel(&[2; 32]));
        assert_ne!(token.for_channel(&[1; 32]), token);
    }
}
