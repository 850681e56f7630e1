//! TLS, token and caller settings of a role, derived from the configuration in one place for all roles.

use unveil_config::{Config, Role, TlsFiles};
use unveil_core::Secret;

use crate::{Callers, ClientOptions, ClientTls, PemPair, ServerTls, ServiceError};

/// Access settings of the service of a role.
#[derive(Debug, Clone, Default)]
pub struct ServiceAccess {
    /// TLS settings; `None`: plain HTTP/2.
    pub tls: Option<ServerTls>,
    /// Token that callers must send, if any.
    pub token: Option<Secret>,
    /// Roles that may call the service; `None`: any caller with a certificate or the token.
    pub callers: Option<Callers>,
    /// Allows listening on non-loopback addresses without TLS.
    pub insecure: bool,
}

impl ServiceAccess {
    /// Returns the access settings of the service of `role`.
    ///
    /// # Errors
    /// Returns [`ServiceError::Config`] if the token named in the configuration is missing.
    pub fn of(config: &Config, role: Role) -> Result<Self, ServiceError> {
        let server = |files: TlsFiles| ServerTls {
            identity: PemPair { certificate: files.certificate, key: files.key },
            client_ca: config.tls.mutual.then_some(files.ca),
        };
        let tls = config.tls_files(role).map(server);
        Ok(Self { tls, token: config.token()?, callers: Callers::of(config, role), insecure: config.tls.insecure })
    }
}

/// Returns the options with which `role` calls the services of other roles. Unless callers need certificates
/// ([`unveil_config::schema::Tls::mutual`]) none is sent, and the system's authorities are trusted if there is no `ca.crt`.
///
/// # Errors
/// Returns [`ServiceError::Config`] if the token named in the configuration is missing.
pub fn client_options(config: &Config, role: Role) -> Result<ClientOptions, ServiceError> {
    let mutual = config.tls.mutual;
    let client = |files: TlsFiles| ClientTls {
        ca: Some(files.ca).filter(|ca| mutual || ca.exists()),
        identity: mutual.then_some(PemPair { certificate: files.certificate, key: files.key }),
    };
    let tls = config.tls_files(role).map(client);
    Ok(ClientOptions { tls, token: config.token()?, insecure: config.tls.insecure })
}
