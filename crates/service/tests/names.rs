//! A name that stands for another address later on: a channel asks for it again whenever its connection breaks.
//!
//! The test runs itself once more in a mount namespace of its own (util-linux' `unshare`), where it may write /etc/hosts.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use unveil_service::{CancellationToken, Routes, Running, ServeOptions, connect, start};

/// The hosts file, for the inner run.
const HOSTS: &str = "UNVEIL_TEST_HOSTS";
const NAME: &str = "learner.test";

#[test]
fn a_name_that_moves_is_looked_up_again() {
    if let Some(hosts) = std::env::var_os(HOSTS) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        return runtime.block_on(moves(Path::new(&hosts)));
    }
    let dir = tempfile::tempdir().unwrap();
    let hosts = dir.path().join("hosts");
    std::fs::write(&hosts, "").unwrap();
    let script = r#"mount --bind "$0" /etc/hosts && exec "$@""#;
    let again = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c", script])
        .args([hosts.as_os_str(), std::env::current_exe().unwrap().as_os_str()])
        .args(["--exact", "a_name_that_moves_is_looked_up_again", "--nocapture"])
        .env(HOSTS, &hosts)
        .output()
        .expect("unshare (util-linux) starts");
    let said = String::from_utf8_lossy(&again.stderr).into_owned() + &String::from_utf8_lossy(&again.stdout);
    assert!(again.status.success(), "user namespaces (sysctl kernel.unprivileged_userns_clone) are needed: {said}");
    assert!(said.contains("1 passed"), "{said}");
}

/// Says where the name leads from here on.
fn point(hosts: &Path, address: &str) {
    std::fs::write(hosts, format!("127.0.0.1 localhost\n{address} {NAME}\n")).unwrap();
}

async fn serve(listen: &str) -> (Running, CancellationToken) {
    let stop = CancellationToken::new();
    let options = ServeOptions { drain: Duration::ZERO, ..Default::default() };
    (start(listen, Routes::default(), options, stop.clone()).await.unwrap(), stop)
}

async fn moves(hosts: &Path) {
    point(hosts, "127.0.0.2");
    let (first, stop) = serve("127.0.0.2:0").await;
    let port = first.address.port();
    let mut client = HealthClient::new(connect(&format!("{NAME}:{port}"), Duration::from_secs(5)).await.unwrap());
    let mut answers = async || {
        let answer = tokio::time::timeout(Duration::from_secs(2), client.check(HealthCheckRequest::default())).await;
        matches!(answer, Ok(Ok(a)) if a.get_ref().status() == ServingStatus::Serving)
    };
    assert!(answers().await);
    stop.cancel();
    first.wait().await.unwrap();
    let (_second, _stop) = serve(&format!("127.0.0.3:{port}")).await;
    let gone = Instant::now();
    while answers().await {
        assert!(gone.elapsed() < Duration::from_secs(5), "the first server is gone");
    }
    assert!(!answers().await, "the name still leads to where nobody is");
    point(hosts, "127.0.0.3");
    let moved = Instant::now();
    while !answers().await {
        assert!(moved.elapsed() < Duration::from_secs(10), "the same channel finds the new place");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
