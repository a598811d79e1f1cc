//! The stream of a data-plane connection: shared by threads, one that sends and others that read.

use std::io::{self, IoSlice};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use protocol::handshake::Token;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, recv, sendmsg};

use crate::{Side, Tls, prepare};

/// One data-plane connection, at either end. Only one thread at a time may send.
#[derive(Debug)]
pub struct DataStream {
    tcp: TcpStream,
    #[cfg(feature = "tls")]
    session: Option<Box<crate::tls::Session>>,
}

/// A connection as it is, without TLS.
impl From<TcpStream> for DataStream {
    fn from(tcp: TcpStream) -> Self {
        Self {
            tcp,
            #[cfg(feature = "tls")]
            session: None,
        }
    }
}

impl DataStream {
    /// Makes the stream of a connection; with `tls` by its handshake, which may last until then.
    ///
    /// # Errors
    /// The connection breaks, the time is over; or the other side does not speak TLS or has another certificate: then the
    /// error holds a [`Problem`](protocol::problem::Problem).
    pub fn open(tcp: TcpStream, side: Side, tls: Option<&Tls>, until: Instant) -> io::Result<Self> {
        prepare(&tcp)?;
        #[cfg(feature = "tls")]
        {
            let session = tls.map(|tls| tls.data(&tcp, side, until).map(Box::new)).transpose()?;
            Ok(Self { tcp, session })
        }
        #[cfg(not(feature = "tls"))]
        match tls {
            None => Ok(Self { tcp }),
            Some(nobody) => {
                let _ = (side, until);
                match nobody.0 {}
            }
        }
    }

    /// The token as it is to be proved over this stream.
    pub fn bind(&self, token: &Token) -> Token {
        #[cfg(feature = "tls")]
        if let Some(session) = &self.session {
            return session.bind(token);
        }
        token.clone()
    }

    /// The connection below: for what a stream without TLS can do besides.
    pub fn tcp(&self) -> &TcpStream {
        &self.tcp
    }

    /// Whether it may hold bytes that [`wait_readable`](Self::wait_readable) does not see, since they are read and decrypted
    /// already: then all reading must be one thread's, which waits only when there was nothing to read.
    pub fn holds_bytes(&self) -> bool {
        #[cfg(feature = "tls")]
        return self.session.is_some();
        #[cfg(not(feature = "tls"))]
        false
    }

    /// Takes some bytes of these parts and gives how many; `None` if it takes none for the moment and must not wait. What it
    /// took has left with the next [`flush`](Self::flush).
    ///
    /// # Errors
    /// The connection is broken.
    pub fn send(&self, parts: &[IoSlice<'_>; 2], may_wait: bool) -> io::Result<Option<usize>> {
        #[cfg(feature = "tls")]
        if let Some(session) = &self.session {
            return session.send(&self.tcp, parts, may_wait);
        }
        let flags = if may_wait { SendFlags::empty() } else { SendFlags::DONTWAIT };
        send(&self.tcp, parts, flags)
    }

    /// Whether everything that was taken has left; it waits for that if it may.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn flush(&self, may_wait: bool) -> io::Result<bool> {
        #[cfg(feature = "tls")]
        if let Some(session) = &self.session {
            return session.flush(&self.tcp, may_wait);
        }
        let _ = may_wait; // A socket holds nothing back.
        Ok(true)
    }

    /// Receives what is there, without waiting, and gives how much; 0 is the end of the stream, `None` nothing yet.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        #[cfg(feature = "tls")]
        if let Some(session) = &self.session {
            return session.receive(&self.tcp, buffer);
        }
        receive(&self.tcp, buffer)
    }

    /// Waits until there is something to read (an end of stream is), or for so long; `None` is for ever. It may return
    /// early: whoever finds nothing to read comes again.
    pub fn wait_readable(&self, limit: Option<Duration>) {
        wait(&self.tcp, PollFlags::IN, limit);
    }

    /// Ends the connection, whoever waits for it.
    pub fn shutdown(&self) {
        // Fails only if it is closed already.
        let _ = self.tcp.shutdown(Shutdown::Both);
    }
}

/// As [`DataStream::send`].
pub(crate) fn send(tcp: &TcpStream, parts: &[IoSlice<'_>], flags: SendFlags) -> io::Result<Option<usize>> {
    loop {
        match sendmsg(tcp, parts, &mut SendAncillaryBuffer::default(), flags | SendFlags::NOSIGNAL) {
            Ok(count) => return Ok(Some(count)),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
}

/// As [`DataStream::receive`].
pub(crate) fn receive(tcp: &TcpStream, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    loop {
        match recv(tcp, &mut *buffer, RecvFlags::DONTWAIT) {
            Ok((count, _)) => return Ok(Some(count)),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Waits until the socket is ready for this, has ended, or for so long.
pub(crate) fn wait(tcp: &TcpStream, what: PollFlags, limit: Option<Duration>) {
    let limit = limit.map(|limit| Timespec::try_from(limit).expect("a limit of less than an age"));
    let _ = poll(&mut [PollFd::new(tcp, what)], limit.as_ref());
}
