//! The streams between the processes of a run: TCP, or TLS over it where the run has a certificate.
//!
//! Here and nowhere else a socket becomes a stream of a run. Whoever has the stream does not know which it is:
//!
//! | stream | plane | who uses it |
//! |---|---|---|
//! | [`ControlStream`] | control | tasks, by tokio |
//! | [`DataStream`] | data | threads, that never wait unless they say so |
//!
//! All processes of a run have one certificate with its key ([`Tls`]), and each takes exactly this certificate of the
//! other side: who has the key belongs to the run. So there is no authority, no host name and no date that could be wrong.
//! The run token is proved inside the stream, and its proof holds for this stream only ([`ControlStream::bind`]): whoever has the
//! key but not the token cannot pass a proof on between two others.
//!
//! Without the feature `tls` nobody can have a [`Tls`], and both streams are sockets.
#![forbid(unsafe_code)]

#[cfg(not(feature = "tls"))]
mod absent;
mod control;
mod data;
#[cfg(feature = "tls")]
mod tls;

use std::io;
use std::os::fd::AsFd;

use protocol::frame::UNACKNOWLEDGED_LIMIT;
use rustix::net::sockopt::{set_tcp_nodelay, set_tcp_user_timeout};

#[cfg(not(feature = "tls"))]
pub use absent::{Tls, available, new_certificate};
pub use control::ControlStream;
pub use data::DataStream;
#[cfg(feature = "tls")]
pub use tls::{Tls, available, new_certificate};

/// Which end of a connection this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The one that connected.
    Opener,
    /// The one that accepted.
    Answerer,
}

/// What every connection of a run asks of TCP.
fn prepare(tcp: &impl AsFd) -> io::Result<()> {
    set_tcp_nodelay(tcp, true)?;
    Ok(set_tcp_user_timeout(tcp, UNACKNOWLEDGED_LIMIT.as_millis() as u32)?)
}
