//! Reads IDX, the file format of MNIST: a big-endian header and raw bytes.
//!
//! ```text
//! images: 00 00 08 03 | count u32 | rows u32 | columns u32 | count · rows · columns bytes
//! labels: 00 00 08 01 | count u32 | count bytes
//! ```
//!
//! Source: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits".

use std::path::Path;

use protocol::problem::Problem;

use super::file;
use super::images::ImageSet;
use super::locate::SetFiles;

/// Unsigned bytes in three dimensions.
const IMAGES_MAGIC: u32 = 0x0000_0803;
/// Unsigned bytes in one dimension.
const LABELS_MAGIC: u32 = 0x0000_0801;

/// Reads the two files of a set of labelled images, each gzipped or not.
///
/// # Errors
/// A file cannot be read, is no such file, is not as long as its header says, or is not the expected one; there
/// are no images, or not as many as labels.
pub(super) fn read(files: &SetFiles) -> Result<ImageSet, Problem> {
    let image_bytes = file::read(&files.images, file::LIMIT_BYTES)?;
    let label_bytes = file::read(&files.labels, file::LIMIT_BYTES)?;
    parse((&files.images, &image_bytes), (&files.labels, &label_bytes), files.sha256)
}

/// The same from the two files' contents, whatever bytes they have.
pub(super) fn parse(
    (images, image_bytes): (&Path, &[u8]),
    (labels, label_bytes): (&Path, &[u8]),
    sha256: Option<[&str; 2]>,
) -> Result<ImageSet, Problem> {
    let [count, rows, cols] = dimensions::<3>(images, image_bytes)?;
    let [label_count] = dimensions::<1>(labels, label_bytes)?;
    if [count, rows, cols].contains(&0) {
        return Err(Problem::usage(format!(
            "{} has {count} images of {rows} x {cols} pixels: there is nothing to read",
            images.display()
        )));
    }
    if count != label_count {
        return Err(Problem::usage(format!(
            "{} has {count} images, but {} has {label_count} labels",
            images.display(),
            labels.display()
        )));
    }
    // Last, so that a file of another kind is called that rather than a wrong digest.
    if let Some([images_sha256, labels_sha256]) = sha256 {
        file::verify(images, image_bytes, images_sha256)?;
        file::verify(labels, label_bytes, labels_sha256)?;
    }
    let (pixels, labels) = (image_bytes[header_len(3)..].to_vec(), label_bytes[header_len(1)..].to_vec());
    Ok(ImageSet { rows: rows as usize, cols: cols as usize, pixels, labels })
}

/// Length of the header of a file of so many dimensions.
const fn header_len(dimensions: usize) -> usize {
    4 + 4 * dimensions
}

/// The `D` dimensions of an IDX file of bytes, whose content is as long as they say.
fn dimensions<const D: usize>(path: &Path, bytes: &[u8]) -> Result<[u32; D], Problem> {
    let shown = path.display();
    let header_len = header_len(D);
    let word = |index: usize| {
        bytes
            .get(4 * index..4 * index + 4)
            .map(|word| u32::from_be_bytes(word.try_into().expect("four bytes")))
    };
    let wanted = if D == 3 { IMAGES_MAGIC } else { LABELS_MAGIC };
    match word(0) {
        Some(magic) if magic != wanted => {
            return Err(Problem::usage(format!(
                "{shown} has magic {magic:#010x}{}, expected {wanted:#010x}{}",
                meaning(magic),
                meaning(wanted)
            )));
        }
        Some(_) if bytes.len() >= header_len => {}
        _ => {
            return Err(Problem::usage(format!(
                "{shown} is truncated: it has {} bytes, its header alone has {header_len}",
                bytes.len()
            )));
        }
    }
    let dimensions: [u32; D] = std::array::from_fn(|d| word(1 + d).expect("the header is complete"));
    let content_len = bytes.len() - header_len;
    let declared = dimensions.iter().map(|&dimension| u128::from(dimension)).product::<u128>();
    if content_len as u128 != declared {
        let product = dimensions.map(|dimension| dimension.to_string()).join(" x ");
        let fault = if (content_len as u128) < declared { "is truncated" } else { "is too long" };
        return Err(Problem::usage(format!(
            "{shown} {fault}: its header declares {product} = {declared} bytes, {} follow",
            content_len
        )));
    }
    Ok(dimensions)
}

