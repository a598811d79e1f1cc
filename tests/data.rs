//! `lockstep data`: what is fetched is right or is not there.

mod common;

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use common::{Ended, Folder, Process, files_below, lockstep, skipped};

/// What a server answers to a GET of a path.
type Answers = dyn Fn(&str) -> Vec<u8> + Send + Sync;

/// A server of files on this machine.
struct Server {
    url: String,
    requests: Arc<AtomicU32>,
}

impl Server {
    fn start(answers: impl Fn(&str) -> Vec<u8> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let (requests, answers): (_, Arc<Answers>) = (Arc::new(AtomicU32::new(0)), Arc::new(answers));
        let counted = requests.clone();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let mut lines = BufReader::new(&stream).lines().map_while(Result::ok);
                let path = lines.next().unwrap_or_default().split(' ').nth(1).unwrap_or("/").to_owned();
                lines.by_ref().find(String::is_empty);
                counted.fetch_add(1, Ordering::Relaxed);
                let _ = stream.write_all(&answers(&path));
            }
        });
        Self { url, requests }
    }

    fn requests(&self) -> u32 {
        self.requests.load(Ordering::Relaxed)
    }
}

/// A response whose header promises `promised` bytes.
fn response(status: &str, promised: usize, body: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {promised}\r\nConnection: close\r\n\r\n");
    [head.as_bytes(), body].concat()
}

fn data(words: &[&str], home: &Path) -> Ended {
    let mut command = lockstep();
    for variable in
        ["LOCKSTEP_DATA_DIR", "XDG_CACHE_HOME", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"]
    {
        command.env_remove(variable);
    }
    Process::start(command.arg("data").args(words).env("HOME", home)).end()
}

/// A file of the real data, if this machine has them; else says so.
fn real(test: &str, path: &str) -> Option<Vec<u8>> {
    let dir = std::env::var_os("LOCKSTEP_DATA_DIR");
    if dir.is_none() {
        skipped(test, "LOCKSTEP_DATA_DIR is not set");
    }
    Some(std::fs::read(Path::new(&dir?).join(path)).unwrap())
}

#[test]
fn what_a_server_has_wrong_is_said_and_leaves_nothing() {
    let folder = Folder::new();
    let refused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let servers = [
        (Server::start(|_| response("404 Not Found", 4, b"none")), "http status: 404"),
        (Server::start(|_| response("200 OK", 6, b"not it")), "it has content with sha256 "),
        (
            Server::start(|_| response("200 OK", 1_115_394, b"First Citizen:")),
            "it broke off after 14 bytes: ",
        ),
        (Server::start(|_| response("200 OK", 1 << 40, &[0; 1000])), "it broke off after 1000 bytes: "),
        (Server::start(|_| b"no HTTP at all\r\n\r\n".to_vec()), "http parse fail"),
        (
            Server::start(|_| response("200 OK", 4, &[0x1f, 0x8b, 8, 0])),
            "it begins as gzip but cannot be unpacked",
        ),
        (Server { url: format!("http://{refused}/"), requests: Arc::default() }, "onnection refused"),
    ];
    for (server, why) in servers {
        let ended = data(&["fetch", "tinyshakespeare", "--mirror", &server.url], folder.path());
        println!("{}", ended.stderr);
        let sentence = format!("error: cannot fetch input.txt: {}input.txt: ", server.url);
        ended.expect_failure(1, &[&sentence, why, "hint: name another server with --mirror URL"]);
        ended.expect_no_panic();
        assert_eq!(files_below(folder.path()), [""; 0].map(PathBuf::from), "{sentence}");
    }
}

#[test]
fn a_text_is_fetched_once_and_then_found() {
    let Some(text) = real("data::a_text_is_fetched_once_and_then_found", "tinyshakespeare/input.txt") else {
        return;
    };
    let folder = Folder::new();
    let served = text.clone();
    let server = Server::start(move |path| match path {
        "/input.txt" => response("200 OK", served.len(), &served),
        _ => response("404 Not Found", 0, b""),
    });
    // What is there and wrong is replaced.
    let path = folder.path().join(".cache/lockstep/tinyshakespeare/input.txt");
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, "half of i").unwrap();
    let wrong = data(&["verify", "tinyshakespeare"], folder.path());
    wrong.expect_failure(1, &["error: 1 of 1 are missing or wrong", "lockstep data fetch"]);
    assert!(
        wrong.stdout.contains("wrong: ") && wrong.stdout.contains("has content with sha256"),
        "{wrong:?}"
    );

    let empty = Server::start(|_| response("404 Not Found", 0, b""));
    let fetch = ["fetch", "tinyshakespeare", "--mirror", &empty.url, "--mirror", &server.url];
    let fetched = data(&fetch, folder.path());
    fetched.expect_exit(0);
    assert_eq!(fetched.stderr, format!("{}input.txt: http status: 404; trying the next mirror\n", empty.url));
    assert_eq!(fetched.stdout, format!("fetched and verified: {}\n", path.display()));
    assert!(std::fs::read(&path).unwrap() == text);
    assert_eq!(files_below(folder.path()), std::slice::from_ref(&path));

    let again = data(&fetch, folder.path());
    again.expect_exit(0);
    assert_eq!(again.stdout, format!("already there and right: {}\n", path.display()));
    assert_eq!(server.requests(), 1);
    data(&["verify", "tinyshakespeare"], folder.path()).expect_exit(0);
}

