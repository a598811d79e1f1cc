//! A file's bytes, unpacked if they are gzipped, never more than a limit; and their digest.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use flate2::read::MultiGzDecoder;
use protocol::problem::Problem;

use crate::hex::sha256_hex;

/// No data file may unpack to more: a few kilobytes of gzip can otherwise fill any memory.
pub(super) const LIMIT_BYTES: u64 = 1 << 30;

/// How a gzip file begins. No UTF-8 text and no IDX file begins like this.
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// All bytes of a file, unpacked if it is gzipped.
///
/// # Errors
/// The file cannot be read, is damaged gzip, or holds more than `limit` bytes.
pub(super) fn read(path: &Path, limit: u64) -> Result<Vec<u8>, Problem> {
    let shown = path.display().to_string();
    let file = File::open(path).map_err(|error| unreadable(&shown, &error))?;
    unpack(&shown, BufReader::new(file), limit)
}

/// All bytes of `packed`, which people know as `name`, unpacked if they are gzipped.
///
/// # Errors
/// As [`read`].
pub(super) fn unpack(name: &str, mut packed: impl BufRead, limit: u64) -> Result<Vec<u8>, Problem> {
    let mut bytes = Vec::new();
    packed
        .by_ref()
        .take(GZIP_MAGIC.len() as u64)
        .read_to_end(&mut bytes)
        .map_err(|error| unreadable(name, &error))?;
    if bytes == GZIP_MAGIC {
        let whole = io::Cursor::new(GZIP_MAGIC).chain(packed);
        bytes.clear();
        MultiGzDecoder::new(whole).take(limit + 1).read_to_end(&mut bytes).map_err(|error| {
            Problem::usage(format!("{name} begins as gzip but cannot be unpacked: {error}"))
        })?;
    } else {
        packed
            .take((limit + 1).saturating_sub(bytes.len() as u64))
            .read_to_end(&mut bytes)
            .map_err(|error| unreadable(name, &error))?;
    }
    if bytes.len() as u64 > limit {
        return Err(Problem::usage(format!("{name} holds more than {limit} bytes, the most supported")));
    }
    Ok(bytes)
}

fn unreadable(name: &str, error: &io::Error) -> Problem {
    Problem::usage(format!("{name} cannot be read: {error}"))
}

/// Refuses a file of a known data set whose unpacked content is another.
///
/// # Errors
/// The digests differ; both are named.
pub(super) fn verify(path: &Path, bytes: &[u8], expected: &str) -> Result<(), Problem> {
    compare(&path.display().to_string(), &[bytes], expected)
        .map_err(|problem| problem.hint("get the file again, or name your own data by its path: --data PATH"))
}

/// Compares the sha256 of the parts of what people know as `name`.
///
/// # Errors
/// The digests differ; both are named.
pub(super) fn compare(name: &str, parts: &[&[u8]], expected: &str) -> Result<(), Problem> {
    let found = sha256_hex(parts.iter().copied());
    if found == expected {
        return Ok(());
    }
    Err(Problem::usage(format!("{name} has content with sha256 {found}, expected {expected}")))
}

/// What `bytes` look like as a gzip file.
#[cfg(test)]
pub(super) fn gzipped(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[cfg(test)]
mod tests {
    use super::super::testing::refusal;
    use super::*;

    #[test]
    fn gzipped_and_plain_files_give_the_same_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data");
        for content in [&b""[..], b"a", b"ab", &[7; 70_000]] {
            for stored in [content.to_vec(), gzipped(content), gzipped(content)] {
                std::fs::write(&path, stored).unwrap();
                assert_eq!(read(&path, LIMIT_BYTES).unwrap(), content);
            }
        }
    }

    #[test]
    fn a_file_that_unpacks_past_the_limit_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("big");
        for stored in [vec![0; 1001], gzipped(&[0; 1001])] {
            std::fs::write(&path, stored).unwrap();
            assert_eq!(read(&path, 1001).unwrap().len(), 1001);
            let (sentence, _) = refusal(read(&path, 1000));
            assert_eq!(
                sentence,
                format!("{} holds more than 1000 bytes, the most supported", path.display())
            );
        }
    }

    #[test]
    fn damaged_and_missing_files_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cut.gz");
        let (sentence, _) = refusal(read(&path, 10));
        assert!(
            sentence.starts_with(&format!("{} cannot be read: No such file", path.display())),
            "{sentence}"
        );

        let whole = gzipped(b"some content");
        std::fs::write(&path, &whole[..whole.len() - 6]).unwrap();
        let (sentence, _) = refusal(read(&path, 1000));
        let start = format!("{} begins as gzip but cannot be unpacked: ", path.display());
        assert!(sentence.starts_with(&start), "{sentence}");
    }

    #[test]
    fn another_content_is_refused_with_both_digests() {
        // FIPS 180-2, appendix B.1
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(verify(Path::new("x"), b"abc", abc), Ok(()));
        let (sentence, hint) = refusal(verify(Path::new("x"), b"abd", abc));
        let found = sha256_hex([&b"abd"[..]]);
        assert_eq!(sentence, format!("x has content with sha256 {found}, expected {abc}"));
        assert!(hint.ends_with("--data PATH"), "{hint}");
    }
}
