//! Sections `[tls]` and `[auth]`: authentication and encryption between the roles.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// TLS between the roles; the same settings for all of them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Tls {
    /// Directory with `tls.crt`, `tls.key` and `ca.crt` of a role, or with one subdirectory of these per role (`learner`, `rollout`,
    /// `reward`, `client`), as written by `unveil tls init`. Empty: no TLS.
    pub dir: String,
    /// Services require a client certificate signed by the same authority.
    pub mutual: bool,
    /// Allows services to listen on non-loopback addresses without TLS, and tokens to be sent over such connections; only for networks that
    /// encrypt themselves.
    pub insecure: bool,
    /// Certificate names accepted for a role (`learner`, `rollout`, `reward`, `client`), in addition to the role's name and names that end
    /// with `-ROLE`: common names or DNS names, with at most one `*` that matches any text.
    pub names: BTreeMap<String, Vec<String>>,
}

impl Default for Tls {
    fn default() -> Self {
        Self { dir: String::new(), mutual: true, insecure: false, names: BTreeMap::new() }
    }
}

/// Token shared by the roles of a run. A service with a token rejects calls without it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Auth {
    /// Environment variable that holds the token (at least 16 characters); excludes `token_file`. Empty: no token from the environment.
    pub token_env: String,
    /// File that holds the token (at least 16 characters); excludes `token_env`. Empty: no token file.
    pub token_file: String,
}
