//! NumPy's files of named arrays: a zip archive with a `.npy` file for each.
//!
//! Read is what `numpy.savez` and `savez_compressed` write of one- and two-dimensional arrays of floating-point
//! numbers, and of characters. An array of something else is there with its type, so that only who wants it need mind.

use std::io::Read;

use flate2::bufread::DeflateDecoder;
use protocol::problem::Problem;
use rawzip::{CompressionMethod, ZipArchive, ZipFileHeaderRecord, ZipSliceArchive};

/// Most bytes of all arrays of a file, unpacked. What claims more is no file of parameters.
const LIMIT_BYTES: u64 = 1 << 30;

/// Most arrays of a file.
const LIMIT_ARRAYS: u64 = 10_000;

/// The first bytes of a zip archive that holds a file.
const ZIP_MAGIC: &[u8] = b"PK\x03\x04";

/// The first bytes of a `.npy` file.
const NPY_MAGIC: &[u8] = b"\x93NUMPY";

/// One array of a file.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Array {
    /// Without `.npy`.
    pub(super) name: String,
    /// Empty for a single number.
    pub(super) shape: Vec<usize>,
    pub(super) values: Values,
}

/// The elements of an array, row by row.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Values {
    Floats(Vec<f64>),
    Characters(Vec<char>),
    /// NumPy's word for a type that is not read.
    Other(String),
}

/// Whether these bytes begin as such a file does.
pub(super) fn is_npz(bytes: &[u8]) -> bool {
    bytes.starts_with(ZIP_MAGIC)
}

/// All arrays of the content of a file that people know as `origin`.
///
/// # Errors
/// It is damaged, too large, or no such file.
pub(super) fn read_npz(origin: &str, bytes: &[u8]) -> Result<Vec<Array>, Problem> {
    read_archive(bytes).map_err(|reason| {
        Problem::usage(format!("{origin} cannot be read as NumPy's arrays: {reason}"))
            .hint("write it with numpy.savez or numpy.savez_compressed, as 32- or 64-bit floats")
    })
}

/// What is wrong, as the end of a sentence.
type Reason = String;

fn read_archive(bytes: &[u8]) -> Result<Vec<Array>, Reason> {
    let archive = ZipArchive::from_slice(bytes).map_err(|error| error.to_string())?;
    let (mut arrays, mut left) = (Vec::new(), LIMIT_BYTES);
    for entry in archive.entries() {
        let entry = entry.map_err(|error| error.to_string())?;
        let path = String::from_utf8_lossy(entry.file_path().as_bytes()).into_owned();
        if arrays.len() as u64 == LIMIT_ARRAYS {
            return Err(format!("it has more than {LIMIT_ARRAYS} arrays, the most supported"));
        }
        let name = path.strip_suffix(".npy").ok_or_else(|| format!("'{path}' in it is no .npy file"))?;
        let content = unpack(&archive, &entry, left).map_err(|reason| format!("'{name}': {reason}"))?;
        left -= content.len() as u64;
        arrays.push(read_npy(name, &content).map_err(|reason| format!("'{name}': {reason}"))?);
    }
    Ok(arrays)
}

/// One file of an archive, of `limit` bytes at most.
fn unpack(
    archive: &ZipSliceArchive<&[u8]>,
    entry: &ZipFileHeaderRecord<'_>,
    limit: u64,
) -> Result<Vec<u8>, Reason> {
    let file = archive.get_entry(entry.wayfinder()).map_err(|error| error.to_string())?;
    let packed = file.data();
    let unpacked: Box<dyn Read + '_> = match entry.compression_method() {
        CompressionMethod::STORE => Box::new(packed),
        CompressionMethod::DEFLATE => Box::new(DeflateDecoder::new(packed)),
        other => return Err(format!("it is packed with {other:?}, expected deflate or nothing")),
    };
    // The sizes that an archive claims reserve nothing.
    let mut content = Vec::new();
    file.verifying_reader(unpacked)
        .take(limit + 1)
        .read_to_end(&mut content)
        .map_err(|error| error.to_string())?;
    match content.len() as u64 > limit {
        true => Err(format!("the arrays are larger than {LIMIT_BYTES} bytes, the most supported")),
        false => Ok(content),
    }
}

