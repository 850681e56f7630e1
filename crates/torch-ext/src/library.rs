//! The C++ parts: libraries that this crate carries, loaded from memory at first use and kept for the life of the process.

use std::ffi::{c_char, c_int};
use std::io::Write;
use std::os::fd::AsRawFd;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::{ExtError, Result};

/// A loaded part; it is kept in a static and so never unloaded.
pub(crate) struct Part {
    library: Library,
    /// Held open: the loader knows libraries by path, and another part with the same descriptor would be taken for this one.
    _file: std::fs::File,
}

impl Part {
    /// Loads a library from its bytes; libraries of libtorch that it needs must be loaded before. The error is a text, which
    /// says `missing` where the part was left out of the build.
    #[allow(unsafe_code)]
    pub(crate) fn load(name: &str, bytes: &[u8], missing: &str) -> Result<Self, String> {
        if bytes.is_empty() {
            return Err(format!("it was left out of this build: {missing}"));
        }
        let text = |e: &dyn std::error::Error| e.to_string();
        let file = memfd_create(name, MFdFlags::MFD_CLOEXEC).map_err(|e| text(&e))?;
        let mut file = std::fs::File::from(file);
        file.write_all(bytes).map_err(|e| text(&e))?;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        // SAFETY: the library is this crate's own and has no initialisers beyond those of libtorch.
        let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }.map_err(|e| text(&e))?;
        Ok(Self { library, _file: file })
    }

    /// A function of the part.
    ///
    /// # Safety
    /// `F` is the function's type.
    #[allow(unsafe_code)]
    pub(crate) unsafe fn get<F: Copy>(&'static self, name: &[u8]) -> Result<F, String> {
        // SAFETY: by the caller.
        unsafe { self.library.get::<F>(name) }.map(|f| *f).map_err(|e| e.to_string())
    }
}

/// Runs one call that returns 0, or 1 with a message.
pub(crate) fn checked(what: &'static str, call: impl FnOnce(*mut c_char, usize) -> c_int) -> Result<()> {
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
    fn a_part_that_was_left_out_says_what_is_missing() {
        let error = Part::load("unveil_none", b"", "install libnone-dev").err().unwrap();
        assert_eq!(error, "it was left out of this build: install libnone-dev");
        assert!(Part::load("unveil_none", b"no library", "").is_err());
    }

    #[test]
    fn messages_end_where_they_end() {
        let refuse = |message: *mut c_char, size: usize| {
            let text = b"why\0";
            assert!(size > text.len());
            // SAFETY: the place has `size` bytes.
            #[allow(unsafe_code)]
            unsafe {
                std::ptr::copy_nonoverlapping(text.as_ptr(), message.cast(), text.len());
            }
            1
        };
        assert_eq!(checked("try", refuse).unwrap_err().to_string(), "try: why");
        checked("try", |_, _| 0).unwrap();
    }
}
