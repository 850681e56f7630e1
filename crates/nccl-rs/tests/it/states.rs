//! Arguments, waiting, deadlines and abort of communicators, with a stand-in for NCCL that is compiled here.

use std::ffi::c_void;
use std::process::Command;
use std::sync::atomic::{AtomicI32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use libloading::os::unix::Library;
use nccl_rs::{Communicator, DataType, MIN_VERSION, Nccl, NcclError, Transfer, UniqueId};

/// A separate copy of the stand-in, with its own state.
struct Fake {
    library: Library,
    file: std::path::PathBuf,
    _dir: tempfile::TempDir,
}

impl Fake {
    fn build() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("libnccl.so.2");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake_nccl.c");
        let status = Command::new("cc").args(["-shared", "-fPIC", source, "-o"]).arg(&file).status().unwrap();
        assert!(status.success(), "cc is needed to build {source}");
        // SAFETY: the library has no initialisers.
        let library = unsafe { Library::open(Some(&file), libloading::os::unix::RTLD_NOW) }.unwrap();
        Self { library, file, _dir: dir }
    }

    fn number(&self, name: &str) -> &AtomicI32 {
        // SAFETY: every name is an int of fake_nccl.c, which lives as long as the library; tests use it from one thread.
        unsafe { AtomicI32::from_ptr(*self.library.get::<*mut i32>(name.as_bytes()).unwrap()) }
    }

    fn get(&self, name: &str) -> i32 {
        self.number(name).load(Relaxed)
    }

    fn set(&self, name: &str, value: i32) {
        self.number(name).store(value, Relaxed);
    }

    fn log(&self) -> String {
        // SAFETY: fake_log is a NUL-terminated string in the library.
        unsafe { std::ffi::CStr::from_ptr(*self.library.get::<*const std::ffi::c_char>(b"fake_log").unwrap()) }
            .to_str()
            .unwrap()
            .to_owned()
    }

    fn nccl(&self) -> Nccl {
        Nccl::open(&self.file).unwrap()
    }

    fn rank(&self) -> Communicator {
        let nccl = self.nccl();
        Communicator::init(&nccl, (0, 1), &nccl.unique_id().unwrap(), soon(), || false).unwrap()
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

#[test]
fn calls_pass_nccls_arguments() {
    let fake = Fake::build();
    let comm = fake.rank();
    assert_eq!((comm.rank(), comm.ranks()), (0, 1));
    let from: Vec<f32> = (0..6).map(|i| i as f32).collect();
    let mut to = [[0f32; 6]; 3];
    let transfer = |count: usize, dtype: DataType| Transfer { count, dtype, stream: 77 as *mut c_void };
    let pair = |k: usize, to: &mut [[f32; 6]; 3]| (from.as_ptr().cast::<c_void>(), to[k].as_mut_ptr().cast::<c_void>());
    // SAFETY: all buffers are long enough and live through the call, which the stand-in executes immediately.
    comm.group(
        soon(),
        || false,
        |calls| unsafe {
            calls.all_reduce(pair(0, &mut to), transfer(6, DataType::Float32))?;
            calls.reduce_scatter(pair(1, &mut to), transfer(3, DataType::Float64))?;
            calls.all_gather(pair(2, &mut to), transfer(4, DataType::Bfloat16))?;
            calls.broadcast(to[0].as_mut_ptr().cast(), 0, transfer(2, DataType::Int64))?;
            calls.send(from.as_ptr().cast(), 1, transfer(5, DataType::Float32))?;
            calls.recv(to[0].as_mut_ptr().cast(), 3, transfer(1, DataType::Float32))
        },
    )
    .unwrap();
    assert_eq!(to[0].as_slice(), from.as_slice());
    assert_eq!((&to[1][..], &to[2][..2]), (&from[..], &from[..2]));
    let lines = [
        "all_reduce n=6 type=7 x=0 stream=77",
        "reduce_scatter n=3 type=8 x=0 stream=77",
        "all_gather n=4 type=9 x=0 stream=77",
        "broadcast n=2 type=4 x=0 stream=77",
        "send n=5 type=7 x=1 stream=77",
        "recv n=1 type=7 x=3 stream=77",
    ];
    assert_eq!(fake.log().lines().collect::<Vec<_>>(), lines);
    drop(comm);
    let counts = ["fake_finalizes", "fake_destroys", "fake_aborts", "fake_depth"].map(|n| fake.get(n));
    assert_eq!(counts, [1, 1, 0, 0], "the communicator is finalized and destroyed");
}

#[test]
fn failed_call_ends_its_group() {
    let fake = Fake::build();
    let comm = fake.rank();
    let mut buffer = [0f32; 2];
    let transfer = Transfer { count: 2, dtype: DataType::Float32, stream: std::ptr::null_mut() };
    // SAFETY: see above.
    let error =
        comm.group(soon(), || false, |c| unsafe { c.broadcast(buffer.as_mut_ptr().cast(), 9, transfer) }).unwrap_err();
    assert_eq!(error.to_string(), "ncclBroadcast: NCCL reports `invalid usage` (code 5)");
    assert_eq!(fake.get("fake_depth"), 0);
    drop(comm);
    assert_eq!(
        (fake.get("fake_aborts"), fake.get("fake_finalizes")),
        (1, 0),
        "a failed communicator is aborted, not finalized"
    );
}

#[test]
fn unfinished_work_times_out_and_abort_runs_once() {
    let fake = Fake::build();
    let comm = fake.rank();
    let short = Duration::from_millis(60);
    let begin = Instant::now();
    let error = comm.wait("all_reduce", begin + short, || Ok(false)).unwrap_err();
    assert!(begin.elapsed() >= short && begin.elapsed() < Duration::from_secs(5));
    assert!(matches!(error, NcclError::Timeout { call: "all_reduce", seconds } if seconds >= 0.06), "{error}");
    comm.abort();
    comm.abort();
    assert_eq!(fake.get("fake_aborts"), 1);
    let calls = fake.get("fake_calls");
    for error in [
        comm.check("check").unwrap_err(),
        comm.wait("wait", soon(), || Ok(false)).unwrap_err(),
        comm.group(soon(), || false, |_| Ok(())).unwrap_err(),
    ] {
        assert!(matches!(error, NcclError::Aborted { .. }), "{error}");
    }
    drop(comm);
    assert_eq!((fake.get("fake_aborts"), fake.get("fake_destroys")), (1, 0));
    assert_eq!(fake.get("fake_calls"), calls);
}

#[test]
fn asynchronous_errors_end_a_wait() {
    let fake = Fake::build();
    let comm = fake.rank();
    comm.wait("done", soon(), || Ok(true)).unwrap();
    fake.set("fake_code", 6);
    let error = comm.wait("all_gather", soon(), || Ok(false)).unwrap_err().to_string();
    assert_eq!(error, "all_gather: NCCL reports `remote process exited` (code 6): socket closed");
    let error = comm.wait("all_gather", soon(), || Err("illegal address".into())).unwrap_err().to_string();
    assert_eq!(error, "all_gather: work on the GPU failed: illegal address");
}

#[test]
fn init_waits_until_ready_or_the_deadline() {
    let fake = Fake::build();
    let nccl = fake.nccl();
    let id = nccl.unique_id().unwrap();
    fake.set("fake_polls", -1); // never ready
    let begin = Instant::now();
    let error = Communicator::init(&nccl, (0, 2), &id, begin + Duration::from_millis(50), || false).err().unwrap();
    assert!(matches!(error, NcclError::Timeout { .. }) && begin.elapsed() < Duration::from_secs(5), "{error}");
    assert_eq!(fake.get("fake_aborts"), 1);
    let mut polls = 0;
    let cancelled = || {
        polls += 1;
        polls == 3
    };
    let error = Communicator::init(&nccl, (0, 2), &id, soon(), cancelled).err().unwrap();
    assert!(matches!(error, NcclError::Cancelled { .. }), "{error}");
    assert_eq!(fake.get("fake_aborts"), 2);

    fake.set("fake_polls", 4);
    fake.set("fake_code", 6);
    let error = Communicator::init(&nccl, (0, 2), &id, soon(), || false).err().unwrap();
    assert!(matches!(error, NcclError::Failed { code: 6, .. }), "{error}");
    assert_eq!(fake.get("fake_aborts"), 3);

    let error = Communicator::init(&nccl, (0, 99), &id, soon(), || false).err().unwrap();
    assert!(matches!(error, NcclError::Failed { code: 5, .. }), "{error}");
    assert_eq!(fake.get("fake_aborts"), 3, "no communicator was created");
    let error = Communicator::init(&nccl, (2, 2), &UniqueId([5; 128]), soon(), || false).err().unwrap();
    assert!(matches!(error, NcclError::Rank { rank: 2, ranks: 2 }), "{error}");
}

#[test]
fn old_library_is_refused_with_both_versions() {
    let fake = Fake::build();
    fake.set("fake_version", 21310);
    let error = Nccl::open(&fake.file).err().unwrap().to_string();
    assert!(error.contains("NCCL 2.13.10") && error.contains(&MIN_VERSION.to_string()), "{error}");
    fake.set("fake_version", 30001);
    assert!(Nccl::open(&fake.file).is_err());
}

#[test]
fn errors_name_missing_functions_and_files() {
    let error = Nccl::open(std::path::Path::new("libc.so.6")).err().unwrap().to_string();
    assert!(error.contains("libc.so.6") && error.contains("ncclGetVersion"), "{error}");
    let error = Nccl::open(std::path::Path::new("/nowhere/libnccl.so.2")).err().unwrap().to_string();
    assert!(error.contains("/nowhere/libnccl.so.2") && error.contains("install"), "{error}");
}
