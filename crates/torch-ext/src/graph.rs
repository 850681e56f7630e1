//! CUDA graphs: work that is recorded once and replayed with one call, on the same memory.

use std::cell::Cell;
use std::ffi::{c_char, c_int, c_void};

use crate::library::{check_call, function_table};
use crate::{ExtError, Result, cuda};

type GraphCall = unsafe extern "C" fn(*mut c_void, *mut c_char, usize) -> c_int;

// cpp/cuda.cc
function_table! {
    "CUDA", cuda::library();
    new: unsafe extern "C" fn(*mut *mut c_void, *mut c_char, usize) -> c_int = b"unveil_graph_new",
    pool: unsafe extern "C" fn(*mut u64, *mut u64, *mut c_char, usize) -> c_int = b"unveil_graph_pool",
    begin: unsafe extern "C" fn(*mut c_void, c_int, u64, u64, *mut c_char, usize) -> c_int = b"unveil_graph_begin",
    end: GraphCall = b"unveil_graph_end",
    replay: GraphCall = b"unveil_graph_replay",
    free: unsafe extern "C" fn(*mut c_void) = b"unveil_graph_free",
}

/// Memory that graphs share which are recorded and replayed one after another. The intermediate values of one are overwritten by the
/// others; tensors that are kept from a recording are not. A pool is usable as long as one of its graphs exists; replace it after the last.
#[derive(Debug, Default)]
pub struct GraphPool {
    /// libtorch's name of the pool, once it is used.
    id: Cell<Option<(u64, u64)>>,
}

impl GraphPool {
    fn id(&self, functions: &Functions) -> Result<(u64, u64)> {
        if let Some(id) = self.id.get() {
            return Ok(id);
        }
        let mut id = (0, 0);
        // SAFETY: both numbers are written during the call only.
        check_call("create a memory pool of CUDA graphs", |m, n| unsafe {
            (functions.pool)(&raw mut id.0, &raw mut id.1, m, n)
        })?;
        self.id.set(Some(id));
        Ok(id)
    }
}

/// Recorded work of one thread on one GPU. The tensors that it reads and writes must stay at their addresses; tensors created during
/// the recording belong to the graph's own memory and hold the values of the latest replay.
#[derive(Debug)]
pub struct CudaGraph {
    handle: *mut c_void,
    functions: &'static Functions,
}

impl CudaGraph {
    /// Records what `work` does on GPU `device`, without running it; its memory comes from `pool`. Work that waits for the GPU or copies to the host cannot be
    /// recorded. Run it once before, so that libraries have initialised themselves.
    ///
    /// # Errors
    /// Returns [`ExtError::Unavailable`] if the CUDA library cannot be loaded, and [`ExtError::Refused`] if the work cannot be
    /// recorded or has panicked.
    pub fn record<T>(device: usize, pool: &GraphPool, work: impl FnOnce() -> T) -> Result<(Self, T)> {
        let functions = functions()?;
        let (first, second) = pool.id(functions)?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: `handle` is written before it is used, and freed once, by Drop.
        check_call("create a CUDA graph", |m, n| unsafe { (functions.new)(&mut handle, m, n) })?;
        let graph = Self { handle, functions };
        // SAFETY: the handle is valid until Drop; both calls are made on this thread.
        check_call("begin to record a CUDA graph", |m, n| unsafe {
            (functions.begin)(handle, device as i32, first, second, m, n)
        })?;
        let what = "record a CUDA graph";
        // A refused operation may panic; the recording must end all the same.
        let output = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        // SAFETY: the handle is valid until Drop.
        let ended = check_call(what, |m, n| unsafe { (functions.end)(handle, m, n) });
        let output = output.map_err(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            ExtError::Refused { what, message: text.unwrap_or("an operation failed").to_owned() }
        })?;
        ended.map(|()| (graph, output))
    }

    /// Runs the recorded work on the calling thread's current stream.
    ///
    /// # Errors
    /// Returns [`ExtError::Refused`] if the driver refuses.
    pub fn replay(&self) -> Result<()> {
        // SAFETY: the handle is valid until Drop.
        check_call("run a CUDA graph", |m, n| unsafe { (self.functions.replay)(self.handle, m, n) })
    }
}

impl Drop for CudaGraph {
    fn drop(&mut self) {
        // SAFETY: the handle came from `new` and is not used again.
        unsafe { (self.functions.free)(self.handle) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The CUDA library is in this build and finds libtorch's symbols. Without a GPU it returns an error, and the process survives.
    #[test]
    fn recording_works_or_is_refused() {
        cuda::load_torch().unwrap();
        functions().unwrap();
        if std::fs::exists("/dev/nvidia0").unwrap_or(false) {
            let pool = GraphPool::default();
            let graphs = [0, 1].map(|_| CudaGraph::record(0, &pool, || ()).unwrap().0);
            graphs.iter().for_each(|graph| graph.replay().unwrap());
            return;
        }
        let error = CudaGraph::record(0, &GraphPool::default(), || ()).err().unwrap().to_string();
        assert!(error.contains("CUDA graph"), "{error}");
    }
}
