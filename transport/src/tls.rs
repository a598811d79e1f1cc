//! TLS by rustls: who is let in, and what its errors mean. The cryptography is ring's.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use protocol::handshake::Token;
use protocol::problem::Problem;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, date_time_ymd};
use rustix::event::PollFlags;
use rustix::net::SendFlags;
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, ring, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::NoServerSessionStorage;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    AlertDescription, CertificateError, ClientConfig, ClientConnection, Connection, ConnectionCommon,
    DigitallySignedStruct, DistinguishedName as Name, Error, PeerIncompatible, ServerConfig,
    ServerConnection, SideData, SignatureScheme, version,
};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use crate::Side;
use crate::data::{receive, send, wait};

/// The name in every certificate, of no meaning: TLS asks for one.
const NAME: &str = "lockstep";

/// What a secret is drawn from a session for.
const EXPORTER_LABEL: &[u8] = b"EXPORTER-lockstep-token";

const SAME_FOR_ALL: &str = "give every process of the run the same --tls FILE, or none of them";

/// What lets a process into the streams of a run, at both ends: the run's certificate and its key.
#[derive(Debug, Clone)]
pub struct Tls {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

/// Whether this build has TLS: it has.
///
/// # Errors
/// None.
pub fn available() -> Result<(), Problem> {
    Ok(())
}

/// A new certificate that signs itself, and its key, as PEM text. It does not expire: whoever has its key is let in for as
/// long as a run is given it.
///
/// # Errors
/// The system has no randomness to give.
pub fn new_certificate() -> Result<String, Problem> {
    let failed = |error: rcgen::Error| Problem::failed(format!("cannot make a certificate: {error}"));
    let key = KeyPair::generate().map_err(failed)?;
    let mut params = CertificateParams::new([NAME.to_owned()]).map_err(failed)?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, NAME);
    // By RFC 5280 the date of a certificate that does not end.
    params.not_after = date_time_ymd(9999, 12, 31);
    let certificate = params.self_signed(&key).map_err(failed)?;
    Ok(certificate.pem() + &key.serialize_pem())
}

impl Tls {
    /// From the text of [`new_certificate`], or of any certificate and its key. `name` is where the text comes from.
    ///
    /// # Errors
    /// The text does not hold both, or they do not belong together.
    pub fn from_pem(text: &str, name: &str) -> Result<Self, Problem> {
        let refused = |cause: String| {
            Problem::usage(format!("{name} holds no certificate with its key: {cause}"))
                .hint("`lockstep cert FILE` makes one")
        };
        let certificate = CertificateDer::from_pem_slice(text.as_bytes())
            .map_err(|error| refused(format!("certificate: {error}")))?;
        let key = PrivateKeyDer::from_pem_slice(text.as_bytes())
            .map_err(|error| refused(format!("key: {error}")))?;
        Self::new(certificate, key).map_err(|error| refused(error.to_string()))
    }

    fn new(certificate: CertificateDer<'static>, key: PrivateKeyDer<'static>) -> Result<Self, Error> {
        let provider = Arc::new(ring::default_provider());
        let only = Arc::new(Only {
            certificate: certificate.clone(),
            algorithms: provider.signature_verification_algorithms,
        });
        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(only.clone())
            .with_client_auth_cert(vec![certificate.clone()], key.clone_key())?;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&version::TLS13])?
            .with_client_cert_verifier(only)
            .with_single_cert(vec![certificate], key)?;
        // Each connection proves the key anew.
        client.resumption = Resumption::disabled();
        client.enable_sni = false;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        Ok(Self { client: Arc::new(client), server: Arc::new(server) })
    }

    fn name() -> ServerName<'static> {
        ServerName::try_from(NAME).expect("it is a name")
    }

    /// The handshake of a control connection.
    pub(crate) async fn control(
        &self,
        tcp: tokio::net::TcpStream,
        side: Side,
    ) -> io::Result<TlsStream<tokio::net::TcpStream>> {
        match side {
            Side::Opener => {
                let connector = TlsConnector::from(self.client.clone());
                connector.connect(Self::name(), tcp).await.map(Into::into).map_err(of_tls)
            }
            Side::Answerer => {
                let acceptor = TlsAcceptor::from(self.server.clone());
                acceptor.accept(tcp).await.map(Into::into).map_err(of_tls)
            }
        }
    }

    /// The handshake of a data-plane connection, that may last until then.
    pub(crate) fn data(&self, tcp: &TcpStream, side: Side, until: Instant) -> io::Result<Session> {
        let connection: Result<Connection, Error> = match side {
            Side::Opener => ClientConnection::new(self.client.clone(), Self::name()).map(Into::into),
            Side::Answerer => ServerConnection::new(self.server.clone()).map(Into::into),
        };
        let mut connection = connection.map_err(explained)?;
        while connection.is_handshaking() || connection.wants_write() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ErrorKind::TimedOut.into());
            }
            let (moved, ready) = if connection.wants_write() {
                (connection.write_tls(&mut NoWait(tcp)), PollFlags::OUT)
            } else {
                (connection.read_tls(&mut NoWait(tcp)), PollFlags::IN)
            };
            match moved {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(_) => process(&mut connection, tcp)?,
                Err(error) if error.kind() == ErrorKind::WouldBlock => wait(tcp, ready, Some(left)),
                Err(error) => return Err(error),
            }
        }
        Ok(Session(Mutex::new(connection)))
    }
}

