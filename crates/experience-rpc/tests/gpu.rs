//! Weight broadcasts over NCCL between tensors on a GPU, in two processes that share one. Run by `make test-gpu`; fails
//! without a GPU.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may panic, and prints what it measured")]
#![allow(clippy::disallowed_methods, reason = "a test reads its seed, paths and tasks from the environment")]

use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;

use tch::Device;
use unveil_testkit::{KilledOnDrop, ignored_test};
use unveil_testkit_model::{DIFFERENCE, PATIENCE, WeightPublisher, WeightSubscriber};

const ADDRESS: &str = "UNVEIL_TEST_HOST";
const VERSIONS: std::ops::Range<u64> = 1..4;

fn gpu() -> Device {
    unveil_model::device("cuda").unwrap_or_else(|e| panic!("this test needs a GPU: {e}"))
}

/// Waits for a line on stdin.
fn wait() {
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).unwrap();
}

#[test]
#[ignore = "the learner's side, which another test starts"]
fn server() {
    let publisher = WeightPublisher::new(gpu());
    publisher.publish(0);
    println!("ADDRESS {}", publisher.address());
    for version in VERSIONS {
        wait();
        publisher.publish(version);
        assert_eq!(publisher.sent(), (version, 1, 1, DIFFERENCE));
    }
    wait();
}

#[test]
#[ignore = "the worker's side, which another test starts"]
fn worker() {
    let address = std::env::var(ADDRESS).expect("started by another test");
    let device = gpu();
    let subscriber = WeightSubscriber::start(address, "worker".into(), device);
    assert!(subscriber.wait_for(0).whole);
    println!("HAS 0");
    for version in VERSIONS {
        assert_eq!(subscriber.wait_for_difference(version), [device; 2], "tensors stay on their device");
        println!("HAS {version}");
    }
}

/// Returns the rest of the next line that contains `word`.
fn line(lines: &mut impl Iterator<Item = String>, word: &str) -> String {
    let rest = lines.find_map(|l| l.split_once(word).map(|(_, rest)| rest.trim().to_owned()));
    rest.unwrap_or_else(|| panic!("no line with `{word}`: the process has failed"))
}

#[test]
fn weights_are_broadcast_between_gpus() {
    gpu();
    let start = |test: &str, mut environment: Vec<(&str, String)>| {
        // NCCL lets two processes share a GPU only if it believes that they are on different machines.
        environment.push(("NCCL_HOSTID", test.to_owned()));
        let plain = [("NCCL_P2P_DISABLE", "1"), ("NCCL_SHM_DISABLE", "1"), ("NCCL_NET", "Socket")];
        environment.extend(plain.iter().chain(&[("NCCL_SOCKET_IFNAME", "lo")]).map(|(k, v)| (*k, (*v).to_owned())));
        let mut command = ignored_test(test);
        let mut process =
            KilledOnDrop(command.envs(environment).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap());
        let lines = BufReader::new(process.0.stdout.take().unwrap()).lines().map_while(Result::ok);
        (process, lines)
    };
    let (mut server, mut server_lines) = start("server", vec![]);
    let address = line(&mut server_lines, "ADDRESS ");
    let (mut worker, mut worker_lines) = start("worker", vec![(ADDRESS, address)]);
    assert_eq!(line(&mut worker_lines, "HAS "), "0");
    let mut go = server.0.stdin.take().unwrap();
    for version in VERSIONS {
        writeln!(go, "go").unwrap();
        assert_eq!(line(&mut worker_lines, "HAS "), version.to_string());
    }
    writeln!(go, "go").unwrap();
    assert!(worker.0.wait().unwrap().success() && server.0.wait().unwrap().success(), "within {PATIENCE:?}");
}
