//! The sections `[tls]` and `[auth]`: how roles prove who they are to each other, and what they say is kept from others.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// TLS between the roles: one place for all of them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tls {
    /// Directory with `tls.crt`, `tls.key` and `ca.crt` of a role, or with a folder of these per role (`learner`, `rollout`, `reward`,
    /// `client`), as `unveil tls init` makes it; empty = no TLS.
    pub dir: String,
    /// Services want a certificate of the same authority from whoever calls.
    pub mutual: bool,
    /// Services listen beyond loopback without TLS, and tokens travel so: only for networks that encrypt by themselves.
    pub insecure: bool,
    /// Names of certificates by which a role is known, where they are others than the role's own name or ones that end with `-ROLE`:
    /// by role (`learner`, `rollout`, `reward`, `client`), common names or DNS names, with one `*` for anything.
    pub names: BTreeMap<String, Vec<String>>,
}

impl Default for Tls {
    fn default() -> Self {
        Self { dir: String::new(), mutual: true, insecure: false, names: BTreeMap::new() }
    }
}

/// The token that the roles of a run share. A service that has one answers nobody who does not send it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Auth {
    /// Environment variable that holds the token; empty = none.
    pub token_env: String,
    /// File that holds the token; empty = none.
    pub token_file: String,
}
