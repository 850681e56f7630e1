//! Who a process is among the roles of a run, and which files and token prove it.

use std::path::{Path, PathBuf};

use unveil_core::Secret;

use crate::load::ConfigError;
use crate::outside::secret;
use crate::schema::Config;

/// Shortest token that is taken, in characters: shorter ones can be guessed.
pub const TOKEN_LEAST: usize = 16;

/// What a process is to the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// The learner: serves, and is called by rollout workers.
    Learner,
    /// A rollout worker: calls learner and reward service.
    Rollout,
    /// The reward service: serves, and is called by rollout workers.
    Reward,
    /// Anybody else who calls: probes, scripts.
    Client,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Learner, Self::Rollout, Self::Reward, Self::Client];

    /// Its name: that of its folder of certificates.
    pub fn name(self) -> &'static str {
        match self {
            Self::Learner => "learner",
            Self::Rollout => "rollout",
            Self::Reward => "reward",
            Self::Client => "client",
        }
    }

    /// Whether it is called by others.
    pub fn serves(self) -> bool {
        matches!(self, Self::Learner | Self::Reward)
    }
}

/// The files of a role, PEM each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// Its certificate chain, leaf first.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The authority that signed the certificates of all roles.
    pub ca: PathBuf,
}

impl TlsFiles {
    /// Those of one folder, by the names that Kubernetes gives them.
    pub fn below(folder: &Path) -> Self {
        Self { certificate: folder.join("tls.crt"), key: folder.join("tls.key"), ca: folder.join("ca.crt") }
    }
}

impl Config {
    /// The files by which `role` speaks TLS; none where it does not. They need not exist: who uses them says so.
    pub fn tls_files(&self, role: Role) -> Option<TlsFiles> {
        if self.tls.dir.is_empty() {
            return None;
        }
        let all = Path::new(&self.tls.dir);
        let own = all.join(role.name());
        Some(TlsFiles::below(if own.is_dir() { &own } else { all }))
    }

    /// How addresses of services begin that are started here.
    pub fn scheme(&self) -> &'static str {
        if self.tls.dir.is_empty() { "http" } else { "https" }
    }

    /// The run's token; none where none is named.
    ///
    /// # Errors
    /// The variable or file that is named is not there, or holds less than [`TOKEN_LEAST`] characters.
    pub fn token(&self) -> Result<Option<Secret>, ConfigError> {
        let token = secret("auth.token_env or auth.token_file", &self.auth.token_env, &self.auth.token_file)?;
        match &token {
            Some(t) if t.reveal().chars().count() < TOKEN_LEAST => Err(ConfigError::Invalid(vec![format!(
                "the token that auth.token_env or auth.token_file names is too short: use {TOKEN_LEAST} characters or more, for \
                 instance of `openssl rand -hex 32`"
            )])),
            _ => Ok(token),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_role_has_its_own_folder_or_the_only_one() {
        let dir = std::env::temp_dir().join(format!("unveil-identity-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("learner")).unwrap();
        let mut c = Config::default();
        assert_eq!((c.tls_files(Role::Learner), c.scheme()), (None, "http"));
        c.tls.dir = dir.display().to_string();
        assert_eq!(c.tls_files(Role::Learner), Some(TlsFiles::below(&dir.join("learner"))));
        assert_eq!(c.tls_files(Role::Rollout).unwrap().key, dir.join("tls.key"));
        assert_eq!(c.scheme(), "https");
    }

    #[test]
    fn a_token_that_can_be_guessed_is_refused() {
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
