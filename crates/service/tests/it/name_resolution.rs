//! Channels resolve host names again whenever their connection breaks.
//!
//! The test runs itself again in a separate mount namespace (`unshare` of util-linux), where it may write /etc/hosts.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use unveil_service::{CancellationToken, Routes, RunningServer, ServeOptions, connect, start};

/// Environment variable with the hosts file for the inner run.
const HOSTS_VARIABLE: &str = "UNVEIL_TEST_HOSTS";
const NAME: &str = "learner.test";

#[test]
fn changed_address_is_resolved_again() {
    if let Some(hosts) = std::env::var_os(HOSTS_VARIABLE) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        return runtime.block_on(follow_the_name(Path::new(&hosts)));
    }
    let dir = tempfile::tempdir().unwrap();
    let hosts = dir.path().join("hosts");
    std::fs::write(&hosts, "").unwrap();
    let script = r#"mount --bind "$0" /etc/hosts && exec "$@""#;
    let inner = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c", script])
        .args([hosts.as_os_str(), std::env::current_exe().unwrap().as_os_str()])
        .args(["--exact", "name_resolution::changed_address_is_resolved_again", "--nocapture"])
        .env(HOSTS_VARIABLE, &hosts)
        .output()
        .expect("unshare (util-linux) starts");
    let output = String::from_utf8_lossy(&inner.stderr).into_owned() + &String::from_utf8_lossy(&inner.stdout);
    assert!(inner.status.success(), "user namespaces (sysctl kernel.unprivileged_userns_clone) are needed: {output}");
    assert!(output.contains("1 passed"), "{output}");
}

/// Sets the address of the name.
fn set_address(hosts: &Path, address: &str) {
    std::fs::write(hosts, format!("127.0.0.1 localhost\n{address} {NAME}\n")).unwrap();
}

async fn serve(listen: &str) -> (RunningServer, CancellationToken) {
    let stop = CancellationToken::new();
    let options = ServeOptions { drain_timeout: Duration::ZERO, ..Default::default() };
    (start(listen, Routes::default(), options, stop.clone()).await.unwrap(), stop)
}

async fn follow_the_name(hosts: &Path) {
    set_address(hosts, "127.0.0.2");
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
    let stopped = Instant::now();
    while answers().await {
        assert!(stopped.elapsed() < Duration::from_secs(5), "the first server has stopped");
    }
    assert!(!answers().await, "the name still resolves to the old address");
    set_address(hosts, "127.0.0.3");
    let moved = Instant::now();
    while !answers().await {
        assert!(moved.elapsed() < Duration::from_secs(10), "the same channel finds the new address");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
