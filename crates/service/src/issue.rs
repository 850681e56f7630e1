//! Certificates for the roles of a run: an authority of its own, and a certificate and key per role that it signs.
//!
//! Services (learner, reward) get the names by which they are reached, and may serve and call; the others may only call, so that a
//! key that leaks from a rollout worker cannot stand in for a service (extended key usage, RFC 5280 section 4.2.1.12).
//! Must not know: configurations.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use serde::Serialize;
use unveil_config::{Role, TlsFiles};
use x509_parser::time::ASN1Time;

/// Days that an authority lasts.
const CA_DAYS: u32 = 3650;
/// Clocks of machines differ: a certificate holds from a little before it was made.
const BEFORE: Duration = Duration::from_secs(3600);
/// Longest life of a role's certificate in days: half of an authority's.
pub const MOST_DAYS: u32 = CA_DAYS / 2;

/// What to do with what is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Existing {
    /// Nothing may be there.
    #[default]
    Refuse,
    /// The authority stays, the roles get new certificates and keys.
    Renew,
    /// Everything is made anew: what the old authority signed is not trusted any more.
    Replace,
}

/// What is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssueOptions {
    /// Names and addresses by which others reach the services, besides the roles' own names and loopback. `*.name` is all of a domain.
    pub hosts: Vec<String>,
    /// Days that the roles' certificates last, 1 to [`MOST_DAYS`].
    pub days: u32,
    /// What to do with what is there already.
    pub existing: Existing,
}

/// A certificate that was made, or the authority that was used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Issued {
    /// The certificate's file.
    pub certificate: PathBuf,
    /// The key's file, which only its owner may read.
    pub key: PathBuf,
    /// Names and addresses of a service; none for who only calls, and the authority.
    pub names: Vec<String>,
    /// The last day on which it holds, `YYYY-MM-DD` in UTC.
    pub not_after: String,
}

/// All that is in a directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct IssuedAll {
    /// The authority.
    pub ca: Issued,
    /// The roles by name.
    pub roles: BTreeMap<&'static str, Issued>,
}

/// Why certificates could not be made.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// Something is there already.
    #[error(
        "{} is there already: --renew makes new certificates of the roles by the same authority, --force replaces the authority too", .0.display()
    )]
    Exists(PathBuf),
    /// There is no authority to renew by.
    #[error("{} cannot be used: {why}. Without --renew a new authority is made", file.display())]
    Authority {
        /// Its certificate or key.
        file: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A host that no certificate can name.
    #[error("`{0}` is no name or address of a host")]
    Host(String),
    /// A life that makes no sense.
    #[error("--days is {days}: use 1 to {most}, {why}")]
    Days {
        /// What was asked for.
        days: u32,
        /// What there can be.
        most: u32,
        /// Why.
        why: &'static str,
    },
    /// A file or directory cannot be written.
    #[error("{}: {source}", path.display())]
    Write {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A certificate cannot be made.
    #[error("certificate of {what}: {source}")]
    Make {
        /// Whose.
        what: &'static str,
        /// Why.
        source: rcgen::Error,
    },
}

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
    ends: SystemTime,
    shown: Issued,
}

/// Makes `dir/ca.crt`, `dir/ca.key`, and `dir/ROLE/tls.crt`, `tls.key`, `ca.crt` for every role. Only the certificates of the roles
/// need to leave the machine: who has `ca.key` can be anybody.
///
/// # Errors
/// See [`IssueError`]; a file is written whole or not at all.
pub fn issue(dir: &Path, options: &IssueOptions) -> Result<IssuedAll, IssueError> {
    if !(1..=MOST_DAYS).contains(&options.days) {
        return Err(IssueError::Days { days: options.days, most: MOST_DAYS, why: "five years" });
    }
    if let Some(bad) = options.hosts.iter().find(|h| !is_host(h)) {
        return Err(IssueError::Host(bad.clone()));
    }
    folder(dir)?;
    let (certificate, key) = (dir.join("ca.crt"), dir.join("ca.key"));
    let authority = match options.existing {
        Existing::Renew => read_authority(certificate, key)?,
        Existing::Replace => make_authority(certificate, key)?,
        Existing::Refuse => {
            let mut all = Role::ALL.iter().flat_map(|r| {
                let files = TlsFiles::below(&dir.join(r.name()));
                [files.certificate, files.key, files.ca]
            });
            let found = [&certificate, &key].into_iter().cloned().chain(&mut all).find(|p| p.exists());
            match found {
                Some(there) => return Err(IssueError::Exists(there)),
                None => make_authority(certificate, key)?,
            }
        }
    };
    let ends = SystemTime::now() + days(options.days);
    if ends > authority.ends {
        let left = authority.ends.duration_since(SystemTime::now()).unwrap_or_default();
        let most = u32::try_from(left.as_secs() / 86400).unwrap_or(0);
        let why = "for the authority ends then; --force makes a new one";
        return Err(IssueError::Days { days: options.days, most, why });
    }
    let mut roles = BTreeMap::new();
    for role in Role::ALL {
        roles.insert(role.name(), make_role(dir, role, options, &authority)?);
    }
    Ok(IssuedAll { ca: authority.shown, roles })
}

