//! Writing so that a crash at any moment leaves the old content or the new one, and saying what went wrong in words.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use failpoints::{Point, reach};
use protocol::problem::Problem;

/// A failed file operation as a sentence: `cannot write runs/a/job.toml: Permission denied (os error 13)`.
pub fn io_problem(verb: &str, path: &Path, error: &io::Error) -> Problem {
    let problem = Problem::failed(format!("cannot {verb} {}: {error}", path.display()));
    match error.kind() {
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            problem.hint("choose a place that can be written with --run-dir")
        }
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            problem.hint("free some space and start the same command again; nothing that was written is lost")
        }
        _ => problem,
    }
}

/// Replaces the content of `path` as a whole: temporary file beside it, fsync, rename, fsync of the directory.
///
/// The temporary name is fixed, not random, so that one left by a crash is found again; only the holder of the run
/// directory's lock writes.
///
/// # Errors
/// Any failed operation; the old content is then still there, and no temporary file.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<(), Problem> {
    if path.file_name().is_none() {
        return Err(io_problem("write", path, &ErrorKind::IsADirectory.into()));
    }
    write_through(&temporary_path(path), path, bytes, None)
}

/// As [`write_atomic`], for the state after so many steps.
pub(super) fn write_of_step(path: &Path, bytes: &[u8], step: u64) -> Result<(), Problem> {
    write_through(&temporary_path(path), path, bytes, Some(step))
}

/// The same where no lock says who writes: the temporary name carries the process, so that two of them do not write
/// into one file.
///
/// # Errors
/// As [`write_atomic`].
pub fn write_beside(path: &Path, bytes: &[u8]) -> Result<(), Problem> {
    let temporary = temporary_path(path).with_extension(format!("{}.tmp", std::process::id()));
    write_through(&temporary, path, bytes, None)
}

fn write_through(temporary: &Path, path: &Path, bytes: &[u8], step: Option<u64>) -> Result<(), Problem> {
    let at = |point| step.map(|step| reach(point, step));
    let written = (|| {
        let mut file = File::create(temporary)?;
        file.write_all(bytes)?;
        at(Point::CheckpointFsync);
        file.sync_all()?;
        at(Point::CheckpointRename);
        fs::rename(temporary, path)
    })();
    written.map_err(|error| {
        let _ = fs::remove_file(temporary);
        io_problem("write", path, &error)
    })?;
    sync_parent(path)
}

/// Makes `path` point to `target`, replacing what was there in one moment. Where the file system has no symbolic
/// links, `path` becomes a text file with the target as its only line.
///
/// # Errors
/// Any failed operation; the old link is then still there.
pub fn link_atomic(path: &Path, target: &str) -> Result<(), Problem> {
    let temporary = temporary_path(path);
    remove_if_there(&temporary)?;
    if rustix::fs::symlink(target, &temporary).is_err() {
        return write_atomic(path, format!("{target}\n").as_bytes());
    }
    fs::rename(&temporary, path).map_err(|error| {
        let _ = fs::remove_file(&temporary);
        io_problem("write", path, &error)
    })?;
    sync_parent(path)
}

/// Creates a directory and those above it.
///
/// # Errors
/// Any failed operation.
pub fn create_dir(path: &Path) -> Result<(), Problem> {
    if path.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(path).map_err(|error| io_problem("create", path, &error))?;
    sync_parent(path)
}

/// Deletes a file or link; that there is none is as good.
///
/// # Errors
/// Any other failed operation.
pub fn remove_if_there(path: &Path) -> Result<(), Problem> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(io_problem("delete", path, &error)),
        _ => Ok(()),
    }
}

/// The content of a file, `None` if there is none.
///
/// # Errors
/// Any other failed operation.
pub fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>, Problem> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io_problem("read", path, &error)),
    }
}

/// Names of the entries of a directory in order, none if it does not exist. Names that are not Unicode are given
/// with replacement characters: none of ours are such.
///
/// # Errors
/// Any other failed operation.
pub fn names_in(dir: &Path) -> Result<Vec<String>, Problem> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(io_problem("read", dir, &error)),
    };
    let mut names = entries
        .map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()))
        .collect::<io::Result<Vec<_>>>()
        .map_err(|error| io_problem("read", dir, &error))?;
    names.sort();
    Ok(names)
}

