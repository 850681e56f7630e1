//! CUDA graphs: work that is recorded once and run again with one call, on the same memory.

use std::ffi::{c_char, c_int, c_void};
use std::sync::OnceLock;

use crate::library::checked;
use crate::{ExtError, Result, cuda};

type Call = unsafe extern "C" fn(*mut c_void, *mut c_char, usize) -> c_int;

/// The functions of cpp/cuda.cc.
struct Functions {
    new: unsafe extern "C" fn(*mut *mut c_void, *mut c_char, usize) -> c_int,
    begin: unsafe extern "C" fn(*mut c_void, c_int, *mut c_char, usize) -> c_int,
    end: Call,
    replay: Call,
    free: unsafe extern "C" fn(*mut c_void),
}

fn functions() -> Result<&'static Functions> {
    static LOADED: OnceLock<Result<Functions, String>> = OnceLock::new();
    let loaded = LOADED.get_or_init(load).as_ref();
    loaded.map_err(|e| cuda::unavailable(e))
}

#[allow(unsafe_code)]
fn load() -> Result<Functions, String> {
    let part = cuda::part()?;
    // SAFETY: the types are those of cpp/cuda.cc.
    unsafe {
        Ok(Functions {
            new: part.get(b"unveil_graph_new")?,
            begin: part.get(b"unveil_graph_begin")?,
            end: part.get(b"unveil_graph_end")?,
            replay: part.get(b"unveil_graph_replay")?,
            free: part.get(b"unveil_graph_free")?,
        })
    }
}

/// Recorded work of one thread on one GPU. What it reads and writes must stay where it was: tensors that were made during the
/// recording belong to the graph's own memory and hold the newest run's values.
pub struct CudaGraph {
    handle: *mut c_void,
    functions: &'static Functions,
}

impl CudaGraph {
    /// Records what `work` does on GPU `device`; nothing of it runs yet. Work that waits for the GPU or copies to the host
    /// cannot be recorded. Run it once before, so that libraries have set themselves up.
    ///
    /// # Errors
    /// The CUDA part cannot be used, the work cannot be recorded, or it panicked.
    #[allow(unsafe_code)]
    pub fn record<T>(device: usize, work: impl FnOnce() -> T) -> Result<(Self, T)> {
        let functions = functions()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: `handle` is written before it is used, and freed once, by Drop.
        checked("a CUDA graph", |m, n| unsafe { (functions.new)(&mut handle, m, n) })?;
        let graph = Self { handle, functions };
        // SAFETY: the handle is valid until Drop; both calls are made on this thread.
        checked("begin to record a CUDA graph", |m, n| unsafe { (functions.begin)(handle, device as i32, m, n) })?;
        let what = "record a CUDA graph";
        // An operation that is refused may panic; the recording must end all the same.
        let made = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        // SAFETY: as above.
        let ended = checked(what, |m, n| unsafe { (functions.end)(handle, m, n) });
        let made = made.map_err(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            ExtError::Refused { what, message: text.unwrap_or("an operation failed").to_owned() }
        })?;
        ended.map(|()| (graph, made))
    }

    /// Runs the recorded work, in order with the thread's other work.
    ///
    /// # Errors
    /// The driver refuses.
    #[allow(unsafe_code)]
    pub fn replay(&self) -> Result<()> {
        // SAFETY: the handle is valid until Drop.
        checked("run a CUDA graph", |m, n| unsafe { (self.functions.replay)(self.handle, m, n) })
    }
}

impl Drop for CudaGraph {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: the handle came from `new` and is not used again.
        unsafe { (self.functions.free)(self.handle) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The CUDA part is in this build, finds libtorch's symbols, and says so where there is no GPU; it never takes the process
    /// down.
    #[test]
    fn the_cuda_part_loads_and_refuses_without_a_gpu() {
        cuda::load_torch().unwrap();
        functions().unwrap();
        if std::fs::exists("/dev/nvidia0").unwrap_or(false) {
            CudaGraph::record(0, || ()).unwrap().0.replay().unwrap();
            return;
        }
        let error = CudaGraph::record(0, || ()).err().unwrap().to_string();
        assert!(error.contains("CUDA graph"), "{error}");
    }
}
