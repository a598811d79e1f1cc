//! The stream of a control connection.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use protocol::handshake::Token;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use crate::{Side, Tls, prepare};

/// One control connection, at either end.
#[derive(Debug)]
pub struct ControlStream(Inner);

#[derive(Debug)]
enum Inner {
    Plain(TcpStream),
    #[cfg(feature = "tls")]
    Tls(Box<tokio_rustls::TlsStream<TcpStream>>),
}

impl ControlStream {
    /// Makes the stream of a connection; with `tls` by its handshake. How long it may take is for the caller to say.
    ///
    /// # Errors
    /// The connection breaks; or the other side does not speak TLS or has another certificate: then the error holds a
    /// [`Problem`](protocol::problem::Problem).
    pub async fn open(tcp: TcpStream, side: Side, tls: Option<&Tls>) -> io::Result<Self> {
        prepare(&tcp)?;
        match tls {
            None => Ok(Self(Inner::Plain(tcp))),
            #[cfg(feature = "tls")]
            Some(tls) => Ok(Self(Inner::Tls(Box::new(tls.control(tcp, side).await?)))),
            #[cfg(not(feature = "tls"))]
            Some(nobody) => {
                let _ = side;
                match nobody.0 {}
            }
        }
    }

    /// The token as it is to be proved over this stream.
    pub fn bind(&self, token: &Token) -> Token {
        match &self.0 {
            Inner::Plain(_) => token.clone(),
            #[cfg(feature = "tls")]
            Inner::Tls(stream) => match &**stream {
                tokio_rustls::TlsStream::Client(stream) => crate::tls::bound(token, stream.get_ref().1),
                tokio_rustls::TlsStream::Server(stream) => crate::tls::bound(token, stream.get_ref().1),
            },
        }
    }
}

impl AsyncRead for ControlStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.0 {
            Inner::Plain(stream) => Pin::new(stream).poll_read(context, buffer),
            #[cfg(feature = "tls")]
            Inner::Tls(stream) => Pin::new(stream).poll_read(context, buffer).map(crate::tls::read_to_end),
        }
    }
}

impl AsyncWrite for ControlStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.0 {
            Inner::Plain(stream) => Pin::new(stream).poll_write(context, bytes),
            #[cfg(feature = "tls")]
            Inner::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.0 {
            Inner::Plain(stream) => Pin::new(stream).poll_write_vectored(context, parts),
            #[cfg(feature = "tls")]
            Inner::Tls(stream) => Pin::new(stream).poll_write_vectored(context, parts),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.0 {
            Inner::Plain(stream) => Pin::new(stream).poll_flush(context),
            #[cfg(feature = "tls")]
            Inner::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.0 {
            Inner::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            #[cfg(feature = "tls")]
            Inner::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}
