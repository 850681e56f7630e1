//! The reward binary as deployed: without libtorch, and ready immediately.

use std::process::Command;
use std::time::{Duration, Instant};

use unveil_service::{READY, check_health};
use unveil_testkit::{Sandbox, binary, free_address, json_lines};

#[test]
fn the_reward_binary_does_not_link_torch() {
    let linked = |name: &str| {
        let out = Command::new("ldd").arg(binary(name)).output().expect("ldd runs");
        String::from_utf8_lossy(&out.stdout).into_owned()
    };
    let reward = linked("unveil-reward");
    assert!(reward.contains("libc.so"), "{reward}");
    for library in ["libtorch", "libc10", "cuda", "libgomp"] {
        assert!(!reward.contains(library), "unveil-reward links {library}:\n{reward}");
    }
    assert!(linked("unveil").contains("libtorch"), "the comparison is meaningful");
}

#[test]
fn the_reward_service_starts_and_stops_quickly() {
    let s = Sandbox::new();
    let start = Instant::now();
    let health = free_address();
    let mut service = s.spawn(&["reward", "serve", "--set", &format!("health.listen={health}")]);
    let ready = json_lines(&service.first_line(Duration::from_secs(10)));
    eprintln!("ready after {:?}", start.elapsed());
    assert_eq!(ready[0]["role"], "reward");
    let address = ready[0]["address"].as_str().expect("an address");
    assert!(address.starts_with("127.0.0.1:") && !address.ends_with(":0"), "{address}");
    std::net::TcpStream::connect(address).expect("it listens there");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let is_serving = |name: &str| runtime.block_on(check_health(&health.to_string(), name, Duration::from_secs(5)));
    assert!(is_serving("").is_ok_and(|alive| alive) && is_serving(READY).is_ok_and(|ready| ready));
    let running = s.processes();
    assert!(running.iter().all(|p| p.args[0].ends_with("unveil-reward")), "`unveil reward` became {running:?}");
    service.interrupt();
    assert!(service.wait(Duration::from_secs(5)).stdout.lines().count() == 1);
}