/// A `.npy` file: its magic, a version, the length of the header, the header, the elements.
fn read_npy(name: &str, bytes: &[u8]) -> Result<Array, Reason> {
    let truncated = || "it is truncated".to_owned();
    let rest = bytes.strip_prefix(NPY_MAGIC).ok_or("it does not begin as a .npy file")?;
    let ([major, _minor], rest) = rest.split_first_chunk().ok_or_else(truncated)?;
    let (header_len, rest) = match major {
        1 => rest.split_first_chunk().map(|(len, rest)| (usize::from(u16::from_le_bytes(*len)), rest)),
        2 | 3 => rest.split_first_chunk().map(|(len, rest)| (u32::from_le_bytes(*len) as usize, rest)),
        other => return Err(format!("it has version {other} of the .npy format, expected 1 to 3")),
    }
    .ok_or_else(truncated)?;
    let (header, elements) = rest.split_at_checked(header_len).ok_or_else(truncated)?;
    let header = std::str::from_utf8(header).map_err(|_| "its header is not UTF-8")?;
    let Header { descr, fortran_order, shape } =
        Header::parse(header).ok_or_else(|| format!("its header is damaged: {}", header.trim_end()))?;

    let element = |width: usize| -> Result<(), Reason> {
        let expected = shape.iter().try_fold(width, |product, &size| product.checked_mul(size));
        match expected == Some(elements.len()) {
            true => Ok(()),
            false => Err(format!("it is {shape:?} of {descr}, but {} bytes follow", elements.len())),
        }
    };
    let values = match descr.as_str() {
        "<f4" => {
            element(4)?;
            let (words, _) = elements.as_chunks::<4>();
            Values::Floats(words.iter().map(|&word| f64::from(f32::from_le_bytes(word))).collect())
        }
        "<f8" => {
            element(8)?;
            let (words, _) = elements.as_chunks::<8>();
            Values::Floats(words.iter().map(|&word| f64::from_le_bytes(word)).collect())
        }
        "<U1" => {
            element(4)?;
            let (words, _) = elements.as_chunks::<4>();
            let characters = words.iter().map(|&word| char::from_u32(u32::from_le_bytes(word)));
            Values::Characters(characters.collect::<Option<_>>().ok_or("it holds what is no character")?)
        }
        _ => Values::Other(descr.clone()),
    };
    let values = match (values, &shape[..]) {
        (Values::Floats(values), &[rows, columns]) if fortran_order && !values.is_empty() => {
            let row = |row: usize| values.iter().skip(row).step_by(rows).copied();
            Values::Floats((0..rows).flat_map(|at| row(at).take(columns)).collect())
        }
        (Values::Floats(_), [_, _, _, ..]) if fortran_order => {
            return Err(format!("it is {shape:?} in Fortran's order, which is read of up to two dimensions"));
        }
        (values, _) => values,
    };
    Ok(Array { name: name.to_owned(), shape, values })
}

/// The header of a `.npy` file: `{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }`.
#[derive(Debug, PartialEq)]
struct Header {
    descr: String,
    fortran_order: bool,
    shape: Vec<usize>,
}