/// Where [`write_atomic`] and [`link_atomic`] prepare the new content of `path`: `.NAME.tmp` beside it.
pub fn temporary_path(path: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(path.file_name().expect("the path of a file ends in its name"));
    name.push(".tmp");
    path.with_file_name(name)
}

/// The name that an entry is the temporary file of.
pub fn temporary_of(name: &str) -> Option<&str> {
    name.strip_prefix('.')?.strip_suffix(".tmp")
}

/// A rename or a new name is durable only when the directory is.
fn sync_parent(path: &Path) -> Result<(), Problem> {
    let parent = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    File::open(parent).and_then(|dir| dir.sync_all()).map_err(|error| io_problem("sync", parent, &error))
}

/// Most bytes of lines that wait in memory for a disk to take them: hours of steps.
const WAITING_LIMIT_BYTES: usize = 64 << 20;

/// A file that grows line by line. What reaches it is whole lines: the rest of a line whose write failed is cut
/// off before the next one, so only a crash of the machine can leave a torn one, and only at the end. Lines that the
/// disk does not take, because it is full say, wait in memory and keep their order.
#[derive(Debug)]
pub(super) struct LineFile {
    disk: LineSync,
}

/// The file of a [`LineFile`], whose lines another thread can wait for.
#[derive(Debug, Clone)]
pub(crate) struct LineSync {
    path: PathBuf,
    end: Arc<Mutex<FileEnd>>,
}

/// What is at the end of a file that grows, and what is to come there.
#[derive(Debug)]
struct FileEnd {
    /// The one that has the name now: whoever waits for lines waits for those of the file that replaced another.
    file: Arc<File>,
    /// Bytes of whole lines.
    length: u64,
    /// Whether a failed write may have left something after them.
    torn: bool,
    /// Lines that are not in the file yet.
    waiting: Vec<u8>,
    /// Why they were refused.
    refused: Option<Problem>,
}

impl FileEnd {
    fn of(file: File, length: u64) -> Self {
        Self { file: Arc::new(file), length, torn: false, waiting: Vec::new(), refused: None }
    }

    /// Writes the lines that wait.
    fn write(&mut self, path: &Path) -> Result<(), Problem> {
        let written = self.cut().and_then(|()| {
            self.torn = !self.waiting.is_empty();
            (&*self.file).write_all(&self.waiting)
        });
        if let Err(error) = written {
            let problem = io_problem("write", path, &error);
            self.refused = Some(problem.clone());
            return Err(problem);
        }
        self.torn = false;
        self.length += self.waiting.len() as u64;
        self.waiting.clear();
        self.refused = None;
        Ok(())
    }

    fn cut(&mut self) -> io::Result<()> {
        if self.torn {
            self.file.set_len(self.length)?;
            self.torn = false;
        }
        Ok(())
    }
}

impl LineSync {
    /// Opens a file for appending, creating it if need be.
    pub(crate) fn open(path: &Path) -> Result<Self, Problem> {
        let end = Arc::new(Mutex::new(FileEnd::of(open_lines(path)?, 0)));
        Ok(Self { path: path.to_owned(), end })
    }

    /// Writes the lines that wait in memory, if any do.
    ///
    /// # Errors
    /// The disk still refuses them; they go on waiting.
    pub(crate) fn flush(&self) -> Result<(), Problem> {
        self.end().write(&self.path)
    }

    /// Why lines wait in memory, if any do.
    pub(crate) fn refused(&self) -> Option<Problem> {
        self.end().refused.clone()
    }

