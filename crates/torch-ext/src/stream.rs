//! A CUDA stream besides the one that computes, and events on it.

use std::ffi::{c_char, c_int, c_void};

use tch::Tensor;

use crate::library::{check_call, function_table};
use crate::{Result, cuda};

type HandleCall = unsafe extern "C" fn(*mut c_void, *mut c_char, usize) -> c_int;

// cpp/cuda.cc
function_table! {
    "CUDA", cuda::library();
    new: unsafe extern "C" fn(c_int, *mut *mut c_void, *mut *mut c_void, *mut c_char, usize) -> c_int = b"unveil_stream_new",
    free: unsafe extern "C" fn(*mut c_void) = b"unveil_stream_free",
    wait_current: HandleCall = b"unveil_stream_wait_current",
    record_use: unsafe extern "C" fn(*mut c_void, *const c_void, *mut c_char, usize) -> c_int = b"unveil_stream_record_use",
    record_event: unsafe extern "C" fn(*mut c_void, *mut *mut c_void, *mut c_char, usize) -> c_int = b"unveil_stream_record_event",
    query_event: unsafe extern "C" fn(*mut c_void, *mut c_int, *mut c_char, usize) -> c_int = b"unveil_event_query",
    block_current: HandleCall = b"unveil_event_block_current",
    free_event: unsafe extern "C" fn(*mut c_void) = b"unveil_event_free",
}

/// A high-priority stream on one GPU.
#[derive(Debug)]
pub struct CudaStream {
    handle: *mut c_void,
    raw: *mut c_void,
    functions: &'static Functions,
}

// SAFETY: the handle is a plain value that names a stream; libtorch's stream functions may be called on any thread.
unsafe impl Send for CudaStream {}
// SAFETY: as above; no function changes the handle.
unsafe impl Sync for CudaStream {}

impl CudaStream {
    /// Creates a stream on GPU `device`, which also becomes the calling thread's current GPU.
    ///
    /// # Errors
    /// Returns [`ExtError::Unavailable`] if the CUDA library cannot be loaded, and [`ExtError::Refused`] if there is no such GPU.
    ///
    /// [`ExtError::Unavailable`]: crate::ExtError::Unavailable
    /// [`ExtError::Refused`]: crate::ExtError::Refused
    pub fn new(device: usize) -> Result<Self> {
        let functions = functions()?;
        let mut handle = std::ptr::null_mut();
        let mut raw = std::ptr::null_mut();
        // SAFETY: both pointers are written before they are used; the handle is freed once, by Drop.
        check_call("create a CUDA stream", |m, n| unsafe {
            (functions.new)(c_int::try_from(device).unwrap_or(-1), &mut handle, &mut raw, m, n)
        })?;
        Ok(Self { handle, raw, functions })
    }

    /// Returns the driver's handle (`cudaStream_t`), which is valid for the life of the process.
    pub fn raw(&self) -> *mut c_void {
        self.raw
    }

    /// Makes later work on this stream wait for all work that is now on the calling thread's current stream.
    ///
    /// # Errors
    /// Returns [`ExtError::Refused`](crate::ExtError::Refused) if the driver refuses.
    pub fn wait_for_current(&self) -> Result<()> {
        // SAFETY: the handle is valid until Drop.
        check_call("let a CUDA stream wait", |m, n| unsafe { (self.functions.wait_current)(self.handle, m, n) })
    }

    /// Keeps the memory of a CUDA tensor from being reused before all work that is now on this stream has ended.
    ///
    /// # Errors
    /// Returns [`ExtError::Refused`](crate::ExtError::Refused) if the tensor is not one of libtorch's on a GPU.
    pub fn record_use(&self, tensor: &Tensor) -> Result<()> {
        // SAFETY: both handles are valid during the call.
        check_call("record the use of a tensor on a CUDA stream", |m, n| unsafe {
            (self.functions.record_use)(self.handle, tensor.as_ptr().cast(), m, n)
        })
    }

    /// Returns an event that is reached when all work that is now on this stream has ended.
    ///
    /// # Errors
    /// Returns [`ExtError::Refused`](crate::ExtError::Refused) if the driver refuses.
    pub fn record_event(&self) -> Result<CudaEvent> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: the stream's handle is valid until Drop; the event's is written before it is used.
        check_call("record a CUDA event", |m, n| unsafe {
            (self.functions.record_event)(self.handle, &mut handle, m, n)
        })?;
        Ok(CudaEvent { handle, functions: self.functions })
    }
}

impl Drop for CudaStream {
    fn drop(&mut self) {
        // SAFETY: the handle came from `new` and is not used again.
        unsafe { (self.functions.free)(self.handle) }
    }
}

/// A point in the work of a stream.
#[derive(Debug)]
pub struct CudaEvent {
    handle: *mut c_void,
    functions: &'static Functions,
}

// SAFETY: events may be queried and freed on any thread.
unsafe impl Send for CudaEvent {}

impl CudaEvent {
    /// Returns whether the stream has passed the event, without waiting.
    ///
    /// # Errors
    /// Returns [`ExtError::Refused`](crate::ExtError::Refused) if work on the GPU has failed.
    pub fn is_done(&self) -> Result<bool> {
        let mut done = 0;
        // SAFETY: the handle is valid until Drop.
        check_call("query a CUDA event", |m, n| unsafe { (self.functions.query_event)(self.handle, &mut done, m, n) })?;
        Ok(done != 0)
    }

    /// Makes later work on the calling thread's current stream wait for the event.
    ///
    /// # Errors
    /// Returns [`ExtError::Refused`](crate::ExtError::Refused) if the driver refuses.
    pub fn block_current(&self) -> Result<()> {
        // SAFETY: the handle is valid until Drop.
        check_call("wait for a CUDA event", |m, n| unsafe { (self.functions.block_current)(self.handle, m, n) })
    }
}

impl Drop for CudaEvent {
    fn drop(&mut self) {
        // SAFETY: the handle came from `record_event` and is not used again.
        unsafe { (self.functions.free_event)(self.handle) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All functions are in the library. Without a GPU a stream is refused, and the process survives.
    #[test]
    fn a_stream_works_or_is_refused() {
        cuda::load_torch().unwrap();
        functions().unwrap();
        if std::fs::exists("/dev/nvidia0").unwrap_or(false) {
            let stream = CudaStream::new(0).unwrap();
            stream.wait_for_current().unwrap();
            let event = stream.record_event().unwrap();
            event.block_current().unwrap();
            while !event.is_done().unwrap() {}
            return;
        }
        let error = CudaStream::new(0).err().unwrap().to_string();
        assert!(error.contains("CUDA stream"), "{error}");
    }
}
