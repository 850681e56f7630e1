//! TLS of both sides from PEM files, by rustls.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tonic::transport::{Certificate, ClientTlsConfig, Identity, ServerTlsConfig};

use crate::ServiceError;

/// A TLS handshake that takes longer is given up.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Certificate chain and key, as PEM files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PemPair {
    /// Certificate chain, leaf first.
    pub certificate: PathBuf,
    /// Private key.
    pub key: PathBuf,
}

/// How a server speaks TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerTls {
    /// Its own certificate.
    pub identity: PemPair,
    /// Authority whose client certificates are required; none = clients need none.
    pub client_ca: Option<PathBuf>,
}

/// How a client speaks TLS (`https://` addresses).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClientTls {
    /// Authority that is trusted; none = the system's.
    pub ca: Option<PathBuf>,
    /// Its own certificate, where the server asks for one.
    pub identity: Option<PemPair>,
}

impl ServerTls {
    pub(crate) fn load(&self) -> Result<ServerTlsConfig, ServiceError> {
        let mut tls = ServerTlsConfig::new().identity(self.identity.load()?).timeout(HANDSHAKE);
        if let Some(ca) = &self.client_ca {
            tls = tls.client_ca_root(certificate(ca)?);
        }
        Ok(tls)
    }
}

impl ClientTls {
    pub(crate) fn load(&self) -> Result<ClientTlsConfig, ServiceError> {
        let mut tls = ClientTlsConfig::new().timeout(HANDSHAKE);
        tls = match &self.ca {
            Some(ca) => tls.ca_certificate(certificate(ca)?),
            None => tls.with_native_roots(),
        };
        Ok(match &self.identity {
            Some(pair) => tls.identity(pair.load()?),
            None => tls,
        })
    }
}

impl PemPair {
    fn load(&self) -> Result<Identity, ServiceError> {
        Ok(Identity::from_pem(read(&self.certificate)?, read(&self.key)?))
    }
}

fn certificate(path: &Path) -> Result<Certificate, ServiceError> {
    Ok(Certificate::from_pem(read(path)?))
}

fn read(path: &Path) -> Result<Vec<u8>, ServiceError> {
    let hint =
        "tls.dir names a folder with tls.crt, tls.key and ca.crt, or one of these per role, as `unveil tls init` makes";
    let missing = |e| ServiceError::Setup(format!("TLS: {}: {e}; {hint}", path.display()));
    let bytes = std::fs::read(path).map_err(missing)?;
    let is_pem = bytes.windows(11).any(|w| w == b"-----BEGIN ");
    if is_pem { Ok(bytes) } else { Err(ServiceError::Setup(format!("TLS: {} is no PEM file", path.display()))) }
}
