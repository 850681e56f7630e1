//! A fake of NVIDIA's driver library that reports GPUs and their memory.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A fake `libcuda.so.1`, deleted on drop.
#[derive(Debug)]
pub struct FakeDriver {
    dir: tempfile::TempDir,
    library: PathBuf,
}

/// Source of the library. Contexts are numbers from 1, kept on a stack; only the functions that count GPUs and report memory exist.
const SOURCE: &str = r"
static int stack[16], depth, retained[COUNT + 1];
int cuInit(unsigned flags) { return flags; }
int cuDeviceGetCount(int *count) { *count = COUNT; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal < 0 || ordinal >= COUNT ? 101 : 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { retained[device]++; *context = (void *)(long)(device + 1); return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return --retained[device] < 0 ? 201 : 0; }
int cuCtxPushCurrent_v2(void *context) { stack[++depth] = (int)(long)context; return 0; }
int cuCtxPopCurrent_v2(void **context) { *context = (void *)(long)stack[depth--]; return 0; }
int cuDeviceTotalMem_v2(unsigned long *bytes, int device) { *bytes = memory[device][1]; return 0; }
int cuMemGetInfo_v2(unsigned long *free, unsigned long *total) {
  int device = depth > 0 ? stack[depth] - 1 : 0;
  *free = memory[device][0];
  *total = memory[device][1];
  return 0;
}
int fake_held(void) { int all = depth; for (int i = 0; i < COUNT; i++) all += retained[i]; return all; }
";

impl FakeDriver {
    /// Builds a driver with one GPU per entry of `memory`, its free and total bytes. Without a current context it reports the first GPU.
    pub fn build(memory: &[(u64, u64)]) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let source = dir.path().join("fake.c");
        let library = dir.path().join("libcuda.so.1");
        let mut text = format!("#define COUNT {}\nstatic unsigned long memory[COUNT + 1][2] = {{", memory.len());
        for (free, total) in memory {
            write!(text, "{{{free}ul, {total}ul}}, ").expect("text");
        }
        text += "{0, 0}};";
        text += SOURCE;
        std::fs::write(&source, text).expect("the temporary directory can be written");
        let built = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).status();
        assert!(built.is_ok_and(|s| s.success()), "cc is required to build the fake driver");
        Self { dir, library }
    }

    /// Returns the path of the library.
    pub fn library(&self) -> &Path {
        &self.library
    }

    /// Returns the directory of the library, for `LD_LIBRARY_PATH`.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }
}
