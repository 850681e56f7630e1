//! A real S3 server for tests: s3s-fs on a folder of the sandbox, or one that runs already.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::{Process, Sandbox, python};

const SOON: Duration = Duration::from_secs(60);
const BUCKET: &str = "bucket";

/// An S3 endpoint with a bucket of its own. The server ends with it.
pub struct S3 {
    endpoint: String,
    key: String,
    secret: String,
    /// Leads the names of all objects, so that tests on one server do not meet.
    prefix: String,
    /// The server that was started here, and the folder that holds its buckets.
    own: Option<(Process, PathBuf)>,
}

impl S3 {
    /// Starts s3s-fs, or takes the server that `UNVEIL_TEST_S3` names (`http://host:port`, with the bucket `bucket` and the credentials
    /// `UNVEIL_TEST_S3_KEY` and `UNVEIL_TEST_S3_SECRET`).
    ///
    /// # Panics
    /// There is no s3s-fs: `UNVEIL_S3S_FS`, else beside the Python of the tests.
    #[track_caller]
    pub fn start(sandbox: &Sandbox) -> Self {
        let prefix = sandbox.path("").file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let set = |name: &str| std::env::var(name).ok();
        if let Some(endpoint) = set("UNVEIL_TEST_S3") {
            let get = |name: &str| set(name).unwrap_or_else(|| panic!("{name} is not set, but UNVEIL_TEST_S3 is"));
            let (key, secret) = (get("UNVEIL_TEST_S3_KEY"), get("UNVEIL_TEST_S3_SECRET"));
            return Self { endpoint, key, secret, prefix, own: None };
        }
        let root = sandbox.path(".s3");
        std::fs::create_dir_all(root.join(BUCKET)).unwrap_or_else(|e| panic!("{}: {e}", root.display()));
        let (key, secret) = ("key".to_owned(), "very-secret".to_owned());
        let args = ["--host", "127.0.0.1", "--port", "0", "--access-key", &key, "--secret-key", &secret];
        let mut command = sandbox.command(&program(), &args);
        let mut server = sandbox.start(command.arg(&root).env("RUST_LOG", "s3s_fs=info"));
        let log = server.stdout_path().to_owned();
        let said = || std::fs::read_to_string(&log).ok().and_then(|t| address(&t));
        let endpoint = server.until("its address", SOON, said);
        Self { endpoint, key, secret, prefix, own: Some((server, root)) }
    }

    /// Where it listens, `http://host:port`.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// The URL of a prefix of this test.
    pub fn url(&self, name: &str) -> String {
        format!("s3://{BUCKET}/{}/{name}", self.prefix)
    }

    /// Lets a program find the server at `endpoint`, which is its own or that of a proxy.
    pub fn tell<'a>(&self, command: &'a mut Command, endpoint: &str) -> &'a mut Command {
        let known = [("AWS_ENDPOINT_URL", endpoint), ("AWS_ALLOW_HTTP", "true"), ("AWS_REGION", "us-east-1")];
        command.envs(known).env("AWS_ACCESS_KEY_ID", &self.key).env("AWS_SECRET_ACCESS_KEY", &self.secret)
    }

    /// The secret that no output may hold.
    pub fn secret(&self) -> &str {
        &self.secret
    }

    /// The folder with the objects of [`S3::url`], one file each; none where the server was not started here.
    pub fn folder(&self, name: &str) -> Option<PathBuf> {
        self.own.as_ref().map(|(_, root)| root.join(BUCKET).join(&self.prefix).join(name))
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