    /// Waits until all lines that were appended before are on the disk.
    pub(crate) fn sync(&self) -> Result<(), Problem> {
        let failed = |error| io_problem("sync", &self.path, &error);
        let file = {
            let mut end = self.end();
            end.write(&self.path)?;
            end.file.clone()
        };
        // Whoever appends meanwhile does not wait.
        file.sync_data().map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if metadata.is_file() && metadata.nlink() == 0 {
            if !Arc::ptr_eq(&file, &self.end().file) {
                return self.sync();
            }
            return Err(Problem::failed(format!("{} was deleted while it was written", self.path.display()))
                .hint("nothing of the run is left there: start it again"));
        }
        Ok(())
    }

    fn end(&self) -> MutexGuard<'_, FileEnd> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn open_lines(path: &Path) -> Result<File, Problem> {
    let file = OpenOptions::new().append(true).create(true).open(path);
    file.map_err(|error| io_problem("open", path, &error))
}

impl LineFile {
    /// Opens a file for appending, creating it if need be, and cuts off what lies after its first `length` bytes.
    pub(super) fn open(path: &Path, length: u64) -> Result<Self, Problem> {
        let disk = LineSync::open(path)?;
        {
            let mut end = disk.end();
            (end.length, end.torn) = (length, true);
            end.write(path)?;
        }
        sync_parent(path)?;
        Ok(Self { disk })
    }

    /// All lines, those that wait in memory included.
    pub(super) fn content(&self) -> Result<Vec<u8>, Problem> {
        let end = self.disk.end();
        let mut content = read_if_there(&self.disk.path)?.unwrap_or_default();
        content.truncate(end.length as usize);
        content.extend_from_slice(&end.waiting);
        Ok(content)
    }

    /// Replaces all lines by `content`, which has whole lines.
    ///
    /// # Errors
    /// The file cannot be written, and all is then as it was; or it cannot be opened again.
    pub(super) fn replace(&mut self, content: &[u8]) -> Result<(), Problem> {
        write_atomic(&self.disk.path, content)?;
        *self.disk.end() = FileEnd::of(open_lines(&self.disk.path)?, content.len() as u64);
        Ok(())
    }

    /// Appends one line in one write. If the disk refuses it, it waits in memory with those after it, until
    /// [`LineSync::flush`] succeeds.
    ///
    /// # Errors
    /// Too much waits already.
    pub(super) fn append(&mut self, line: &str) -> Result<(), Problem> {
        self.keep(line)?;
        if self.disk.refused().is_none() {
            // Whoever needs it on the disk says so.
            let _ = self.disk.flush();
        }
        Ok(())
    }

    /// Keeps one line in memory until the next one, or somebody who needs it on the disk, takes it along.
    ///
    /// # Errors
    /// Too much waits already.
    pub(super) fn keep(&mut self, line: &str) -> Result<(), Problem> {
        assert!(!line.contains('\n'), "a record is one line");
        let mut end = self.disk.end();
        if end.waiting.len() + line.len() >= WAITING_LIMIT_BYTES {
            let full = || io_problem("write", &self.disk.path, &ErrorKind::StorageFull.into());
            return Err(end.refused.clone().unwrap_or_else(full));
        }
        end.waiting.extend_from_slice(line.as_bytes());
        end.waiting.push(b'\n');
        Ok(())
    }

    /// What waits for the disk.
    pub(super) fn on_disk(&self) -> LineSync {
        self.disk.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_a_deleted_file_do_not_count_as_being_on_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let lines = LineSync::open(&path).unwrap();
        lines.sync().unwrap();
        fs::remove_file(&path).unwrap();
        let problem = lines.sync().unwrap_err();
        assert_eq!(problem.sentence, format!("{} was deleted while it was written", path.display()));
    }

