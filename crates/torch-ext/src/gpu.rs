//! A GPU as a whole: the one that a thread means, what libtorch keeps of its memory, and host memory that it copies by itself.

use std::ffi::{c_char, c_int, c_void};
use std::sync::OnceLock;

use crate::library::checked;
use crate::{Result, cuda};

/// The functions of cpp/cuda.cc.
struct Functions {
    own: unsafe extern "C" fn(c_int, *mut c_char, usize) -> c_int,
    kept: unsafe extern "C" fn(c_int, *mut i64, *mut i64, *mut c_char, usize) -> c_int,
    lock: unsafe extern "C" fn(*mut c_void, usize, *mut c_char, usize) -> c_int,
    unlock: unsafe extern "C" fn(*mut c_void, *mut c_char, usize) -> c_int,
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
            own: part.get(b"unveil_device_own")?,
            kept: part.get(b"unveil_device_kept")?,
            lock: part.get(b"unveil_host_lock")?,
            unlock: part.get(b"unveil_host_unlock")?,
        })
    }
}

/// Makes GPU `device` the calling thread's own: what names no GPU means it from here on.
///
/// # Errors
/// The CUDA part cannot be used, or there is no such GPU.
#[allow(unsafe_code)]
pub fn own_gpu(device: usize) -> Result<()> {
    let f = functions()?;
    // SAFETY: the function keeps no pointer.
    checked("take a GPU", |m, n| unsafe { (f.own)(c_int::try_from(device).unwrap_or(-1), m, n) })
}

/// What libtorch's allocator has of a GPU's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Kept {
    /// Bytes that it took from the driver.
    pub reserved: u64,
    /// Bytes of them that tensors use; the rest is there for the next ones.
    pub allocated: u64,
}

/// What libtorch's allocator has of the memory of GPU `device`.
///
/// # Errors
/// The CUDA part cannot be used, or there is no such GPU.
#[allow(unsafe_code)]
pub fn kept_memory(device: usize) -> Result<Kept> {
    let (f, mut reserved, mut allocated) = (functions()?, 0, 0);
    // SAFETY: both places are written during the call only.
    checked("the allocator of a GPU", |m, n| unsafe {
        (f.kept)(c_int::try_from(device).unwrap_or(-1), &raw mut reserved, &raw mut allocated, m, n)
    })?;
    let bytes = |n: i64| u64::try_from(n).unwrap_or(0);
    Ok(Kept { reserved: bytes(reserved), allocated: bytes(allocated) })
}

/// Locks host memory where it lies, so that a GPU copies to and from it at the bus's full rate.
///
/// # Errors
/// The driver refuses.
#[allow(unsafe_code)]
pub(crate) fn lock(memory: &mut [u8]) -> Result<()> {
    let f = functions()?;
    // SAFETY: the memory is there for the time of the call; whoever owns it unlocks it before it goes.
    checked("lock host memory", |m, n| unsafe { (f.lock)(memory.as_mut_ptr().cast(), memory.len(), m, n) })
}

/// Undoes [`lock`] for memory that begins there.
#[allow(unsafe_code)]
pub(crate) fn unlock(memory: &mut [u8]) -> Result<()> {
    let f = functions()?;
    // SAFETY: as above.
    checked("unlock host memory", |m, n| unsafe { (f.unlock)(memory.as_mut_ptr().cast(), m, n) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every function is in the part; where there is no GPU each is refused, and the process lives on.
    #[test]
    fn a_gpu_is_taken_or_refused() {
        cuda::load_torch().unwrap();
        functions().unwrap();
        let mut memory = vec![0u8; 1 << 16];
        if std::fs::exists("/dev/nvidia0").unwrap_or(false) {
            own_gpu(0).unwrap();
            let kept = kept_memory(0).unwrap();
            assert!(kept.reserved >= kept.allocated);
            lock(&mut memory).unwrap();
            unlock(&mut memory).unwrap();
            return;
        }
        assert!(own_gpu(0).unwrap_err().to_string().contains("take a GPU"));
        assert!(lock(&mut memory).unwrap_err().to_string().contains("lock host memory"));
        // Nothing was ever allocated there.
        assert_eq!(kept_memory(0).unwrap(), Kept::default());
    }
}
