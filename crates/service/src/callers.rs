//! Authorization of callers by the names in their certificates.

use tonic::codegen::http::Request;
use tonic::transport::server::{TcpConnectInfo, TlsConnectInfo};
use unveil_config::{Config, Role};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// The roles that may call a service and the certificate names that identify them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Callers {
    /// Name of the service, for messages.
    service: &'static str,
    roles: Vec<(Role, Vec<String>)>,
}

impl Callers {
    /// Returns the roles that may call the service of `role`: rollout workers for the learner; rollout workers, learners and clients for the
    /// reward service. Returns `None` if callers present no certificate.
    pub fn of(config: &Config, role: Role) -> Option<Self> {
        if config.tls.dir.is_empty() || !config.tls.mutual {
            return None;
        }
        let roles: &[Role] = match role {
            Role::Learner => &[Role::Rollout],
            _ => &[Role::Rollout, Role::Learner, Role::Client],
        };
        let names = |r: &Role| {
            let configured = config.tls.names.get(r.name()).cloned();
            (*r, configured.unwrap_or_else(|| vec![r.name().to_owned(), format!("*-{}", r.name())]))
        };
        Some(Self { service: role.name(), roles: roles.iter().map(names).collect() })
    }

    /// Checks the certificate of a call.
    ///
    /// # Errors
    /// Returns a message with the presented names, the allowed roles and the relevant configuration key.
    pub(crate) fn admit<B>(&self, request: &Request<B>) -> Result<(), String> {
        let chain = request.extensions().get::<TlsConnectInfo<TcpConnectInfo>>().and_then(TlsConnectInfo::peer_certs);
        let names = chain
            .as_ref()
            .and_then(|chain| chain.first())
            .map(|leaf| certificate_names(leaf.as_ref()))
            .unwrap_or_default();
        let has_match = |pattern: &String| names.iter().any(|name| matches(pattern, name));
        if self.roles.iter().any(|(_, patterns)| patterns.iter().any(has_match)) {
            return Ok(());
        }
        let roles: Vec<&str> = self.roles.iter().map(|(r, _)| r.name()).collect();
        let shown = if names.is_empty() { "no name".to_owned() } else { format!("`{}`", names.join("`, `")) };
        Err(format!(
            "the caller's certificate has {shown}, but only {} may call the {} service; tls.names configures the certificate names of \
             each role",
            roles.join(", "),
            self.service
        ))
    }
}

/// Returns the names in a certificate: its common names and its DNS names, the latter both complete and as first label.
fn certificate_names(der: &[u8]) -> Vec<String> {
    let Ok((_, certificate)) = X509Certificate::from_der(der) else { return Vec::new() };
    let mut out: Vec<String> =
        certificate.subject().iter_common_name().filter_map(|n| n.as_str().ok()).map(str::to_owned).collect();
    let other = certificate.subject_alternative_name().ok().flatten();
    for name in other.iter().flat_map(|extension| &extension.value.general_names) {
        if let GeneralName::DNSName(name) = name {
            out.push((*name).to_owned());
            out.extend(name.split_once('.').map(|(first, _)| first.to_owned()));
        }
    }
    out.sort();
    out.dedup();
    out
}

/// Returns whether `name` matches `pattern`, in which a single `*` matches any text.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern.eq_ignore_ascii_case(name),
        Some((begin, end)) => {
            let name = name.to_ascii_lowercase();
            let begin = begin.to_ascii_lowercase();
            let end = end.to_ascii_lowercase();
            name.len() >= begin.len() + end.len() && name.starts_with(&begin) && name.ends_with(&end)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_patterns() {
        for (pattern, name, same) in [
            ("rollout", "rollout", true),
            ("rollout", "Rollout", true),
            ("rollout", "rollout2", false),
            ("*-rollout", "run-unveil-rollout", true),
            ("*-rollout", "rollout", false),
            ("gpu-*.lab", "gpu-7.lab", true),
            ("gpu-*.lab", "gpu-.la", false),
            ("gpu-*.lab", "cpu-7.lab", false),
        ] {
            assert_eq!(matches(pattern, name), same, "{pattern} {name}");
        }
    }

    #[test]
    fn callers_are_unrestricted_without_mutual_tls() {
        let mut c = Config::default();
        assert_eq!(Callers::of(&c, Role::Learner), None);
        c.tls.dir = "tls".into();
        assert!(Callers::of(&c, Role::Learner).is_some());
        c.tls.mutual = false;
        assert_eq!(Callers::of(&c, Role::Learner), None);
    }
}
