//! Every file of the fuzzers' corpus is read without a panic, by the functions that the fuzz targets call.

#[allow(unreachable_pub, reason = "the fuzz targets call these from outside")]
#[path = "../fuzz/src/readers.rs"]
mod readers;

use std::path::Path;

#[test]
fn every_reader_survives_its_corpus() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let mut folders: Vec<_> = corpus.read_dir().unwrap().flatten().map(|entry| entry.file_name()).collect();
    folders.sort();
    let mut names = readers::READERS.map(|(name, _)| name);
    names.sort_unstable();
    assert_eq!(folders, names, "each reader has a corpus");
    for (name, read) in readers::READERS {
        let files: Vec<_> = corpus.join(name).read_dir().unwrap().flatten().collect();
        println!("{name}: {} files", files.len());
        assert!(!files.is_empty(), "{name} has an empty corpus");
        for file in files {
            println!("    {}", file.path().display());
            read(&std::fs::read(file.path()).unwrap());
        }
    }
}
