//! Certificates for the roles of a run: a dedicated authority, and a certificate and key per role signed by it.
//!
//! Certificates of services (learner, reward) contain their host names and permit serving and calling; those of other roles permit only
//! calling, so that a key leaked from a rollout worker cannot impersonate a service (extended key usage, RFC 5280 section 4.2.1.12).

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

/// Validity of an authority in days.
const CA_DAYS: u32 = 3650;
/// Time before creation at which a certificate becomes valid, because clocks of machines differ.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(3600);
/// Maximum validity of a role's certificate in days: half of an authority's.
pub const MAX_CERTIFICATE_DAYS: u32 = CA_DAYS / 2;

/// How to treat existing certificates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Existing {
    /// Fail if there are any.
    #[default]
    Refuse,
    /// Keep the authority and create new certificates and keys for the roles.
    Renew,
    /// Replace everything: certificates of the old authority are no longer trusted.
    Replace,
}

/// Options for issuing certificates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssueOptions {
    /// Host names and addresses of the services, in addition to the role names and loopback. `*.name` matches a whole domain.
    pub hosts: Vec<String>,
    /// Validity of the roles' certificates in days, 1 to [`MAX_CERTIFICATE_DAYS`].
    pub days: u32,
    /// How to treat existing certificates.
    pub existing: Existing,
}

/// A new certificate, or the authority that signed it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct IssuedCertificate {
    /// Certificate file.
    pub certificate: PathBuf,
    /// Key file, readable only by its owner.
    pub key: PathBuf,
    /// Names and addresses of a service; empty for the authority and for roles that only call.
    pub names: Vec<String>,
    /// Last day of validity, `YYYY-MM-DD` in UTC.
    pub not_after: String,
}

/// All certificates in a directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct IssuedCertificates {
    /// Certificate of the authority.
    pub ca: IssuedCertificate,
    /// Certificates of the roles by role name.
    pub roles: BTreeMap<&'static str, IssuedCertificate>,
}

/// Why certificates could not be issued.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// A file already exists.
    #[error(
        "{} already exists: --renew issues new role certificates from the same authority, --force replaces the authority as well", .0.display()
    )]
    Exists(PathBuf),
    /// There is no usable authority for renewal.
    #[error("{} cannot be used: {why}. Without --renew a new authority is created", file.display())]
    Authority {
        /// Certificate or key of the authority.
        file: PathBuf,
        /// Description of the problem.
        why: String,
    },
    /// A host name is invalid.
    #[error("`{0}` is not a host name or address")]
    Host(String),
    /// The validity is out of range.
    #[error("--days is {days}: use 1 to {max_days}, {why}")]
    Days {
        /// Requested validity in days.
        days: u32,
        /// Maximum validity in days.
        max_days: u32,
        /// Reason for the maximum.
        why: &'static str,
    },
    /// A file or directory cannot be written.
    #[error("{}: {source}", path.display())]
    Write {
        /// The file or directory.
        path: PathBuf,
        /// The I/O error.
        source: std::io::Error,
    },
    /// A certificate cannot be created.
    #[error("certificate of {what}: {source}")]
    Make {
        /// Owner of the certificate.
        what: &'static str,
        /// The underlying error.
        source: rcgen::Error,
    },
}

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
    expires: SystemTime,
    certificate: IssuedCertificate,
}

/// Creates `dir/ca.crt`, `dir/ca.key`, and `dir/ROLE/tls.crt`, `tls.key`, `ca.crt` for every role. Only the role folders need to leave the
/// machine: `ca.key` allows its holder to impersonate any role.
///
/// # Errors
/// Returns an [`IssueError`]; each file is written completely or not at all.
pub fn issue(dir: &Path, options: &IssueOptions) -> Result<IssuedCertificates, IssueError> {
    if !(1..=MAX_CERTIFICATE_DAYS).contains(&options.days) {
        return Err(IssueError::Days { days: options.days, max_days: MAX_CERTIFICATE_DAYS, why: "five years" });
    }
    if let Some(invalid) = options.hosts.iter().find(|h| !is_host(h)) {
        return Err(IssueError::Host(invalid.clone()));
    }
    create_private_folder(dir)?;
    let certificate = dir.join("ca.crt");
    let key = dir.join("ca.key");
    let authority = match options.existing {
        Existing::Renew => read_authority(certificate, key)?,
        Existing::Replace => make_authority(certificate, key)?,
        Existing::Refuse => {
            let mut role_files = Role::ALL.iter().flat_map(|r| {
                let files = TlsFiles::in_dir(&dir.join(r.name()));
                [files.certificate, files.key, files.ca]
            });
            let existing = [&certificate, &key].into_iter().cloned().chain(&mut role_files).find(|p| p.exists());
            match existing {
                Some(path) => return Err(IssueError::Exists(path)),
                None => make_authority(certificate, key)?,
            }
        }
    };
    let expires = SystemTime::now() + days(options.days);
    if expires > authority.expires {
        let left = authority.expires.duration_since(SystemTime::now()).unwrap_or_default();
        let max_days = u32::try_from(left.as_secs() / 86400).unwrap_or(0);
        let why = "because the authority expires then; --force creates a new one";
        return Err(IssueError::Days { days: options.days, max_days, why });
    }
    let mut roles = BTreeMap::new();
    for role in Role::ALL {
        roles.insert(role.name(), make_role(dir, role, options, &authority)?);
    }
    Ok(IssuedCertificates { ca: authority.certificate, roles })
}