fn meaning(magic: u32) -> &'static str {
    match magic {
        IMAGES_MAGIC => " (images)",
        LABELS_MAGIC => " (labels)",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::refusal;
    use super::*;
    use std::fs;

    fn images(count: u32, rows: u32, cols: u32) -> Vec<u8> {
        let mut bytes = [IMAGES_MAGIC, count, rows, cols].map(u32::to_be_bytes).concat();
        bytes.extend((0..count * rows * cols).map(|pixel| pixel as u8));
        bytes
    }

    fn labels(count: u32) -> Vec<u8> {
        let mut bytes = [LABELS_MAGIC, count].map(u32::to_be_bytes).concat();
        bytes.extend((0..count).map(|label| label as u8));
        bytes
    }

    /// What reading these two files says, their folder left out.
    fn reading(images: &[u8], labels: &[u8]) -> Result<ImageSet, Problem> {
        let folder = tempfile::tempdir().unwrap();
        let [image_path, label_path] = ["images", "labels"].map(|name| folder.path().join(name));
        fs::write(&image_path, images).unwrap();
        fs::write(&label_path, labels).unwrap();
        let files = SetFiles { images: image_path, labels: label_path, sha256: None };
        let prefix = format!("{}/", folder.path().display());
        read(&files).map_err(|problem| Problem::usage(problem.sentence.replace(&prefix, "")))
    }

    #[test]
    fn plain_and_gzipped_files_are_read() {
        let expected = ImageSet { rows: 3, cols: 2, pixels: (0..24).collect(), labels: (0..4).collect() };
        let (images, labels) = (images(4, 3, 2), labels(4));
        assert_eq!(reading(&images, &labels).unwrap(), expected);
        assert_eq!(reading(&file::gzipped(&images), &labels).unwrap(), expected);
        assert_eq!(reading(&images, &file::gzipped(&labels)).unwrap(), expected);
    }

    #[test]
    fn damaged_files_are_refused_in_words() {
        let (i, l) = (images(4, 3, 2), labels(4));
        let huge = [IMAGES_MAGIC, u32::MAX, u32::MAX, u32::MAX].map(u32::to_be_bytes).concat();
        let cases: [(&[u8], &[u8], &str); 10] = [
            (&l, &l, "images has magic 0x00000801 (labels), expected 0x00000803 (images)"),
            (&i, &i, "labels has magic 0x00000803 (images), expected 0x00000801 (labels)"),
            (b"some text", &l, "images has magic 0x736f6d65, expected 0x00000803 (images)"),
            (&[], &l, "images is truncated: it has 0 bytes, its header alone has 16"),
            (&i[..15], &l, "images is truncated: it has 15 bytes, its header alone has 16"),
            (
                &i[..i.len() - 1],
                &l,
                "images is truncated: its header declares 4 x 3 x 2 = 24 bytes, 23 follow",
            ),
            (
                &huge,
                &l,
                "images is truncated: its header declares 4294967295 x 4294967295 x 4294967295 = \
                 79228162458924105385300197375 bytes, 0 follow",
            ),
            (&i, &[&l[..], &[0]].concat(), "labels is too long: its header declares 4 = 4 bytes, 5 follow"),
            (&i, &labels(5), "images has 4 images, but labels has 5 labels"),
            (&images(0, 3, 2), &labels(0), "images has 0 images of 3 x 2 pixels: there is nothing to read"),
        ];
        for (images, labels, sentence) in cases {
            assert_eq!(refusal(reading(images, labels)).0, sentence);
        }
    }
}
