//! A real object store for tests: s3s-fs in the sandbox, or an existing server.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::{Process, Sandbox, python};

const START_TIMEOUT: Duration = Duration::from_secs(60);
/// Environment variables of S3: endpoint, and secret that must not appear in any output.
const AWS: [&str; 2] = ["AWS_ENDPOINT_URL", "AWS_SECRET_ACCESS_KEY"];
/// Environment variables of Azure: endpoint, and secret that must not appear in any output.
const AZURE: [&str; 2] = ["AZURITE_BLOB_STORAGE_URL", "AZURE_STORAGE_ACCOUNT_KEY"];

/// A bucket on a server. A server that was started here stops on drop.
#[derive(Debug)]
pub struct StoreServer {
    /// `scheme://bucket`.
    bucket: String,
    /// Environment variables for programs, including endpoint and secret.
    variables: Vec<(&'static str, String)>,
    /// Names of the variables of endpoint and secret.
    names: [&'static str; 2],
    /// Prefix of all object names, which separates tests on one server.
    prefix: String,
    /// Server that was started here, and the directory of its bucket.
    own: Option<(Process, PathBuf)>,
}

impl StoreServer {
    /// Starts s3s-fs, or uses the store `UNVEIL_TEST_STORE` (`s3://bucket` or `az://container`) with endpoint and credentials from the
    /// environment variables that the programs read.
    ///
    /// # Panics
    /// Panics if s3s-fs is missing; it is `UNVEIL_S3S_FS`, or else next to the Python interpreter of the tests.
    #[track_caller]
    pub fn start(sandbox: &Sandbox) -> Self {
        let prefix = sandbox.path("").file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        if let Ok(bucket) = std::env::var("UNVEIL_TEST_STORE") {
            let names = if bucket.starts_with("az://") { AZURE } else { AWS };
            let value =
                |name| std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set, but UNVEIL_TEST_STORE is"));
            return Self { bucket, variables: names.map(|n| (n, value(n))).into(), names, prefix, own: None };
        }
        let root = sandbox.path(".s3");
        let bucket_dir = root.join("bucket");
        std::fs::create_dir_all(&bucket_dir).unwrap_or_else(|e| panic!("{}: {e}", root.display()));
        let key = "key";
        let secret = "very-secret";
        let args = ["--host", "127.0.0.1", "--port", "0", "--access-key", key, "--secret-key", secret];
        let mut command = sandbox.command(&program(), &args);
        let mut server = sandbox.start(command.arg(&root).env("RUST_LOG", "s3s_fs=info"));
        let log = server.stdout_path().to_owned();
        let logged_address = || std::fs::read_to_string(&log).ok().and_then(|t| find_address(&t));
        let endpoint = server.until("its address", START_TIMEOUT, logged_address);
        let variables =
            [("AWS_ENDPOINT_URL", endpoint.as_str()), ("AWS_SECRET_ACCESS_KEY", secret), ("AWS_ACCESS_KEY_ID", key)];
        let variables = variables.into_iter().chain([("AWS_ALLOW_HTTP", "true"), ("AWS_REGION", "us-east-1")]);
        let variables = variables.map(|(name, value)| (name, value.to_owned())).collect();
        Self { bucket: "s3://bucket".to_owned(), variables, names: AWS, prefix, own: Some((server, bucket_dir)) }
    }

    /// Returns the value of a variable.
    fn value(&self, name: &str) -> &str {
        self.variables.iter().find(|(n, _)| *n == name).map_or("", |(_, value)| value)
    }

    /// Returns the endpoint, `http://host:port` with an optional path.
    pub fn endpoint(&self) -> &str {
        self.value(self.names[0])
    }

    /// Returns the URL of a prefix for this test.
    pub fn url(&self, name: &str) -> String {
        format!("{}/{}/{name}", self.bucket, self.prefix)
    }

    /// Sets the environment variables of a command, with the endpoint of the server or of a proxy.
    pub fn configure<'a>(&self, command: &'a mut Command, endpoint: &str) -> &'a mut Command {
        command.envs(self.variables.iter().map(|(name, value)| (name, value))).env(self.names[0], endpoint)
    }

    /// Returns the secret, which must not appear in any output.
    pub fn secret(&self) -> &str {
        self.value(self.names[1])
    }

    /// Returns the directory with the objects of [`Self::url`], one file each; `None` for an existing server.
    pub fn object_dir(&self, name: &str) -> Option<PathBuf> {
        self.own.as_ref().map(|(_, bucket_dir)| bucket_dir.join(&self.prefix).join(name))
    }

    /// Returns the process of the server; `None` for an existing server.
    pub fn process(&self) -> Option<&Process> {
        self.own.as_ref().map(|(server, _)| server)
    }
}

/// Returns the path of s3s-fs.
#[track_caller]
fn program() -> PathBuf {
    let next_to_python = || python().parent().unwrap_or(Path::new(".")).join("s3s-fs");
    let path = std::env::var_os("UNVEIL_S3S_FS").map_or_else(next_to_python, PathBuf::from);
    assert!(path.is_file(), "{} is missing: run `.ci/setup --tests`, or set UNVEIL_S3S_FS", path.display());
    path
}

/// Finds the address of the server in its log.
fn find_address(log: &str) -> Option<String> {
    let start = log.find("running at http://")? + "running at ".len();
    let length = log[start..].find(|c: char| c.is_whitespace() || c == ',' || c == '"')?;
    Some(log[start..start + length].to_owned())
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_address_is_found_in_the_log() {
        let log =
            "  2026-01-01T00:00:00Z  INFO s3s_fs: server is running at http://127.0.0.1:4321\n    at src/main.rs:1";
        assert_eq!(super::find_address(log).as_deref(), Some("http://127.0.0.1:4321"));
        assert_eq!(
            super::find_address("  server is running at http://127.0.0.1:43"),
            None,
            "the line is not complete yet"
        );
    }
}