fn make_authority(certificate: PathBuf, key: PathBuf) -> Result<Authority, IssueError> {
    let fail = |source| IssueError::Make { what: "the authority", source };
    let pair = KeyPair::generate().map_err(fail)?;
    let mut params = CertificateParams::default();
    let expires = SystemTime::now() + days(CA_DAYS);
    params.not_before = (SystemTime::now() - CLOCK_TOLERANCE).into();
    params.not_after = expires.into();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    // Two authorities with the same name could be confused.
    let number: u32 = rand::random();
    params.distinguished_name.push(DnType::CommonName, format!("Unveil roles {number:08x}"));
    let pem = params.self_signed(&pair).map_err(fail)?.pem();
    write(&key, pair.serialize_pem().as_bytes(), 0o600)?;
    write(&certificate, pem.as_bytes(), 0o644)?;
    let certificate = IssuedCertificate { certificate, key, names: Vec::new(), not_after: date(expires) };
    Ok(Authority { issuer: Issuer::new(params, pair), pem, expires, certificate })
}

fn read_authority(certificate: PathBuf, key: PathBuf) -> Result<Authority, IssueError> {
    let unusable = |file: &Path, why: String| IssueError::Authority { file: file.to_owned(), why };
    let read = |file: &Path| std::fs::read_to_string(file).map_err(|e| unusable(file, e.to_string()));
    let pair = KeyPair::from_pem(&read(&key)?).map_err(|e| unusable(&key, e.to_string()))?;
    let pem = read(&certificate)?;
    let not_a_certificate = || unusable(&certificate, "it is not a PEM certificate".to_owned());
    let (_, block) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).map_err(|_| not_a_certificate())?;
    let parsed = block.parse_x509().map_err(|_| not_a_certificate())?;
    if !parsed.is_ca() {
        return Err(unusable(&certificate, "it is not the certificate of an authority".to_owned()));
    }
    if parsed.public_key().subject_public_key.data.as_ref() != pair.public_key_raw() {
        return Err(unusable(&key, "it is not the key of ca.crt".to_owned()));
    }
    let seconds = u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or(0);
    let expires = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    let not_after = date(expires);
    let issuer = Issuer::from_ca_cert_pem(&pem, pair).map_err(|e| unusable(&certificate, e.to_string()))?;
    let certificate = IssuedCertificate { certificate, key, names: Vec::new(), not_after };
    Ok(Authority { issuer, expires, certificate, pem })
}

fn make_role(
    dir: &Path,
    role: Role,
    options: &IssueOptions,
    authority: &Authority,
) -> Result<IssuedCertificate, IssueError> {
    let fail = |source| IssueError::Make { what: role.name(), source };
    let mut names = Vec::new();
    if role.serves() {
        let default_names = [role.name(), "localhost", "127.0.0.1", "::1"].map(str::to_owned);
        for name in default_names.into_iter().chain(options.hosts.iter().cloned()) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
    }
    let pair = KeyPair::generate().map_err(fail)?;
    let mut params = CertificateParams::new(names.clone()).map_err(fail)?;
    params.not_before = (SystemTime::now() - CLOCK_TOLERANCE).into();
    let expires = SystemTime::now() + days(options.days);
    params.not_after = expires.into();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, role.name());
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    if role.serves() {
        params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
    }
    params.use_authority_key_identifier_extension = true;
    let certificate = params.signed_by(&pair, &authority.issuer).map_err(fail)?;
    let role_dir = dir.join(role.name());
    create_private_folder(&role_dir)?;
    let files = TlsFiles::in_dir(&role_dir);
    write(&files.key, pair.serialize_pem().as_bytes(), 0o600)?;
    write(&files.certificate, certificate.pem().as_bytes(), 0o644)?;
    write(&files.ca, authority.pem.as_bytes(), 0o644)?;
    Ok(IssuedCertificate { certificate: files.certificate, key: files.key, names, not_after: date(expires) })
}

fn days(n: u32) -> Duration {
    Duration::from_secs(u64::from(n) * 86400)
}

/// Formats a time as `YYYY-MM-DD` in UTC.
fn date(time: SystemTime) -> String {
    let seconds = time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(0));
    ASN1Time::from_timestamp(seconds).map_or_else(
        |_| format!("@{seconds}"),
        |time| {
            let date = time.to_datetime();
            format!("{:04}-{:02}-{:02}", date.year(), u8::from(date.month()), date.day())
        },
    )
}

/// Returns whether a text is an IP address or a name of letters, digits, `-` and `_` between dots, optionally after `*.`.
fn is_host(host: &str) -> bool {
    let label = |l: &str| {
        !l.is_empty() && l.len() <= 63 && l.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'))
    };
    let name = host.strip_prefix("*.").unwrap_or(host);
    host.parse::<std::net::IpAddr>().is_ok() || (host.len() <= 253 && name.split('.').all(label))
}

/// Creates a folder that only its owner may enter; an existing folder is left unchanged.
fn create_private_folder(path: &Path) -> Result<(), IssueError> {
    let created = DirBuilder::new().recursive(true).mode(0o700).create(path);
    created.map_err(|source| IssueError::Write { path: path.to_owned(), source })
}

/// Writes a temporary file and renames it, so that a role starting meanwhile finds either the old file or the new one.
fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<(), IssueError> {
    let written = unveil_core::replace_file(path, mode, |temporary| {
        let mut file = OpenOptions::new().write(true).open(temporary)?;
        // The mode of a new file is subject to the umask.
        file.set_permissions(Permissions::from_mode(mode))?;
        file.write_all(bytes)
    });
    written.map_err(|source| IssueError::Write { path: path.to_owned(), source })
}
