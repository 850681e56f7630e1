//! TLS settings of servers and clients, from PEM files.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tonic::transport::{Certificate, ClientTlsConfig, Identity, ServerTlsConfig};

use crate::ServiceError;

/// Time limit for a TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// PEM files of a certificate chain and its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PemPair {
    /// Certificate chain, leaf first.
    pub certificate: PathBuf,
    /// Private key.
    pub key: PathBuf,
}

/// TLS settings of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerTls {
    /// The server's certificate.
    pub identity: PemPair,
    /// Authority that must have signed client certificates; `None`: clients need no certificate.
    pub client_ca: Option<PathBuf>,
}

/// TLS settings of a client (`https://` addresses).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClientTls {
    /// Trusted authority; `None`: the system's authorities.
    pub ca: Option<PathBuf>,
    /// The client's certificate, if the server requires one.
    pub identity: Option<PemPair>,
}

impl ServerTls {
    pub(crate) fn load(&self) -> Result<ServerTlsConfig, ServiceError> {
        let mut tls = ServerTlsConfig::new().identity(self.identity.load()?).timeout(HANDSHAKE_TIMEOUT);
        if let Some(ca) = &self.client_ca {
            tls = tls.client_ca_root(certificate(ca)?);
        }
        Ok(tls)
    }
}

impl ClientTls {
    pub(crate) fn load(&self) -> Result<ClientTlsConfig, ServiceError> {
        let mut tls = ClientTlsConfig::new().timeout(HANDSHAKE_TIMEOUT);
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
    let hint = "tls.dir must be a folder with tls.crt, tls.key and ca.crt, or with one such folder per role, as created by `unveil tls init`";
    let missing = |e| ServiceError::Setup(format!("TLS: {}: {e}; {hint}", path.display()));
    let bytes = std::fs::read(path).map_err(missing)?;
    let is_pem = bytes.windows(11).any(|w| w == b"-----BEGIN ");
    if is_pem { Ok(bytes) } else { Err(ServiceError::Setup(format!("TLS: {} is not a PEM file", path.display()))) }
}