fn make_authority(certificate: PathBuf, key: PathBuf) -> Result<Authority, IssueError> {
    let fail = |source| IssueError::Make { what: "the authority", source };
    let pair = KeyPair::generate().map_err(fail)?;
    let mut params = CertificateParams::default();
    let ends = SystemTime::now() + days(CA_DAYS);
    (params.not_before, params.not_after) = ((SystemTime::now() - BEFORE).into(), ends.into());
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    // Two authorities of one name could be mistaken for each other.
    let number: u32 = rand::random();
    params.distinguished_name.push(DnType::CommonName, format!("Unveil roles {number:08x}"));
    let pem = params.self_signed(&pair).map_err(fail)?.pem();
    write(&key, pair.serialize_pem().as_bytes(), 0o600)?;
    write(&certificate, pem.as_bytes(), 0o644)?;
    let shown = Issued { certificate, key, names: Vec::new(), not_after: date(ends) };
    Ok(Authority { issuer: Issuer::new(params, pair), pem, ends, shown })
}

fn read_authority(certificate: PathBuf, key: PathBuf) -> Result<Authority, IssueError> {
    let bad = |file: &Path, why: String| IssueError::Authority { file: file.to_owned(), why };
    let read = |file: &Path| std::fs::read_to_string(file).map_err(|e| bad(file, e.to_string()));
    let pair = KeyPair::from_pem(&read(&key)?).map_err(|e| bad(&key, e.to_string()))?;
    let pem = read(&certificate)?;
    let not_one = || bad(&certificate, "it is no PEM certificate".to_owned());
    let (_, block) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).map_err(|_| not_one())?;
    let parsed = block.parse_x509().map_err(|_| not_one())?;
    if !parsed.is_ca() {
        return Err(bad(&certificate, "it is no certificate of an authority".to_owned()));
    }
    if parsed.public_key().subject_public_key.data.as_ref() != pair.public_key_raw() {
        return Err(bad(&key, "it is not the key of ca.crt".to_owned()));
    }
    let seconds = u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or(0);
    let ends = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    let not_after = date(ends);
    let issuer = Issuer::from_ca_cert_pem(&pem, pair).map_err(|e| bad(&certificate, e.to_string()))?;
    Ok(Authority { issuer, ends, shown: Issued { certificate, key, names: Vec::new(), not_after }, pem })
}

fn make_role(dir: &Path, role: Role, options: &IssueOptions, authority: &Authority) -> Result<Issued, IssueError> {
    let fail = |source| IssueError::Make { what: role.name(), source };
    let mut names = Vec::new();
    if role.serves() {
        let own = [role.name(), "localhost", "127.0.0.1", "::1"].map(str::to_owned);
        for name in own.into_iter().chain(options.hosts.iter().cloned()) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
    }
    let pair = KeyPair::generate().map_err(fail)?;
    let mut params = CertificateParams::new(names.clone()).map_err(fail)?;
    params.not_before = (SystemTime::now() - BEFORE).into();
    let ends = SystemTime::now() + days(options.days);
    params.not_after = ends.into();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, role.name());
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    if role.serves() {
        params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
    }
    params.use_authority_key_identifier_extension = true;
    let made = params.signed_by(&pair, &authority.issuer).map_err(fail)?;
    let own = dir.join(role.name());
    folder(&own)?;
    let files = TlsFiles::below(&own);
    write(&files.key, pair.serialize_pem().as_bytes(), 0o600)?;
    write(&files.certificate, made.pem().as_bytes(), 0o644)?;
    write(&files.ca, authority.pem.as_bytes(), 0o644)?;
    Ok(Issued { certificate: files.certificate, key: files.key, names, not_after: date(ends) })
}

fn days(n: u32) -> Duration {
    Duration::from_secs(u64::from(n) * 86400)
}

/// `YYYY-MM-DD`.
fn date(at: SystemTime) -> String {
    let seconds = at.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(0));
    ASN1Time::from_timestamp(seconds).map_or_else(
        |_| format!("@{seconds}"),
        |at| {
            let at = at.to_datetime();
            format!("{:04}-{:02}-{:02}", at.year(), u8::from(at.month()), at.day())
        },
    )
}

/// A name of letters, digits, `-` and `_` between dots, `*.` before one, or an address.
fn is_host(host: &str) -> bool {
    let label = |l: &str| {
        !l.is_empty() && l.len() <= 63 && l.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'))
    };
    let name = host.strip_prefix("*.").unwrap_or(host);
    host.parse::<std::net::IpAddr>().is_ok() || (host.len() <= 253 && name.split('.').all(label))
}

/// A folder that only its owner may enter; one that is there stays as it is.
fn folder(path: &Path) -> Result<(), IssueError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|source| IssueError::Write { path: path.to_owned(), source })
}

/// Writes beside, then renames: a role that starts meanwhile finds the old file or the new one.
fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<(), IssueError> {
    let written = unveil_core::replace_file(path, mode, |beside| {
        let mut file = OpenOptions::new().write(true).open(beside)?;
        // The mode of a new file is cut by the umask.
        file.set_permissions(Permissions::from_mode(mode))?;
        file.write_all(bytes)
    });
    written.map_err(|source| IssueError::Write { path: path.to_owned(), source })
}
