//! Roles of a run, and the certificates and the token that authenticate them.

use std::path::{Path, PathBuf};

use unveil_core::Secret;

use crate::error::ConfigError;
use crate::external::read_secret;
use crate::schema::Config;

/// Minimum length of a token in characters; shorter ones can be guessed.
pub const MIN_TOKEN_CHARS: usize = 16;

/// Role of a process in a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// The learner: serves, and is called by rollout workers.
    Learner,
    /// A rollout worker: calls learner and reward service.
    Rollout,
    /// The reward service: serves, and is called by rollout workers.
    Reward,
    /// Any other caller: probes, scripts.
    Client,
}

impl Role {
    /// All roles.
    pub const ALL: [Self; 4] = [Self::Learner, Self::Rollout, Self::Reward, Self::Client];

    /// Returns the name of the role, which is also the name of its certificate directory.
    pub fn name(self) -> &'static str {
        match self {
            Self::Learner => "learner",
            Self::Rollout => "rollout",
            Self::Reward => "reward",
            Self::Client => "client",
        }
    }

    /// Returns whether the role runs a service.
    pub fn serves(self) -> bool {
        matches!(self, Self::Learner | Self::Reward)
    }
}

/// Certificate files of a role, in PEM format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// Certificate chain, leaf first.
    pub certificate: PathBuf,
    /// Private key.
    pub key: PathBuf,
    /// Certificate authority of all roles.
    pub ca: PathBuf,
}

impl TlsFiles {
    /// Returns the files of one directory, with the names used by Kubernetes.
    pub fn in_dir(dir: &Path) -> Self {
        Self { certificate: dir.join("tls.crt"), key: dir.join("tls.key"), ca: dir.join("ca.crt") }
    }
}

impl Config {
    /// Returns the certificate files of `role`; `None` without TLS. Existence is checked when they are used.
    pub fn tls_files(&self, role: Role) -> Option<TlsFiles> {
        if self.tls.dir.is_empty() {
            return None;
        }
        let shared_dir = Path::new(&self.tls.dir);
        let role_dir = shared_dir.join(role.name());
        Some(TlsFiles::in_dir(if role_dir.is_dir() { &role_dir } else { shared_dir }))
    }

    /// Returns the URL scheme of services that are started here.
    pub fn scheme(&self) -> &'static str {
        if self.tls.dir.is_empty() { "http" } else { "https" }
    }

    /// Reads the token of the run; `None` if none is configured.
    ///
    /// # Errors
    /// Returns [`ConfigError::Invalid`] if the variable or file does not exist, or the token has fewer than [`MIN_TOKEN_CHARS`]
    /// characters.
    pub fn token(&self) -> Result<Option<Secret>, ConfigError> {
        let token = read_secret("auth.token_env or auth.token_file", &self.auth.token_env, &self.auth.token_file)?;
        match &token {
            Some(t) if t.reveal().chars().count() < MIN_TOKEN_CHARS => Err(ConfigError::Invalid(vec![format!(
                "the token that auth.token_env or auth.token_file names is too short: use at least {MIN_TOKEN_CHARS} characters, for \
                 example from `openssl rand -hex 32`"
            )])),
            _ => Ok(token),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_role_uses_its_own_directory_or_the_shared_one() {
        let dir = std::env::temp_dir().join(format!("unveil-identity-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("learner")).unwrap();
        let mut c = Config::default();
        assert_eq!((c.tls_files(Role::Learner), c.scheme()), (None, "http"));
        c.tls.dir = dir.display().to_string();
        assert_eq!(c.tls_files(Role::Learner), Some(TlsFiles::in_dir(&dir.join("learner"))));
        assert_eq!(c.tls_files(Role::Rollout).unwrap().key, dir.join("tls.key"));
        assert_eq!(c.scheme(), "https");
    }

    #[test]
    fn short_tokens_are_refused() {
        let file = std::env::temp_dir().join(format!("unveil-token-{}", std::process::id()));
        let mut c = Config::default();
        assert_eq!(c.token().unwrap(), None);
        c.auth.token_file = file.display().to_string();
        std::fs::write(&file, "0123456789abcdef\n").unwrap();
        assert_eq!(c.token().unwrap(), Some(Secret::new("0123456789abcdef")));
        std::fs::write(&file, "0123456789abcde\n").unwrap();
        let e = c.token().unwrap_err().to_string();
        assert!(e.contains("auth.token_file") && e.contains("16") && !e.contains("0123456789abcde"), "{e}");
    }
}
