//! The CUDA part: written to a temporary file, loaded once, and looked up. libtorch's own CUDA library must be loaded before.

use std::ffi::{c_char, c_int, c_void};
use std::io::Write;
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use crate::{ExtError, Result};

static BYTES: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/libunveil_cuda.so"));

type Call = unsafe extern "C" fn(*mut c_void, *mut c_char, usize) -> c_int;

/// The functions of cpp/cuda.cc.
pub(crate) struct Functions {
    pub new: unsafe extern "C" fn(*mut *mut c_void, *mut c_char, usize) -> c_int,
    pub begin: unsafe extern "C" fn(*mut c_void, c_int, *mut c_char, usize) -> c_int,
    pub end: Call,
    pub replay: Call,
    pub free: unsafe extern "C" fn(*mut c_void),
}

pub(crate) fn functions() -> Result<&'static Functions> {
    static LOADED: OnceLock<Result<Functions, String>> = OnceLock::new();
    LOADED.get_or_init(|| load().map_err(|e| e.to_string())).as_ref().map_err(|e| ExtError::Unavailable(e.clone()))
}

#[allow(unsafe_code)]
fn load() -> Result<Functions, Box<dyn std::error::Error>> {
    if BYTES.is_empty() {
        return Err("it was built without CUDA headers".into());
    }
    let mut file = tempfile::NamedTempFile::new()?;
    file.write_all(BYTES)?;
    // SAFETY: the library is this crate's own; it has no initialisers of its own beyond libtorch's, and stays loaded: the
    // handle is forgotten, so the symbols live as long as the process. Their types are those of cpp/cuda.cc.
    unsafe {
        let library = Library::open(Some(file.path()), RTLD_NOW | RTLD_LOCAL)?;
        let out = Functions {
            new: *library.get(b"unveil_graph_new")?,
            begin: *library.get(b"unveil_graph_begin")?,
            end: *library.get(b"unveil_graph_end")?,
            replay: *library.get(b"unveil_graph_replay")?,
            free: *library.get(b"unveil_graph_free")?,
        };
        std::mem::forget(library);
        Ok(out)
    }
}

/// Runs one call and reads its message.
pub(crate) fn checked(what: &'static str, call: impl FnOnce(*mut c_char, usize) -> c_int) -> Result<()> {
    let mut message = [0u8; 1024];
    if call(message.as_mut_ptr().cast(), message.len()) == 0 {
        return Ok(());
    }
    let end = message.iter().position(|b| *b == 0).unwrap_or(message.len());
    Err(ExtError::Cuda { what, message: String::from_utf8_lossy(&message[..end]).into_owned() })
}
