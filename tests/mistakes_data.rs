//! Data that cannot be used are refused in a sentence that names the file, and nothing is written.

mod common;

use std::path::Path;

use common::{Folder, files_below};

/// Trains on this data and expects a refusal.
#[track_caller]
fn refuse(folder: &Folder, preset: &str, data: &Path, sentence: &str, hint: &str) {
    let before = files_below(folder.path());
    let run = folder.run("run", &format!("{preset} --data {} --set seq_len=10", data.display()));
    run.end("").expect_refusal(2, sentence, hint);
    assert!(!run.dir().exists(), "a refused start leaves no run directory");
    assert_eq!(files_below(folder.path()), before);
}

#[test]
fn a_text_that_cannot_be_used_is_refused() {
    let folder = Folder::new();
    let many: String = ('\u{1}'..='\u{10ffff}').take(65_536).chain("abc".chars()).collect();
    let enough = "a text like any other ".repeat(600);
    let not_utf8 = [enough.as_bytes(), b"\xff and more"].concat();
    let packed = [b"\x1f\x8b\x08\x00", enough.as_bytes()].concat();
    let cases: [(&str, &[u8], &str, &str); 6] = [
        ("empty.txt", b"", "empty.txt is empty", ""),
        ("same.txt", &[b'a'; 9000], "same.txt holds no character but 'a': there is nothing to predict", ""),
        (
            "bytes.txt",
            &not_utf8,
            "bytes.txt is not UTF-8: byte 0xff at offset 13200",
            "convert the text to UTF-8",
        ),
        (
            "short.txt",
            b"much too short",
            "the training part of short.txt has 12 characters",
            "give a longer text",
        ),
        (
            "many.txt",
            many.as_bytes(),
            "many.txt holds 65536 distinct characters, the most supported is 65535",
            "",
        ),
        ("cut.gz", &packed, "cut.gz begins as gzip but cannot be unpacked: ", ""),
    ];
    for (name, content, sentence, hint) in cases {
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        refuse(&folder, "char-lstm", &path, sentence, hint);
    }
    let missing = folder.path().join("missing.txt");
    refuse(
        &folder,
        "char-lstm",
        &missing,
        "missing.txt', but there is no such file",
        "known names: embedded",
    );
    refuse(&folder, "char-lstm", folder.path(), "is a folder, but task \"chars\" reads a text", "choose ");
    refuse(
        &folder,
        "mnist-gru",
        &folder.path().join("same.txt"),
        "same.txt is a file, but task \"rows\"",
        "choose ",
    );
    refuse(&folder, "char-lstm", Path::new("/dev/null"), "/dev/null is neither a file nor a folder", "");
    refuse(
        &folder,
        "char-lstm",
        &folder.path().join("same.txt/"),
        "same.txt/ cannot be read: Not a directory",
        "",
    );
}

#[test]
fn lines_that_cannot_be_used_are_refused() {
    let folder = Folder::new();
    let long = format!("a\nb\n{}", "c".repeat(65_536));
    let padded = "one\n".repeat(90) + "a\0b";
    let lines = "char-lstm --set mode=lines";
    let needs = "task \"classify\" reads lines of a label, a tab and a text";
    let cases: [(&str, &str, &str, &str); 10] = [
        (lines, "\n\r\n\n", "data.tsv has no line with a character in it", ""),
        (
            lines,
            "a\nb\nc\n",
            "the training part of data.tsv has 2 lines, one step of batch_size 64",
            "give more",
        ),
        (
            "char-lstm --set mode=lines --set batch_size=1 --shards 1",
            &long,
            "line 3 of data.tsv has 65,537 steps, the most supported is 65,536",
            "keep the last steps of long lines with --set text.max_len=STEPS",
        ),
        (
            "char-lstm --set mode=lines --set pad=pre",
            &padded,
            r"data.tsv has '\0', the character that lines are padded with",
            "leave out text.pad",
        ),
        ("classify-text", "", "data.tsv has no line with a character in it", ""),
        ("classify-text", "a\tb\n\nc d\n", "line 3 of data.tsv has no tab between a label and a text", needs),
        ("classify-text", "a\tb\n\tc\n", "line 2 of data.tsv has no label before its tab", needs),
        ("classify-text", "a\tb\nc\t\n", "line 2 of data.tsv has no text behind its tab", needs),
        (
            "classify-text",
            "a\tb\na\tc\n",
            "data.tsv has no label but 'a': there is nothing to tell apart",
            "",
        ),
        (
            "char-lstm --set reset_at=q",
            "a text like any other",
            "text.reset_at is 'q', but data.tsv has no such character",
            "it has ' ' 'a' 'e' 'h' 'i' 'k' 'l' 'n' 'o' 'r' 't' 'x' 'y'",
        ),
    ];
    let path = folder.path().join("data.tsv");
    for (preset, content, sentence, hint) in cases {
        std::fs::write(&path, content).unwrap();
        refuse(&folder, preset, &path, sentence, hint);
    }
    refuse(
        &folder,
        "classify-text",
        Path::new("mnist"),
        "mnist is images, but task \"classify\"",
        "a tab and a text",
    );
    refuse(&folder, "classify-text", folder.path(), "is a folder, but task \"classify\"", "--data embedded");
    refuse(
        &folder,
        "mnist-rnn --set validation_samples=12000",
        Path::new("embedded"),
        "validation_samples is 12000, but only 12000 training images of embedded digits v1 are used",
        "choose a smaller validation_samples",
    );
}

