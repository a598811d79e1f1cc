//! Bytes as hexadecimal digits, and the SHA-256 of bytes as such.

use std::fmt::Write;

use sha2::{Digest, Sha256};

/// SHA-256 of the parts one after another, in 64 lower-case hexadecimal digits.
pub(crate) fn sha256_hex<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update(part);
    }
    hex(&hasher.finalize())
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a string takes any text");
        text
    })
}

/// The inverse of [`hex`] for exactly `N` bytes.
pub(crate) fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let digit = |place: usize| char::from(digits[place]).to_digit(16).map(|value| value as u8);
    let mut bytes = [0; N];
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = 16 * digit(2 * index)? + digit(2 * index + 1)?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_that_of_the_standard() {
        // FIPS 180-2, appendix B.1
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256_hex([&b"a"[..], b"bc"]), abc);
    }

    #[test]
    fn hexadecimal_digits_come_back() {
        assert_eq!(unhex(&hex(&[0x00, 0xab, 0xff])), Some([0x00, 0xab, 0xff]));
        for bad in ["00abf", "00abfg", "00abff0", "", "äab"] {
            assert_eq!(unhex::<3>(bad), None, "{bad}");
        }
    }
}
