//! Getting named data from where they are published.
//!
//! A file gets its name only when its unpacked content has the digest that is compiled in, so it does not matter
//! who served it or how it travelled, and nothing half-fetched is ever found by a run.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use protocol::problem::Problem;

use super::file;
use super::known::Known;
use super::locate::{MNIST, Places, TINYSHAKESPEARE_SHA256};
use crate::hex::sha256_hex;
use crate::store::files::{create_dir, write_beside};

/// More than any of these files has, packed or not.
const LIMIT_BYTES: u64 = 64 << 20;

const MNIST_MIRRORS: [&str; 2] =
    ["https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"];

const TINYSHAKESPEARE_MIRRORS: [&str; 1] =
    ["https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"];

/// What happens while data are fetched, to be shown.
#[derive(Debug)]
pub enum Progress<'a> {
    /// A file is there and right; nothing is done.
    Present(&'a Path),
    /// So much of a file has come, of so much if its server says so.
    Received {
        /// Its address.
        url: &'a str,
        /// Bytes so far.
        bytes: u64,
        /// Bytes in all.
        total: Option<u64>,
    },
    /// A mirror was given up; the next one is tried.
    Failed {
        /// The address that was tried.
        url: &'a str,
        /// Why.
        why: &'a str,
    },
    /// A file has been verified and has its name.
    Written(&'a Path),
}

/// What is fetched, and to where.
#[derive(Debug, Clone)]
pub struct Request {
    /// `tinyshakespeare` or `mnist`.
    pub name: String,
    /// The folder that is to hold it; else the user's cache, unless it lies in some other known place.
    pub data_dir: Option<PathBuf>,
    /// Folders on servers, one after another, instead of the known ones if there are any.
    pub mirrors: Vec<String>,
}

/// One file as it is published.
struct Published {
    name: String,
    /// Of the unpacked content.
    sha256: &'static str,
}

/// Fetches what is not there yet.
///
/// # Errors
/// There is nothing of this name to fetch; no mirror has a file with the expected content; it cannot be written.
pub fn fetch(
    request: &Request,
    places: &Places,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<(), Problem> {
    let (known, files, mirrors) = published(&request.name)?;
    let places = match &request.data_dir {
        Some(dir) => Places { data_dir: Some(dir.clone()), ..Places::default() },
        None => places.clone(),
    };
    if let Ok(present) = known.files(&places)
        && known.verify(&places).iter().all(|part| part.result.is_ok())
    {
        present.iter().for_each(|(path, _)| progress(Progress::Present(path)));
        return Ok(());
    }
    let folder = request.data_dir.as_ref().or(places.cache_dir.as_ref()).ok_or_else(|| {
        Problem::usage(format!("no folder to put {} into is known", known.name()))
            .hint("name one with --data-dir")
    })?;
    let folder = folder.join(known.name());
    let mirrors = if request.mirrors.is_empty() { mirrors } else { request.mirrors.clone() };
    for file in files {
        let path = folder.join(&file.name);
        if file::read(&path, LIMIT_BYTES).is_ok_and(|bytes| sha256_hex([&bytes[..]]) == file.sha256) {
            progress(Progress::Present(&path));
            continue;
        }
        let content = from_mirrors(&file, &mirrors, progress)?;
        create_dir(&folder)?;
        write_beside(&path, &content)?;
        progress(Progress::Written(&path));
    }
    Ok(())
}

fn published(name: &str) -> Result<(Known, Vec<Published>, Vec<String>), Problem> {
    let owned = |mirrors: &[&str]| mirrors.iter().map(|mirror| (*mirror).to_owned()).collect();
    match Known::named(name)?[0] {
        known @ Known::Tinyshakespeare => {
            let text = Published { name: "input.txt".to_owned(), sha256: TINYSHAKESPEARE_SHA256 };
            Ok((known, vec![text], owned(&TINYSHAKESPEARE_MIRRORS)))
        }
        known @ Known::Mnist => {
            let files = MNIST.iter().map(|file| {
                let [name, ..] = file.names();
                Published { name, sha256: file.sha256 }
            });
            Ok((known, files.collect(), owned(&MNIST_MIRRORS)))
        }
        Known::EmbeddedText | Known::EmbeddedFields | Known::EmbeddedDigits => {
            Err(Problem::usage("embedded data are compiled in: there is nothing to fetch")
                .hint("lockstep data fetch tinyshakespeare, or mnist"))
        }
    }
}

/// The content of a file from the first mirror that has the right one.
fn from_mirrors(
    file: &Published,
    mirrors: &[String],
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Vec<u8>, Problem> {
    let mut failures = Vec::new();
    for mirror in mirrors {
        let url = format!("{}/{}", mirror.trim_end_matches('/'), file.name);
        match download(&url, progress).and_then(|content| verified(content, file)) {
            Ok(content) => return Ok(content),
            Err(why) => {
                if failures.len() + 1 < mirrors.len() {
                    progress(Progress::Failed { url: &url, why: &why });
                }
                failures.push(format!("{url}: {why}"));
            }
        }
    }
    Err(Problem::failed(format!("cannot fetch {}: {}", file.name, failures.join("; "))).hint(
        "name another server with --mirror URL, or copy the files from elsewhere and name their folder with --data-dir",
    ))
}

fn verified(content: Vec<u8>, file: &Published) -> Result<Vec<u8>, String> {
    let unpacked = file::unpack("it", &content[..], LIMIT_BYTES).map_err(|problem| problem.sentence)?;
    file::compare("it", &[&unpacked], file.sha256).map_err(|problem| problem.sentence)?;
    Ok(content)
}

/// What a server has at `url`, or why it could not be had.
fn download(url: &str, progress: &mut dyn FnMut(Progress<'_>)) -> Result<Vec<u8>, String> {
    let agent = ureq::Agent::config_builder()
        .timeout_connect(Some(Duration::from_secs(15)))
        .timeout_recv_response(Some(Duration::from_secs(30)))
        .timeout_recv_body(Some(Duration::from_secs(600)))
        .build()
        .new_agent();
    let mut response = agent.get(url).call().map_err(|error| error.to_string())?;
    let body = response.body_mut();
    let total = body.content_length();
    let (mut content, mut buffer) = (Vec::new(), [0; 1 << 16]);
    let mut reader = body.as_reader();
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => content.extend_from_slice(&buffer[..count]),
            Err(error) => return Err(format!("it broke off after {} bytes: {error}", content.len())),
        }
        let bytes = content.len() as u64;
        if bytes > LIMIT_BYTES {
            return Err(format!("it is longer than {LIMIT_BYTES} bytes"));
        }
        progress(Progress::Received { url, bytes, total });
    }
    let bytes = content.len() as u64;
    if let Some(total) = total.filter(|&total| total != bytes) {
        return Err(format!("it ended after {bytes} of {total} bytes"));
    }
    Ok(content)
}
