//! How a role of a configuration serves and calls: its certificate, the authority, the token. One place for all roles.
//!
//! Must not know: what the services do.

use unveil_config::{Config, Role, TlsFiles};
use unveil_core::Secret;

use crate::{Callers, ClientOptions, ClientTls, PemPair, ServerTls, ServiceError};

/// How a service of a role is reached.
#[derive(Debug, Clone, Default)]
pub struct Access {
    /// TLS; none = plain HTTP/2.
    pub tls: Option<ServerTls>,
    /// Token that callers must send; none = they need none.
    pub token: Option<Secret>,
    /// The roles that may call it; none = whoever has a certificate, or the token.
    pub callers: Option<Callers>,
    /// Beyond loopback, too, it may listen without TLS.
    pub insecure: bool,
}

impl Access {
    /// That of the service of `role`.
    ///
    /// # Errors
    /// The token that the configuration names is not there.
    pub fn of(config: &Config, role: Role) -> Result<Self, ServiceError> {
        let server = |files: TlsFiles| ServerTls {
            identity: PemPair { certificate: files.certificate, key: files.key },
            client_ca: config.tls.mutual.then_some(files.ca),
        };
        let tls = config.tls_files(role).map(server);
        Ok(Self { tls, token: config.token()?, callers: Callers::of(config, role), insecure: config.tls.insecure })
    }
}

/// How `role` calls the services of the others. Where callers need no certificate ([`unveil_config::schema::Tls::mutual`]) none is
/// sent, and without a `ca.crt` the system's authorities are trusted.
///
/// # Errors
/// The token that the configuration names is not there.
pub fn client_options(config: &Config, role: Role) -> Result<ClientOptions, ServiceError> {
    let mutual = config.tls.mutual;
    let client = |files: TlsFiles| ClientTls {
        ca: Some(files.ca).filter(|ca| mutual || ca.exists()),
        identity: mutual.then_some(PemPair { certificate: files.certificate, key: files.key }),
    };
    let tls = config.tls_files(role).map(client);
    Ok(ClientOptions { tls, token: config.token()?, insecure: config.tls.insecure })
}