impl Header {
    fn parse(text: &str) -> Option<Self> {
        let value_of = |key: &str| {
            let (_, rest) = text.split_once(&format!("'{key}':"))?;
            Some(rest.trim_start())
        };
        // Of a structured type this is a list, whose text is as good a name for it as any.
        let descr = match value_of("descr")? {
            quoted if quoted.starts_with('\'') => quoted[1..].split_once('\'')?.0,
            list => list.split_once(", 'fortran_order'")?.0,
        };
        let fortran_order = match value_of("fortran_order")? {
            rest if rest.starts_with("True") => true,
            rest if rest.starts_with("False") => false,
            _ => return None,
        };
        let (sizes, _) = value_of("shape")?.strip_prefix('(')?.split_once(')')?;
        let sizes = sizes.split(',').map(str::trim).filter(|size| !size.is_empty());
        let shape = sizes.map(|size| size.parse().ok()).collect::<Option<_>>()?;
        Some(Self { descr: descr.to_owned(), fortran_order, shape })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A `.npy` file with this header.
    fn npy(header: &str, elements: &[u8]) -> Vec<u8> {
        let len = (header.len() as u16).to_le_bytes();
        [NPY_MAGIC, &[1, 0], &len, header.as_bytes(), elements].concat()
    }

    fn floats(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    /// An archive of stored files.
    fn archive(files: &[(&str, Vec<u8>)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut archive = rawzip::ZipArchiveWriter::new(&mut bytes);
        for (name, content) in files {
            let (mut entry, config) = archive.new_file(name).start().unwrap();
            let mut writer = config.wrap(&mut entry);
            std::io::copy(&mut &content[..], &mut writer).unwrap();
            let (_, descriptor) = writer.finish().unwrap();
            entry.finish(descriptor).unwrap();
        }
        archive.finish().unwrap();
        bytes
    }

    #[test]
    fn arrays_come_back_in_rows() {
        let shape =
            |order: &str| format!("{{'descr': '<f4', 'fortran_order': {order}, 'shape': (2, 3), }}\n");
        let names = "{'descr': '<U1', 'fortran_order': False, 'shape': (2,), }";
        let count = "{'descr': '<i8', 'fortran_order': False, 'shape': (), }";
        let characters: Vec<u8> = "aé".chars().flat_map(|c| (c as u32).to_le_bytes()).collect();
        let six = floats(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let bytes = archive(&[
            ("a/rows.npy", npy(&shape("False"), &six)),
            ("columns.npy", npy(&shape("True"), &six)),
            ("names.npy", npy(names, &characters)),
            ("count.npy", npy(count, &[0; 8])),
        ]);
        assert!(is_npz(&bytes));
        let arrays = read_npz("w", &bytes).unwrap();
        let shapes: Vec<_> = arrays.iter().map(|array| (array.name.as_str(), &array.shape[..])).collect();
        assert_eq!(shapes, [("a/rows", &[2, 3][..]), ("columns", &[2, 3]), ("names", &[2]), ("count", &[])]);
        let values: Vec<_> = arrays.into_iter().map(|array| array.values).collect();
        assert_eq!(values[0], Values::Floats(vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
        assert_eq!(values[1], Values::Floats(vec![1.0, 3.0, 5.0, 2.0, 4.0, 6.0]));
        assert_eq!(values[2], Values::Characters(vec!['a', 'é']));
        assert_eq!(values[3], Values::Other("<i8".to_owned()));
    }

    #[test]
    fn what_is_damaged_is_said() {
        let header = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }";
        let huge = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({0}, {0}), }}", usize::MAX);
        let cube = "{'descr': '<f4', 'fortran_order': True, 'shape': (1, 1, 1), }";
        let cases = [
            ("a.txt", b"hello".to_vec(), "'a.txt' in it is no .npy file"),
            ("a.npy", b"hello".to_vec(), "'a': it does not begin as a .npy file"),
            ("a.npy", npy(header, &[])[..9].to_vec(), "'a': it is truncated"),
            ("a.npy", npy(header, &[])[..20].to_vec(), "'a': it is truncated"),
            ("a.npy", npy(header, &[0; 7]), "'a': it is [2] of <f4, but 7 bytes follow"),
            ("a.npy", npy(&huge, &[0; 8]), "of <f4, but 8 bytes follow"),
            ("a.npy", npy("{}", &[]), "'a': its header is damaged: {}"),
            ("a.npy", npy(cube, &[0; 4]), "'a': it is [1, 1, 1] in Fortran's order"),
        ];
        for (name, content, part) in cases {
            let problem = read_npz("w", &archive(&[(name, content)])).unwrap_err();
            assert!(problem.sentence.starts_with("w cannot be read as NumPy's arrays: "), "{problem}");
            assert!(problem.sentence.contains(part), "{problem}");
        }
        let whole = archive(&[("a.npy", npy(header, &[0; 8]))]);
        assert!(read_npz("w", &whole[..whole.len() - 1]).is_err());
    }

    #[test]
    fn a_small_file_that_unpacks_to_a_large_one_is_refused() {
        let content = vec![0; 1 << 20];
        let mut bytes = Vec::new();
        let mut archive = rawzip::ZipArchiveWriter::new(&mut bytes);
        let (mut entry, config) =
            archive.new_file("a.npy").compression_method(CompressionMethod::DEFLATE).start().unwrap();
        let encoder = flate2::write::DeflateEncoder::new(&mut entry, flate2::Compression::best());
        let mut writer = config.wrap(encoder);
        std::io::copy(&mut &content[..], &mut writer).unwrap();
        let (encoder, descriptor) = writer.finish().unwrap();
        encoder.finish().unwrap();
        entry.finish(descriptor).unwrap();
        archive.finish().unwrap();
        assert!(bytes.len() < 2000);
        let archive = ZipArchive::from_slice(&bytes[..]).unwrap();
        let entry = archive.entries().next_entry().unwrap().unwrap();
        assert_eq!(unpack(&archive, &entry, 1 << 20).unwrap(), content);
        let reason = unpack(&archive, &entry, (1 << 20) - 1).unwrap_err();
        assert_eq!(reason, "the arrays are larger than 1073741824 bytes, the most supported");
    }

    proptest! {
        #[test]
        fn no_damage_makes_it_panic(at in 0..700_usize, byte: u8, cut in 0..1000_usize) {
            let header = "{'descr': '<f8', 'fortran_order': True, 'shape': (2, 3), }";
            let file = npy(header, &[0; 48]);
            let mut bytes = archive(&[("a.npy", file.clone()), ("b.npy", file)]);
            let len = bytes.len();
            bytes[at % len] = byte;
            let _ = read_npz("w", &bytes);
            let _ = read_npz("w", &bytes[..cut % len]);
        }

        #[test]
        fn no_header_makes_it_panic(header in "[{}'a-z:<>0-9(), ]{0,60}", rest in prop::collection::vec(any::<u8>(), 0..40)) {
            let _ = read_npy("a", &npy(&header, &rest));
            let _ = Header::parse(&format!("'descr': '<f4', 'fortran_order': True, 'shape': {header}"));
        }
    }
}