    #[test]
    fn a_failed_replacement_keeps_the_old_content_and_leaves_no_temporary_file() {
        let dir = tempfile::tempdir().unwrap();
        // A directory that is not empty cannot be replaced by a file.
        let path = dir.path().join("target");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("inside"), "old").unwrap();
        let problem = write_atomic(&path, b"new").unwrap_err();
        assert!(problem.sentence.starts_with(&format!("cannot write {}: ", path.display())), "{problem}");
        let problem = link_atomic(&path, "elsewhere").unwrap_err();
        assert!(problem.sentence.starts_with("cannot write "), "{problem}");
        assert_eq!(names_in(dir.path()).unwrap(), ["target"]);
        assert_eq!(fs::read(path.join("inside")).unwrap(), b"old");
    }

    #[test]
    fn content_and_links_are_replaced_even_over_what_a_crash_left() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("file"), dir.path().join("link"));
        for round in ["one", "two"] {
            fs::write(temporary_path(&file), "half").unwrap();
            fs::write(temporary_path(&link), "half").unwrap();
            write_atomic(&file, round.as_bytes()).unwrap();
            link_atomic(&link, round).unwrap();
            assert_eq!(fs::read_to_string(&file).unwrap(), round);
            assert_eq!(fs::read_link(&link).unwrap(), Path::new(round));
        }
        assert_eq!(names_in(dir.path()).unwrap(), ["file", "link"]);
    }

    #[test]
    fn what_a_full_disk_refuses_waits_in_memory_and_is_said_with_a_hint() {
        // Every write to this device fails as on a full disk; it cannot be cut, so it is not opened through `open`.
        let path = Path::new("/dev/full");
        let Ok(disk) = LineSync::open(path) else {
            return;
        };
        let mut lines = LineFile { disk };
        lines.append("record").unwrap();
        for problem in [lines.disk.refused().unwrap(), lines.disk.flush().unwrap_err()] {
            assert!(problem.sentence.contains("cannot write /dev/full: "), "{problem}");
        }
        let end = lines.disk.end();
        assert!(end.torn && end.length == 0, "the failed line must be cut off before the next");
        assert_eq!(end.waiting, b"record\n");
        drop(end);
        let long = "x".repeat(WAITING_LIMIT_BYTES - 8);
        lines.append(&long).unwrap();
        let problem = lines.append("one too many").unwrap_err();
        assert!(problem.sentence.starts_with("cannot write /dev/full: "), "{problem}");
    }

    #[test]
    fn lines_that_waited_come_in_their_order_when_there_is_room_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lines");
        let mut lines = LineFile::open(&path, 0).unwrap();
        lines.append("one").unwrap();
        // A disk that has refused a line is left alone until somebody asks.
        let full = io_problem("write", &path, &ErrorKind::StorageFull.into());
        lines.disk.end().refused = Some(full.clone());
        lines.append("two").unwrap();
        assert_eq!(
            (fs::read_to_string(&path).unwrap().as_str(), lines.disk.refused()),
            ("one\n", Some(full))
        );
        lines.keep("three").unwrap();
        lines.on_disk().sync().unwrap();
        assert_eq!(lines.disk.refused(), None);
        lines.append("four").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "one\ntwo\nthree\nfour\n");
    }

    #[test]
    fn what_the_user_can_mend_has_a_hint() {
        let cases = [
            (ErrorKind::PermissionDenied, Some("--run-dir")),
            (ErrorKind::ReadOnlyFilesystem, Some("--run-dir")),
            (ErrorKind::StorageFull, Some("free some space")),
            (ErrorKind::NotADirectory, None),
        ];
        for (kind, hint) in cases {
            let problem = io_problem("write", Path::new("runs/a/job.toml"), &kind.into());
            assert_eq!(problem.sentence, format!("cannot write runs/a/job.toml: {kind}"));
            match hint {
                Some(part) => assert!(problem.hint.unwrap().contains(part)),
                None => assert_eq!(problem.hint, None),
            }
        }
    }

    #[test]
    fn a_torn_line_is_cut_before_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lines");
        let mut lines = LineFile::open(&path, 0).unwrap();
        lines.append("one").unwrap();
        fs::write(&path, "one\ntw").unwrap();
        lines.disk.end().torn = true;
        lines.append("three").unwrap();
        lines.on_disk().sync().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "one\nthree\n");
    }

    #[test]
    fn a_temporary_name_tells_whose_it_is() {
        assert_eq!(temporary_path(Path::new("a/job.toml")), Path::new("a/.job.toml.tmp"));
        assert_eq!(temporary_of(".job.toml.tmp"), Some("job.toml"));
        assert_eq!(temporary_of("job.toml.tmp"), None);
    }
}