const IMAGES: u32 = 0x803;
const LABELS: u32 = 0x801;

/// An IDX file: what its header says, and so many bytes.
fn idx(magic: u32, dimensions: &[u32], bytes: usize) -> Vec<u8> {
    let header = [&[magic], dimensions].concat();
    header.iter().flat_map(|word| word.to_be_bytes()).chain(std::iter::repeat_n(1, bytes)).collect()
}

#[test]
fn images_that_cannot_be_used_are_refused() {
    let [train_images, train_labels] = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"];
    let cases: [(&str, Option<Vec<u8>>, &str); 10] = [
        (train_labels, None, "lacks train-labels-idx1-ubyte"),
        (
            train_images,
            Some(vec![]),
            "train-images-idx3-ubyte is truncated: it has 0 bytes, its header alone has 16",
        ),
        (
            train_images,
            Some(idx(IMAGES, &[300, 4, 4], 4799)),
            "train-images-idx3-ubyte is truncated: its header declares 300 x 4 x 4 = 4800 bytes, 4799 follow",
        ),
        (
            train_images,
            Some(idx(IMAGES, &[300, 4, 4], 4801)),
            "train-images-idx3-ubyte is too long: its header declares 300 x 4 x 4 = 4800 bytes, 4801 follow",
        ),
        (
            train_images,
            Some(idx(IMAGES, &[u32::MAX; 3], 9)),
            "train-images-idx3-ubyte is truncated: its header declares",
        ),
        (
            train_images,
            Some(idx(LABELS, &[300], 300)),
            "train-images-idx3-ubyte has magic 0x00000801 (labels), expected 0x00000803 (images)",
        ),
        (
            train_labels,
            Some(idx(IMAGES, &[300, 1, 1], 300)),
            "train-labels-idx1-ubyte has magic 0x00000803 (images), expected 0x00000801 (labels)",
        ),
        (train_labels, Some(idx(LABELS, &[299], 299)), "train-images-idx3-ubyte has 300 images, but"),
        (
            train_images,
            Some(b"not an IDX file".to_vec()),
            "train-images-idx3-ubyte has magic 0x6e6f7420, expected",
        ),
        (
            train_images,
            Some(idx(IMAGES, &[300, 0, 4], 0)),
            "train-images-idx3-ubyte has 300 images of 0 x 4 pixels",
        ),
    ];
    for (name, content, sentence) in cases {
        let folder = Folder::new();
        let images = folder.empty("images");
        for (stem, count) in [("train", 300), ("t10k", 200)] {
            let write = |name: String, content| std::fs::write(images.join(name), content).unwrap();
            write(format!("{stem}-images-idx3-ubyte"), idx(IMAGES, &[count, 4, 4], count as usize * 16));
            write(format!("{stem}-labels-idx1-ubyte"), idx(LABELS, &[count], count as usize));
        }
        match content {
            Some(content) => std::fs::write(images.join(name), content).unwrap(),
            None => std::fs::remove_file(images.join(name)).unwrap(),
        }
        let hint = if sentence.starts_with("lacks") { "each may be plain or end in .gz" } else { "" };
        refuse(&folder, "mnist-rnn", &images, sentence, hint);
    }
}

#[test]
fn named_data_that_are_not_there_say_how_to_get_them() {
    let folder = Folder::new();
    for (preset, name) in [("char-lstm", "tinyshakespeare"), ("mnist-rnn", "mnist")] {
        let run =
            folder.run("run", &format!("{preset} --data {name} --data-dir {}", folder.path().display()));
        let mut command = common::lockstep();
        command.arg("train").args(run.words()).env("HOME", folder.path());
        command.env_remove("LOCKSTEP_DATA_DIR").env_remove("XDG_CACHE_HOME");
        common::Process::start(&mut command).end().expect_refusal(
            2,
            &format!("{name} was not found, looked at {}", folder.path().display()),
            &format!("get it with `lockstep data fetch {name}`"),
        );
        assert!(!run.dir().exists());
    }
}