/// Takes one certificate and no other, of clients and of servers; whoever shows it must sign with its key. Nothing that it
/// says is looked at.
#[derive(Debug)]
struct Only {
    certificate: CertificateDer<'static>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Only {
    fn check(&self, shown: &CertificateDer<'_>) -> Result<(), Error> {
        match *shown == self.certificate {
            true => Ok(()),
            false => Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)),
        }
    }
}

/// How both ends check signatures: two traits of rustls ask for the same three functions.
macro_rules! signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            // There is no TLS 1.2 here to sign for.
            Err(Error::PeerIncompatible(PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig))
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            shown: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            verify_tls13_signature(message, shown, signature, &self.algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.algorithms.supported_schemes()
        }
    };
}

impl ServerCertVerifier for Only {
    fn verify_server_cert(
        &self,
        shown: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(shown).map(|()| ServerCertVerified::assertion())
    }

    signatures!();
}

impl ClientCertVerifier for Only {
    fn root_hint_subjects(&self) -> &[Name] {
        &[]
    }

    fn verify_client_cert(
        &self,
        shown: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(shown).map(|()| ClientCertVerified::assertion())
    }

    signatures!();
}

/// The token bound to a session whose handshake is done: only its two ends can compute this.
pub(crate) fn bound<D: SideData>(token: &Token, session: &ConnectionCommon<D>) -> Token {
    let secret = session.export_keying_material([0; 32], EXPORTER_LABEL, None);
    token.for_channel(&secret.expect("the handshake is done"))
}

/// The state of TLS of a data-plane connection. No thread holds it while it waits for the socket.
#[derive(Debug)]
pub(crate) struct Session(Mutex<Connection>);

impl Session {
    fn lock(&self) -> MutexGuard<'_, Connection> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn bind(&self, token: &Token) -> Token {
        match &*self.lock() {
            Connection::Client(connection) => bound(token, connection),
            Connection::Server(connection) => bound(token, connection),
        }
    }

    pub(crate) fn send(
        &self,
        tcp: &TcpStream,
        parts: &[IoSlice<'_>; 2],
        may_wait: bool,
    ) -> io::Result<Option<usize>> {
        // What is encrypted is in order; nothing is taken before what is there has left.
        if !self.flush(tcp, may_wait)? {
            return Ok(None);
        }
        self.lock().writer().write_vectored(parts).map(Some)
    }

    pub(crate) fn flush(&self, tcp: &TcpStream, may_wait: bool) -> io::Result<bool> {
        loop {
            let mut connection = self.lock();
            if !connection.wants_write() {
                return Ok(true);
            }
            let written = connection.write_tls(&mut NoWait(tcp));
            drop(connection);
            match written {
                Ok(_) => {}
                Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error),
                Err(_) if may_wait => wait(tcp, PollFlags::OUT, None),
                Err(_) => return Ok(false),
            }
        }
    }

    pub(crate) fn receive(&self, tcp: &TcpStream, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let mut connection = self.lock();
        loop {
            match connection.reader().read(buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                read => return read.or_else(end_of_stream).map(Some),
            }
            match connection.read_tls(&mut NoWait(tcp)) {
                Ok(0) => return Ok(Some(0)),
                Ok(_) => process(&mut connection, tcp)?,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }
}

/// Takes in what was read. If it is refused, the other side is told, as far as the socket takes that at once.
fn process(connection: &mut Connection, tcp: &TcpStream) -> io::Result<()> {
    connection.process_new_packets().map(drop).map_err(|error| {
        let _ = connection.write_tls(&mut NoWait(tcp));
        explained(error)
    })
}

/// A socket that never makes anybody wait.
struct NoWait<'a>(&'a TcpStream);

impl Read for NoWait<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        receive(self.0, buffer)?.ok_or_else(|| ErrorKind::WouldBlock.into())
    }
}

impl Write for NoWait<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        send(self.0, parts, SendFlags::DONTWAIT)?.ok_or_else(|| ErrorKind::WouldBlock.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What reading gave. A connection that ends without TLS's own farewell has ended all the same: frames have lengths, and
/// a goodbye is a frame, so nothing that was cut off is taken for whole.
pub(crate) fn read_to_end(read: io::Result<()>) -> io::Result<()> {
    read.or_else(|error| end_of_stream(error).map(drop)).map_err(of_tls)
}

fn end_of_stream(error: io::Error) -> io::Result<usize> {
    if error.kind() == ErrorKind::UnexpectedEof { Ok(0) } else { Err(error) }
}

/// The same error in words for the user, if it is TLS's.
fn of_tls(error: io::Error) -> io::Error {
    error.downcast().map_or_else(|other| other, explained)
}

fn explained(error: Error) -> io::Error {
    let problem = match error {
        Error::InvalidMessage(_) => {
            Problem::failed("what the other side of the connection sent is not TLS").hint(SAME_FOR_ALL)
        }
        Error::InvalidCertificate(_)
        | Error::NoCertificatesPresented
        | Error::AlertReceived(
            AlertDescription::AccessDenied
            | AlertDescription::BadCertificate
            | AlertDescription::CertificateRequired
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnknownCA,
        ) => Problem::failed("the other side of the connection has another certificate").hint(SAME_FOR_ALL),
        other => Problem::failed(format!("TLS: {other}")),
    };
    // A kind that nobody takes for a frame that makes no sense: such a connection is lost, and may be made again.
    io::Error::new(ErrorKind::ConnectionAborted, problem)
}
