//! A real object store for tests: s3s-fs on a folder of the sandbox, or one that runs already.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::{Process, Sandbox, python};

const SOON: Duration = Duration::from_secs(60);
/// By which variable programs find a server, and which holds the secret that no output may hold.
const AWS: [&str; 2] = ["AWS_ENDPOINT_URL", "AWS_SECRET_ACCESS_KEY"];
const AZURE: [&str; 2] = ["AZURITE_BLOB_STORAGE_URL", "AZURE_STORAGE_ACCOUNT_KEY"];

/// A bucket on a server. The server ends with it.
pub struct StoreServer {
    /// `scheme://bucket`.
    bucket: String,
    /// What programs must find in their environment; the endpoint and the secret are in it.
    known: Vec<(&'static str, String)>,
    names: [&'static str; 2],
    /// Leads the names of all objects, so that tests on one server do not meet.
    prefix: String,
    /// The server that was started here, and the folder of its bucket.
    own: Option<(Process, PathBuf)>,
}

impl StoreServer {
    /// Starts s3s-fs, or takes what `UNVEIL_TEST_STORE` names (`s3://bucket` or `az://container`), with endpoint and credentials from the
    /// environment as the programs read them.
    ///
    /// # Panics
    /// There is no s3s-fs: `UNVEIL_S3S_FS`, else beside the Python of the tests.
    #[track_caller]
    pub fn start(sandbox: &Sandbox) -> Self {
        let prefix = sandbox.path("").file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        if let Ok(bucket) = std::env::var("UNVEIL_TEST_STORE") {
            let names = if bucket.starts_with("az://") { AZURE } else { AWS };
            let get =
                |name| std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set, but UNVEIL_TEST_STORE is"));
            return Self { bucket, known: names.map(|n| (n, get(n))).into(), names, prefix, own: None };
        }
        let root = sandbox.path(".s3");
        let folder = root.join("bucket");
        std::fs::create_dir_all(&folder).unwrap_or_else(|e| panic!("{}: {e}", root.display()));
        let (key, secret) = ("key", "very-secret");
        let args = ["--host", "127.0.0.1", "--port", "0", "--access-key", key, "--secret-key", secret];
        let mut command = sandbox.command(&program(), &args);
        let mut server = sandbox.start(command.arg(&root).env("RUST_LOG", "s3s_fs=info"));
        let log = server.stdout_path().to_owned();
        let said = || std::fs::read_to_string(&log).ok().and_then(|t| address(&t));
        let endpoint = server.until("its address", SOON, said);
        let known =
            [("AWS_ENDPOINT_URL", endpoint.as_str()), ("AWS_SECRET_ACCESS_KEY", secret), ("AWS_ACCESS_KEY_ID", key)];
        let known = known.into_iter().chain([("AWS_ALLOW_HTTP", "true"), ("AWS_REGION", "us-east-1")]);
        let known = known.map(|(name, value)| (name, value.to_owned())).collect();
        Self { bucket: "s3://bucket".to_owned(), known, names: AWS, prefix, own: Some((server, folder)) }
    }

    fn value(&self, name: &str) -> &str {
        self.known.iter().find(|(n, _)| *n == name).map_or("", |(_, value)| value)
    }

    /// Where it listens, `http://host:port` and perhaps a path.
    pub fn endpoint(&self) -> &str {
        self.value(self.names[0])
    }

    /// The URL of a prefix of this test.
    pub fn url(&self, name: &str) -> String {
        format!("{}/{}/{name}", self.bucket, self.prefix)
    }

    /// Lets a program find the server at `endpoint`, which is its own or that of a proxy.
    pub fn tell<'a>(&self, command: &'a mut Command, endpoint: &str) -> &'a mut Command {
        command.envs(self.known.iter().map(|(name, value)| (name, value))).env(self.names[0], endpoint)
    }

    /// The secret that no output may hold.
    pub fn secret(&self) -> &str {
        self.value(self.names[1])
    }

    /// The folder with the objects of [`Self::url`], one file each; none where the server was not started here.
    pub fn folder(&self, name: &str) -> Option<PathBuf> {
        self.own.as_ref().map(|(_, folder)| folder.join(&self.prefix).join(name))
    }

    /// The server's process, where it was started here.
    pub fn process(&self) -> Option<&Process> {
        self.own.as_ref().map(|(server, _)| server)
    }
}

#[track_caller]
fn program() -> PathBuf {
    let beside = || python().parent().unwrap_or(Path::new(".")).join("s3s-fs");
    let path = std::env::var_os("UNVEIL_S3S_FS").map_or_else(beside, PathBuf::from);
    assert!(path.is_file(), "{} is missing: run `.ci/setup --tests`, or set UNVEIL_S3S_FS", path.display());
    path
}

/// The address in the server's log.
fn address(log: &str) -> Option<String> {
    let at = log.find("running at http://")? + "running at ".len();
    let end = log[at..].find(|c: char| c.is_whitespace() || c == ',' || c == '"')?;
    Some(log[at..at + end].to_owned())
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_address_is_found_in_the_log() {
        let log =
            "  2026-01-01T00:00:00Z  INFO s3s_fs: server is running at http://127.0.0.1:4321\n    at src/main.rs:1";
        assert_eq!(super::address(log).as_deref(), Some("http://127.0.0.1:4321"));
        assert_eq!(super::address("  server is running at http://127.0.0.1:43"), None, "the line is not whole yet");
    }
}
