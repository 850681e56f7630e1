//! libtorch's CUDA library and this crate's own, both found and loaded at run time, once.

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use crate::library::{NativeLibrary, loader_message, native_library};

/// The driver's library. Without it no GPU is usable, and the large CUDA library of libtorch is not loaded.
const DRIVER: &str = "libcuda.so.1";
const TORCH_CUDA: &str = "libtorch_cuda.so";

/// Loads libtorch's CUDA library for the rest of the process. Call it before libtorch is first asked about CUDA.
///
/// # Errors
/// Returns a text that says what cannot be loaded: the NVIDIA driver or libtorch's CUDA library.
pub fn load_cuda() -> Result<(), String> {
    open(DRIVER).map_err(|_| format!("no NVIDIA driver here ({DRIVER} cannot be loaded)"))?;
    load_torch()
}

pub(crate) fn load_torch() -> Result<(), String> {
    open(TORCH_CUDA).map_err(|e| format!("libtorch's CUDA library cannot be loaded: {}", loader_message(&e)))
}

/// Loads a library whose symbols and static registrations libtorch can see.
fn open(name: &str) -> Result<(), libloading::Error> {
    // SAFETY: both libraries may be loaded at any time, and stay loaded: the handle is never closed.
    let library = unsafe { Library::open(Some(name), RTLD_NOW | RTLD_GLOBAL) }?;
    std::mem::forget(library);
    Ok(())
}

/// cpp/cuda.cc; [`load_cuda`] must have been called.
pub(crate) fn library() -> Result<&'static NativeLibrary, String> {
    native_library!("cuda", "CUDA's headers were not found next to libtorch (make setup installs them)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cuda_library_is_found_at_run_time() {
        // libtorch looks for its CUDA library once, when it is first asked: it must be loaded before that.
        load_torch().unwrap();
        assert!(tch::utils::has_cudart());
    }

    #[test]
    fn a_missing_driver_is_reported() {
        let has_gpu = std::fs::exists("/dev/nvidia0").unwrap_or(false);
        assert_eq!(load_cuda().err().map(|e| e.contains(DRIVER)), (!has_gpu).then_some(true));
    }
}
