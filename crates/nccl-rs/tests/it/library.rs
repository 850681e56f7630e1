//! Tests with the real library that torch depends on; they run with and without a GPU.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use nccl_rs::{Communicator, MIN_VERSION, Nccl, NcclError};

/// Loads NCCL from the directory next to torch's package, which LIBTORCH names.
fn nccl() -> Nccl {
    let torch = PathBuf::from(std::env::var_os("LIBTORCH").expect("LIBTORCH is set by make setup"));
    let dir = torch.parent().unwrap().join("nvidia/nccl/lib");
    let nccl = Nccl::load(&[&dir]).unwrap();
    // A second search finds the copy that is now loaded.
    assert_eq!(Nccl::load(&[]).unwrap().path(), "libnccl.so.2");
    nccl
}

#[test]
fn real_library_is_found_and_creates_unique_ids() {
    let nccl = nccl();
    assert!(nccl.version() >= MIN_VERSION, "{}", nccl.version());
    let first = nccl.unique_id().unwrap();
    let second = nccl.unique_id().unwrap();
    assert_ne!(first, second);
    assert!(first.0.iter().any(|x| *x != 0));
}

/// Without a GPU `init` fails with the reason; with one, a single rank is ready immediately.
#[test]
fn init_returns_with_or_without_a_gpu() {
    let nccl = nccl();
    let id = nccl.unique_id().unwrap();
    let begin = Instant::now();
    let communicator = Communicator::init(&nccl, (0, 1), &id, begin + Duration::from_secs(60), || false);
    if std::fs::exists("/dev/nvidia0").unwrap_or(false) {
        communicator.unwrap().check("check").unwrap();
        return;
    }
    let error = communicator.err().unwrap();
    assert!(begin.elapsed() < Duration::from_secs(30), "{error}");
    let NcclError::Failed { call, code, text, .. } = &error else { panic!("{error}") };
    assert_eq!((*call, *code), ("ncclCommInitRankConfig", 1), "{error}");
    assert!(text.contains("cuda"), "{error}");
}
