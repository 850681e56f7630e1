//! A certificate authority for tests, with certificates as PEM files.

use std::path::{Path, PathBuf};

/// A certificate authority; its files are in `dir/name`.
#[derive(Debug)]
pub struct Authority {
    dir: PathBuf,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
}

impl Authority {
    /// Creates an authority with its files in `dir/name`.
    pub fn new(dir: &Path, name: &str) -> Self {
        let key = rcgen::KeyPair::generate().expect("a key");
        let mut params = rcgen::CertificateParams::new(Vec::new()).expect("parameters");
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let dir = dir.join(name);
        std::fs::create_dir(&dir).expect("a directory for the authority");
        std::fs::write(dir.join("ca.pem"), params.self_signed(&key).expect("a certificate").pem()).expect("ca.pem");
        Self { dir, issuer: rcgen::Issuer::new(params, key) }
    }

    /// Signs a certificate for `localhost` and `127.0.0.1`; returns the paths of the certificate and its key.
    pub fn sign(&self, name: &str) -> [String; 2] {
        let key = rcgen::KeyPair::generate().expect("a key");
        let params = rcgen::CertificateParams::new(vec!["localhost".into(), "127.0.0.1".into()]).expect("parameters");
        let certificate = params.signed_by(&key, &self.issuer).expect("a signature");
        let paths = [format!("{name}.pem"), format!("{name}.key")].map(|f| self.dir.join(f).display().to_string());
        std::fs::write(&paths[0], certificate.pem()).expect("a certificate file");
        std::fs::write(&paths[1], key.serialize_pem()).expect("a key file");
        paths
    }

    /// Returns the path of the authority's certificate.
    pub fn ca(&self) -> String {
        self.dir.join("ca.pem").display().to_string()
    }
}
