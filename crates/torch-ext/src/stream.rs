//! A stream of GPU work beside the one that computes, and points on it to wait for.

use std::ffi::{c_char, c_int, c_void};
use std::sync::OnceLock;

use tch::Tensor;

use crate::library::checked;
use crate::{Result, cuda};

type Call = unsafe extern "C" fn(*mut c_void, *mut c_char, usize) -> c_int;

/// The functions of cpp/cuda.cc.
struct Functions {
    new: unsafe extern "C" fn(c_int, *mut *mut c_void, *mut *mut c_void, *mut c_char, usize) -> c_int,
    free: unsafe extern "C" fn(*mut c_void),
    follow: Call,
    keep: unsafe extern "C" fn(*mut c_void, *const c_void, *mut c_char, usize) -> c_int,
    mark: unsafe extern "C" fn(*mut c_void, *mut *mut c_void, *mut c_char, usize) -> c_int,
    done: unsafe extern "C" fn(*mut c_void, *mut c_int, *mut c_char, usize) -> c_int,
    join: Call,
    free_event: unsafe extern "C" fn(*mut c_void),
}

fn functions() -> Result<&'static Functions> {
    static LOADED: OnceLock<Result<Functions, String>> = OnceLock::new();
    LOADED.get_or_init(load).as_ref().map_err(|e| cuda::unavailable(e))
}

#[allow(unsafe_code)]
fn load() -> Result<Functions, String> {
    let part = cuda::part()?;
    // SAFETY: the types are those of cpp/cuda.cc.
    unsafe {
        Ok(Functions {
            new: part.get(b"unveil_stream_new")?,
            free: part.get(b"unveil_stream_free")?,
            follow: part.get(b"unveil_stream_follow")?,
            keep: part.get(b"unveil_stream_keep")?,
            mark: part.get(b"unveil_stream_mark")?,
            done: part.get(b"unveil_event_done")?,
            join: part.get(b"unveil_event_join")?,
            free_event: part.get(b"unveil_event_free")?,
        })
    }
}

/// A stream of high priority on one GPU.
pub struct CudaStream {
    handle: *mut c_void,
    raw: *mut c_void,
    functions: &'static Functions,
}

// SAFETY: the handle is a plain value that names a stream; libtorch's stream functions may be called on any thread.
#[allow(unsafe_code)]
unsafe impl Send for CudaStream {}
// SAFETY: as above; no function changes the handle.
#[allow(unsafe_code)]
unsafe impl Sync for CudaStream {}

impl CudaStream {
    /// A stream on GPU `device`, which also becomes the calling thread's GPU.
    ///
    /// # Errors
    /// The CUDA part cannot be used, or there is no such GPU.
    #[allow(unsafe_code)]
    pub fn new(device: usize) -> Result<Self> {
        let functions = functions()?;
        let (mut handle, mut raw) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: both places are written before they are used; the handle is freed once, by Drop.
        checked("a CUDA stream", |m, n| unsafe {
            (functions.new)(c_int::try_from(device).unwrap_or(-1), &mut handle, &mut raw, m, n)
        })?;
        Ok(Self { handle, raw, functions })
    }

    /// The driver's handle (`cudaStream_t`); valid for the life of the process.
    pub fn raw(&self) -> *mut c_void {
        self.raw
    }

    /// What is put on this stream from here on runs after all that the calling thread has put on its current stream.
    ///
    /// # Errors
    /// The driver refuses.
    #[allow(unsafe_code)]
    pub fn follow(&self) -> Result<()> {
        // SAFETY: the handle is valid until Drop.
        checked("let a CUDA stream wait", |m, n| unsafe { (self.functions.follow)(self.handle, m, n) })
    }

    /// Keeps the memory of a CUDA tensor from being used again before this stream's work of this moment has ended.
    ///
    /// # Errors
    /// The tensor is not one of libtorch's on a GPU.
    #[allow(unsafe_code)]
    pub fn keep(&self, tensor: &Tensor) -> Result<()> {
        // SAFETY: both handles are valid during the call.
        checked("keep a tensor for a CUDA stream", |m, n| unsafe {
            (self.functions.keep)(self.handle, tensor.as_ptr().cast(), m, n)
        })
    }

    /// The point at which all of this stream's work of this moment has ended.
    ///
    /// # Errors
    /// The driver refuses.
    #[allow(unsafe_code)]
    pub fn mark(&self) -> Result<CudaEvent> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: the handle is valid until Drop; the place is written before it is used.
        checked("record a CUDA event", |m, n| unsafe { (self.functions.mark)(self.handle, &mut handle, m, n) })?;
        Ok(CudaEvent { handle, functions: self.functions })
    }
}

impl Drop for CudaStream {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: the handle came from `new` and is not used again.
        unsafe { (self.functions.free)(self.handle) }
    }
}

/// A point on a stream.
pub struct CudaEvent {
    handle: *mut c_void,
    functions: &'static Functions,
}

// SAFETY: events may be asked and freed on any thread.
#[allow(unsafe_code)]
unsafe impl Send for CudaEvent {}

impl CudaEvent {
    /// Whether the stream has come past it; does not wait.
    ///
    /// # Errors
    /// Work on the GPU has failed.
    #[allow(unsafe_code)]
    pub fn done(&self) -> Result<bool> {
        let mut done = 0;
        // SAFETY: the handle is valid until Drop.
        checked("ask a CUDA event", |m, n| unsafe { (self.functions.done)(self.handle, &mut done, m, n) })?;
        Ok(done != 0)
    }

    /// What the calling thread puts on its current stream from here on runs after the event.
    ///
    /// # Errors
    /// The driver refuses.
    #[allow(unsafe_code)]
    pub fn join(&self) -> Result<()> {
        // SAFETY: the handle is valid until Drop.
        checked("wait for a CUDA event", |m, n| unsafe { (self.functions.join)(self.handle, m, n) })
    }
}

impl Drop for CudaEvent {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: the handle came from `mark` and is not used again.
        unsafe { (self.functions.free_event)(self.handle) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every function is in the part; where there is no GPU a stream is refused, and the process lives on.
    #[test]
    fn a_stream_works_or_is_refused() {
        cuda::load_torch().unwrap();
        functions().unwrap();
        if std::fs::exists("/dev/nvidia0").unwrap_or(false) {
            let stream = CudaStream::new(0).unwrap();
            stream.follow().unwrap();
            let event = stream.mark().unwrap();
            event.join().unwrap();
            while !event.done().unwrap() {}
            return;
        }
        let error = CudaStream::new(0).err().unwrap().to_string();
        assert!(error.contains("CUDA stream"), "{error}");
    }
}