#[test]
fn what_is_missing_of_a_set_is_fetched() {
    let names = ["train-images", "train-labels", "t10k-images", "t10k-labels"];
    let published = |stem: &str| {
        let kind = if stem.ends_with("images") { "idx3" } else { "idx1" };
        format!("{stem}-{kind}-ubyte.gz")
    };
    let test = "data::what_is_missing_of_a_set_is_fetched";
    let Some(files) = names
        .map(|stem| {
            Some((format!("/{}", published(stem)), real(test, &format!("mnist/{}", published(stem)))?))
        })
        .into_iter()
        .collect::<Option<Vec<_>>>()
    else {
        return;
    };
    let folder = Folder::new();
    let server = Server::start(move |path| {
        let (_, content) = files.iter().find(|(name, _)| name == path).unwrap();
        response("200 OK", content.len(), content)
    });
    let target = folder.path().join("data");
    let target_text = target.to_str().unwrap();
    let fetch = ["fetch", "mnist", "--data-dir", target_text, "--mirror", server.url.trim_end_matches('/')];
    data(&fetch, folder.path()).expect_exit(0);
    assert_eq!(files_below(folder.path()).len(), 4);
    std::fs::remove_file(target.join("mnist").join(published("t10k-labels"))).unwrap();
    let again = data(&fetch, folder.path());
    again.expect_exit(0);
    assert_eq!(again.stdout.matches("already there and right").count(), 3, "{}", again.stdout);
    assert_eq!(again.stdout.matches("fetched and verified").count(), 1, "{}", again.stdout);
    assert_eq!(server.requests(), 5);
    data(&["verify", "mnist", "--data-dir", target_text], folder.path()).expect_exit(0);
}

#[test]
fn known_data_are_listed_with_their_places() {
    let folder = Folder::new();
    let listed = data(&["list"], folder.path());
    listed.expect_exit(0);
    let cache = folder.path().join(".cache/lockstep");
    for part in [
        "embedded         text, version ",
        "embedded         labelled lines, version ",
        "embedded         images, version ",
        "    compiled in",
        &format!("tinyshakespeare was not found, looked at {}/tinyshakespeare/input.txt", cache.display()),
        &format!("mnist was not found, looked at {}/mnist", cache.display()),
        "hint: get it with `lockstep data fetch mnist`",
    ] {
        assert!(listed.stdout.contains(part), "the list lacks '{part}':\n{}", listed.stdout);
    }
    data(&["verify", "embedded"], folder.path()).expect_exit(0);
    data(&["verify"], folder.path()).expect_failure(1, &["error: 2 of 5 are missing or wrong"]);
}

#[test]
fn what_cannot_be_fetched_is_said() {
    let folder = Folder::new();
    let cases: [(&[&str], i32, &str); 4] = [
        (&["fetch", "minst"], 2, "no known data set is called 'minst'\nhint: did you mean 'mnist'?"),
        (&["fetch", "embedded"], 2, "embedded data are compiled in: there is nothing to fetch\nhint: "),
        (&["verify", "minst"], 2, "did you mean 'mnist'?"),
        (
            &["fetch", "tinyshakespeare", "--mirror", "nowhere"],
            1,
            "cannot fetch input.txt: nowhere/input.txt: ",
        ),
    ];
    for (words, code, part) in cases {
        data(words, folder.path()).expect_failure(code, &[part]);
    }
    assert_eq!(files_below(folder.path()), [""; 0].map(PathBuf::from));
    let mut command = lockstep();
    command.args(["data", "fetch", "tinyshakespeare"]).env_clear();
    Process::start(&mut command)
        .end()
        .expect_failure(2, &["no folder to put tinyshakespeare into is known", "--data-dir"]);
}
