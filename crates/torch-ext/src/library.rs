//! Loading of the C++ libraries that this crate embeds: each is loaded from memory on first use and stays loaded for the life of the
//! process.

use std::ffi::{c_char, c_int};
use std::io::Write;
use std::os::fd::AsRawFd;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::{ExtError, Result};

/// A loaded C++ library. It is kept in a static and never unloaded.
pub(crate) struct NativeLibrary {
    library: Library,
    /// Kept open: the loader identifies libraries by path, and would mistake another library with the same descriptor for this one.
    _file: std::fs::File,
}

impl NativeLibrary {
    /// Loads a library from its bytes; the libtorch libraries that it needs must be loaded already. The error is a text, which
    /// contains `missing` if the library was left out of the build.
    pub(crate) fn load(name: &str, bytes: &[u8], missing: &str) -> Result<Self, String> {
        if bytes.is_empty() {
            return Err(format!("it was left out of this build: {missing}"));
        }
        let file = memfd_create(name, MFdFlags::MFD_CLOEXEC).map_err(|e| e.to_string())?;
        let mut file = std::fs::File::from(file);
        file.write_all(bytes).map_err(|e| e.to_string())?;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        // SAFETY: the library belongs to this crate and has no initialisers beyond those of libtorch.
        let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }.map_err(|e| loader_message(&e))?;
        Ok(Self { library, _file: file })
    }

    /// Looks up a function of the library.
    ///
    /// # Safety
    /// `F` is the function's type.
    pub(crate) unsafe fn get<F: Copy>(&'static self, symbol: &[u8]) -> Result<F, String> {
        // SAFETY: by the caller.
        unsafe { self.library.get::<F>(symbol) }.map(|f| *f).map_err(|e| loader_message(&e))
    }
}

/// Returns the system's message about a library or function that it cannot load; the error itself names neither.
pub(crate) fn loader_message(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// The library `libunveil_$name.so` that the build script made, loaded on first use: `Result<&'static NativeLibrary, String>`.
/// `$missing` says what the build lacked if the library is empty.
macro_rules! native_library {
    ($name:literal, $missing:expr) => {{
        static LOADED: std::sync::OnceLock<Result<$crate::library::NativeLibrary, String>> = std::sync::OnceLock::new();
        let bytes = include_bytes!(concat!(env!("OUT_DIR"), "/libunveil_", $name, ".so"));
        let load = || $crate::library::NativeLibrary::load(concat!("unveil_", $name), bytes, $missing);
        LOADED.get_or_init(load).as_ref().map_err(Clone::clone)
    }};
}

/// Declares the struct `Functions` with the C functions `field: type = symbol` of a library, and `functions()`, which looks all of
/// them up on first use. The types must be those of the C++ source. `$name` names the library in [`ExtError::Unavailable`].
macro_rules! function_table {
    ($name:literal, $library:expr; $($field:ident: $type:ty = $symbol:literal,)+) => {
        #[derive(Debug)]
        struct Functions {
            $($field: $type,)+
        }

        fn functions() -> $crate::Result<&'static Functions> {
            static LOADED: std::sync::OnceLock<Result<Functions, String>> = std::sync::OnceLock::new();
            fn load() -> Result<Functions, String> {
                let library = $library?;
                // SAFETY: the types are those of the C++ source.
                unsafe { Ok(Functions { $($field: library.get::<$type>($symbol)?,)+ }) }
            }
            let loaded = LOADED.get_or_init(load).as_ref();
            loaded.map_err(|reason| $crate::ExtError::Unavailable { library: $name, reason: reason.clone() })
        }
    };
}

pub(crate) use {function_table, native_library};

/// Makes a call that returns 0, or 1 with a message.
///
/// # Errors
/// Returns [`ExtError::Refused`] with `what` and the message if the call does not return 0.
pub(crate) fn check_call(what: &'static str, call: impl FnOnce(*mut c_char, usize) -> c_int) -> Result<()> {
    let mut message = [0u8; 1024];
    if call(message.as_mut_ptr().cast(), message.len()) == 0 {
        return Ok(());
    }
    let end = message.iter().position(|b| *b == 0).unwrap_or(message.len());
    Err(ExtError::Refused { what, message: String::from_utf8_lossy(&message[..end]).into_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_and_invalid_libraries_are_refused() {
        let error = NativeLibrary::load("unveil_none", b"", "install libnone-dev").err().unwrap();
        assert_eq!(error, "it was left out of this build: install libnone-dev");
        assert!(NativeLibrary::load("unveil_none", b"no library", "").is_err());
    }

    #[test]
    fn messages_end_at_the_terminating_zero() {
        let refuse = |message: *mut c_char, size: usize| {
            let text = b"why\0";
            assert!(size > text.len());
            // SAFETY: `message` points to `size` bytes.
            unsafe {
                std::ptr::copy_nonoverlapping(text.as_ptr(), message.cast(), text.len());
            }
            1
        };
        assert_eq!(check_call("try", refuse).unwrap_err().to_string(), "try: why");
        check_call("try", |_, _| 0).unwrap();
    }
}
