//! Weights by broadcast over NCCL, from tensors on a GPU to tensors on a GPU, between two processes that share one. `make test-gpu`;
//! it fails where there is no GPU.

#[path = "common/synced.rs"]
mod synced;

use std::io::{BufRead, BufReader, Write};

use synced::{DIFFERENCE, Follower, Process, SOON, Served};
use tch::Device;

const ADDRESS: &str = "UNVEIL_TEST_HOST";
const VERSIONS: std::ops::Range<u64> = 1..4;

fn gpu() -> Device {
    unveil_model::device("cuda").unwrap_or_else(|e| panic!("this test needs a GPU: {e}"))
}

/// Waits for the word to go on.
fn wait() {
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).unwrap();
}

#[test]
#[ignore = "the learner's side, which another test starts"]
fn host() {
    let served = Served::new(gpu());
    served.publish(0);
    println!("ADDRESS {}", served.address());
    for version in VERSIONS {
        wait();
        served.publish(version);
        assert_eq!(served.sent(), (version, 1, 1, DIFFERENCE));
    }
    wait();
}

#[test]
#[ignore = "the worker's side, which another test starts"]
fn worker() {
    let address = std::env::var(ADDRESS).expect("started by another test");
    let device = gpu();
    let follower = Follower::start(address, "worker".into(), device);
    assert!(follower.has(0).whole);
    println!("HAS 0");
    for version in VERSIONS {
        assert_eq!(follower.has_right(version), [device; 2], "they stay where they came to");
        println!("HAS {version}");
    }
}

/// The next line that holds `word`, from there on.
fn line(lines: &mut impl Iterator<Item = String>, word: &str) -> String {
    let found = lines.find_map(|l| l.split_once(word).map(|(_, rest)| rest.trim().to_owned()));
    found.unwrap_or_else(|| panic!("no line with `{word}`: the process has failed"))
}

#[test]
fn weights_go_from_gpu_to_gpu() {
    gpu();
    let start = |test: &str, mut told: Vec<(&str, String)>| {
        // Two processes may share one GPU when NCCL takes them for two machines.
        told.push(("NCCL_HOSTID", test.to_owned()));
        let plain = [("NCCL_P2P_DISABLE", "1"), ("NCCL_SHM_DISABLE", "1"), ("NCCL_NET", "Socket")];
        told.extend(plain.iter().chain(&[("NCCL_SOCKET_IFNAME", "lo")]).map(|(k, v)| (*k, (*v).to_owned())));
        let mut process = Process::start(test, &told);
        let lines = BufReader::new(process.0.stdout.take().unwrap()).lines().map_while(Result::ok);
        (process, lines)
    };
    let (mut host, mut said) = start("host", vec![]);
    let address = line(&mut said, "ADDRESS ");
    let (mut worker, mut had) = start("worker", vec![(ADDRESS, address)]);
    assert_eq!(line(&mut had, "HAS "), "0");
    let mut go = host.0.stdin.take().unwrap();
    for version in VERSIONS {
        writeln!(go, "go").unwrap();
        assert_eq!(line(&mut had, "HAS "), version.to_string());
    }
    writeln!(go, "go").unwrap();
    assert!(worker.0.wait().unwrap().success() && host.0.wait().unwrap().success(), "within {SOON:?}");
}
