//! Signals and the end of standard input as requests to stop.

use std::io::Read;

use protocol::problem::Problem;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{Receiver, channel};

/// One value for each SIGINT, SIGTERM or SIGUSR1, and, if `watch_stdin`, one when standard input ends: a supervisor
/// that is gone cannot be heard, but its pipe closes. A terminal that goes away (SIGHUP) is no request: the run that
/// was started from it goes on.
pub(crate) fn stop_requests(watch_stdin: bool) -> Result<Receiver<()>, Problem> {
    let (requests, received) = channel(8);
    let listen =
        |kind| signal(kind).map_err(|error| Problem::failed(format!("cannot listen for signals: {error}")));
    // Once somebody listens, the signal has lost its default for good.
    drop(listen(SignalKind::hangup())?);
    for kind in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::user_defined1()] {
        let mut signals = listen(kind)?;
        let requests = requests.clone();
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                let _ = requests.send(()).await;
            }
        });
    }
    if watch_stdin {
        // A thread of its own: a read that never returns must not hold up the end of the process.
        std::thread::spawn(move || {
            let mut buffer = [0; 64];
            while matches!(std::io::stdin().read(&mut buffer), Ok(1..)) {}
            let _ = requests.blocking_send(());
        });
    }
    Ok(received)
}
