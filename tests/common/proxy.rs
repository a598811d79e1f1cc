//! A network between two processes that can be cut, in one direction or both, slowed down, and broken.
//!
//! What is held back arrives later, as with TCP over a lossy line; nothing is left out in the middle.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// One of the two directions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From whoever connected.
    There = 0,
    /// To whoever connected.
    Back = 1,
}

/// Listens in somebody's place, and passes on what comes.
pub(crate) struct Proxy {
    /// `HOST:PORT` to connect to instead.
    pub(crate) address: String,
    line: Arc<Line>,
}

#[derive(Default)]
struct Line {
    is_cut: [AtomicBool; 2],
    /// Everything takes this long.
    delay_ms: AtomicU64,
    /// Bytes that get through in a second; 0: any number.
    bytes_per_second: AtomicU64,
    /// Bytes that have got through.
    passed: [AtomicU64; 2],
    streams: Mutex<Vec<TcpStream>>,
    /// What was heard, by direction, since somebody listens.
    heard: Mutex<Option<[Vec<u8>; 2]>>,
}

impl Proxy {
    /// Listens on `HOST:PORT`, port 0 for any free one, and connects to `target` for each connection.
    pub(crate) fn start(listen: &str, target: &str) -> Self {
        let listener = TcpListener::bind(listen).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (line, target) = (Arc::new(Line::default()), target.to_owned());
        let shared = line.clone();
        // Ends with the test's process.
        thread::spawn(move || {
            for near in listener.incoming().flatten() {
                let Ok(far) = TcpStream::connect(&target) else { continue };
                // What it delays, it delays on purpose.
                let _ = (near.set_nodelay(true), far.set_nodelay(true));
                let copies = [near.try_clone().unwrap(), far.try_clone().unwrap()];
                shared.streams.lock().unwrap().extend(copies);
                let ends = [
                    (near.try_clone().unwrap(), far.try_clone().unwrap(), Direction::There),
                    (far, near, Direction::Back),
                ];
                for (from, to, direction) in ends {
                    let line = shared.clone();
                    thread::spawn(move || line.pass_on(from, to, direction));
                }
            }
        });
        Self { address, line }
    }

    /// Nothing gets through in this direction until it is [mended](Self::mend).
    pub(crate) fn cut(&self, direction: Direction) {
        self.line.is_cut[direction as usize].store(true, Ordering::SeqCst);
    }

    /// What was held back gets through, and all that follows.
    pub(crate) fn mend(&self) {
        self.line.is_cut.iter().for_each(|is_cut| is_cut.store(false, Ordering::SeqCst));
    }

    /// Everything takes so long, and no more than this gets through in a second.
    pub(crate) fn slow_down(&self, delay: Duration, bytes_per_second: u64) {
        self.line.delay_ms.store(delay.as_millis() as u64, Ordering::SeqCst);
        self.line.bytes_per_second.store(bytes_per_second, Ordering::SeqCst);
    }

    /// Breaks all connections.
    pub(crate) fn break_all(&self) {
        for stream in self.line.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Keeps what passes from now on.
    pub(crate) fn record(&self) {
        *self.line.heard.lock().unwrap() = Some(Default::default());
    }

    /// All that passed since, first in the one direction, then in the other.
    pub(crate) fn heard(&self) -> Vec<u8> {
        self.line.heard.lock().unwrap().take().expect("it records").concat()
    }

    /// Bytes that have got through in this direction.
    pub(crate) fn passed(&self, direction: Direction) -> u64 {
        self.line.passed[direction as usize].load(Ordering::SeqCst)
    }
}

impl Line {
    /// Passes on what comes from one end to the other, until one of them ends.
    fn pass_on(&self, mut from: TcpStream, mut to: TcpStream, direction: Direction) {
        let mut buffer = vec![0; 16 << 10];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            let rate = self.bytes_per_second.load(Ordering::SeqCst);
            let sending = (count as u64 * 1000).checked_div(rate).unwrap_or(0);
            thread::sleep(Duration::from_millis(self.delay_ms.load(Ordering::SeqCst) + sending));
            while self.is_cut[direction as usize].load(Ordering::SeqCst) {
                thread::sleep(Duration::from_millis(1));
            }
            if let Some(heard) = &mut *self.heard.lock().unwrap() {
                heard[direction as usize].extend_from_slice(&buffer[..count]);
            }
            if to.write_all(&buffer[..count]).is_err() {
                break;
            }
            self.passed[direction as usize].fetch_add(count as u64, Ordering::SeqCst);
        }
        // The end of a connection is held back as all else.
        while self.is_cut[direction as usize].load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(1));
        }
        let _ = to.shutdown(Shutdown::Write);
    }
}
