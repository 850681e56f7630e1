//! The real library, as torch brings it: found, asked, and used where there is no GPU.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use nccl_rs::{Communicator, NEEDED, Nccl, NcclError};

/// torch's package is where LIBTORCH is; NCCL lies beside it.
fn nccl() -> Nccl {
    let torch = PathBuf::from(std::env::var_os("LIBTORCH").expect("LIBTORCH is set by make setup"));
    let place = torch.parent().unwrap().join("nvidia/nccl/lib");
    let nccl = Nccl::load(&[&place]).unwrap();
    // A second search finds the copy that is loaded now.
    assert_eq!(Nccl::load(&[]).unwrap().path(), "libnccl.so.2");
    nccl
}

#[test]
fn it_is_found_and_names_communicators() {
    let nccl = nccl();
    assert!(nccl.version() >= NEEDED, "{}", nccl.version());
    let (a, b) = (nccl.unique_id().unwrap(), nccl.unique_id().unwrap());
    assert_ne!(a, b);
    assert!(a.0.iter().any(|x| *x != 0));
}

/// Without a GPU the reason is said at once; with one, a single rank is ready at once.
#[test]
fn init_ends_with_or_without_a_gpu() {
    let nccl = nccl();
    let id = nccl.unique_id().unwrap();
    let begin = Instant::now();
    let made = Communicator::init(&nccl, (0, 1), &id, begin + Duration::from_secs(60), || false);
    if std::fs::exists("/dev/nvidia0").unwrap_or(false) {
        made.unwrap().check("check").unwrap();
        return;
    }
    let error = made.err().unwrap();
    assert!(begin.elapsed() < Duration::from_secs(30), "{error}");
    let NcclError::Refused { call, code, text, .. } = &error else { panic!("{error}") };
    assert_eq!((*call, *code), ("ncclCommInitRankConfig", 1), "{error}");
    assert!(text.contains("cuda"), "{error}");
}
