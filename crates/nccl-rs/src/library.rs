//! Finds and loads the library, checks its version and resolves its functions.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use crate::{NcclError, Result, Version};

/// The oldest supported version: the first with non-blocking communicators (`ncclCommInitRankConfig`).
pub const MIN_VERSION: Version = Version(21400);

const LIBRARY_NAME: &str = "libnccl.so.2";

/// Opens the library only if it is loaded already (`dlfcn.h` of Linux).
const RTLD_NOLOAD: c_int = 4;

pub(crate) const SUCCESS: c_int = 0;
pub(crate) const IN_PROGRESS: c_int = 7;

/// Identifies one communicator; one rank creates it and passes it to all others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct UniqueId(pub [u8; 128]);

/// The fields that `ncclConfig_t` had in version 2.14; newer libraries use defaults for the fields beyond `size`.
#[repr(C)]
pub(crate) struct Config {
    pub(crate) size: usize,
    pub(crate) magic: u32,
    pub(crate) version: u32,
    pub(crate) blocking: c_int,
}

pub(crate) type Comm = *mut c_void;
type ReduceFn = unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, *mut c_void) -> c_int;
type PointToPointFn = unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Comm, *mut c_void) -> c_int;
type CommFn = unsafe extern "C" fn(Comm) -> c_int;

/// The functions of `nccl.h` that this crate calls.
#[derive(Debug)]
pub(crate) struct Functions {
    pub(crate) get_version: unsafe extern "C" fn(*mut c_int) -> c_int,
    pub(crate) get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    pub(crate) init: unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int, *mut Config) -> c_int,
    pub(crate) finalize: CommFn,
    pub(crate) destroy: CommFn,
    pub(crate) abort: CommFn,
    pub(crate) async_error: unsafe extern "C" fn(Comm, *mut c_int) -> c_int,
    pub(crate) error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    pub(crate) last_error: unsafe extern "C" fn(Comm) -> *const c_char,
    pub(crate) all_reduce: ReduceFn,
    pub(crate) reduce_scatter: ReduceFn,
    pub(crate) all_gather: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Comm, *mut c_void) -> c_int,
    pub(crate) broadcast: ReduceFn,
    pub(crate) send: PointToPointFn,
    pub(crate) recv: PointToPointFn,
    pub(crate) group_start: unsafe extern "C" fn() -> c_int,
    pub(crate) group_end: unsafe extern "C" fn() -> c_int,
}

/// The loaded library, which stays loaded until the process ends.
#[derive(Clone, Debug)]
pub struct Nccl {
    pub(crate) functions: Arc<Functions>,
    version: Version,
    path: Arc<str>,
}

impl Nccl {
    /// Loads the library: the copy that is loaded already (libtorch's), else the system's, else the one installed next to a loaded
    /// libtorch, else the first one in `search_dirs`.
    ///
    /// # Errors
    /// Returns [`NcclError::NotFound`] if there is no library in any of these places, [`NcclError::Version`] if it is too old, and
    /// [`NcclError::Unusable`] if it lacks a function.
    pub fn load(search_dirs: &[&Path]) -> Result<Self> {
        let mut tried = Vec::new();
        // SAFETY: NCCL may be loaded at any time; this first call loads nothing.
        match unsafe { Library::open(Some(LIBRARY_NAME), RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD) } {
            Ok(library) => return Self::from_library(library, LIBRARY_NAME),
            Err(_) => tried.push("no copy is loaded".to_owned()),
        }
        let next_to_libtorch = next_to_libtorch().into_iter();
        let files = std::iter::once(PathBuf::from(LIBRARY_NAME))
            .chain(next_to_libtorch)
            .chain(search_dirs.iter().map(|p| p.join(LIBRARY_NAME)));
        for file in files {
            // SAFETY: see above.
            match unsafe { Library::open(Some(&file), RTLD_NOW | RTLD_LOCAL) } {
                Ok(library) => return Self::from_library(library, &file.display().to_string()),
                Err(e) => tried.push(loader_message(&e)),
            }
        }
        Err(NcclError::NotFound { tried })
    }

    /// Loads the given file.
    ///
    /// # Errors
    /// See [`Nccl::load`].
    pub fn open(file: &Path) -> Result<Self> {
        // SAFETY: the caller names an NCCL library, which may be loaded at any time.
        let library = unsafe { Library::open(Some(file), RTLD_NOW | RTLD_LOCAL) };
        let library = library.map_err(|e| NcclError::NotFound { tried: vec![loader_message(&e)] })?;
        Self::from_library(library, &file.display().to_string())
    }

    fn from_library(library: Library, path: &str) -> Result<Self> {
        let functions = functions(&library);
        std::mem::forget(library);
        let functions = functions.map_err(|reason| NcclError::Unusable { path: path.into(), reason })?;
        let version = version(&functions)?;
        if version < MIN_VERSION || version.0 >= 30_000 {
            return Err(NcclError::Version { path: path.into(), found: version, needed: MIN_VERSION });
        }
        Ok(Self { functions: Arc::new(functions), version, path: path.into() })
    }

    /// Returns the library's version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Returns the name or the file from which the library was loaded.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Creates the id of a new communicator. The calling process listens for the other ranks, so it should be one of the ranks.
    ///
    /// # Errors
    /// Returns [`NcclError::Failed`] if NCCL finds no network interface.
    pub fn unique_id(&self) -> Result<UniqueId> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: the out-pointer is valid during the call.
        let code = unsafe { (self.functions.get_unique_id)(&mut id) };
        if code == SUCCESS {
            Ok(id)
        } else {
            Err(self.functions.call_error("ncclGetUniqueId", code, std::ptr::null_mut()))
        }
    }
}

impl Functions {
    /// Builds the error of a failed call, with NCCL's text for the code; `comm` may be null.
    pub(crate) fn call_error(&self, call: &'static str, code: c_int, comm: Comm) -> NcclError {
        // SAFETY: both functions return a text owned by NCCL, or null; a null communicator is allowed.
        let (text, last) = unsafe { (text_at((self.error_string)(code)), text_at((self.last_error)(comm))) };
        let detail = if last.is_empty() { last } else { format!(": {}", last.trim_end()) };
        NcclError::Failed { call, code, text, detail }
    }
}

/// # Safety
/// `text` is null or a NUL-terminated string.
unsafe fn text_at(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: guaranteed by the caller.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

fn version(functions: &Functions) -> Result<Version> {
    let mut code = 0;
    // SAFETY: the out-pointer is valid during the call.
    match unsafe { (functions.get_version)(&mut code) } {
        SUCCESS => Ok(Version(code)),
        other => Err(functions.call_error("ncclGetVersion", other, std::ptr::null_mut())),
    }
}

/// Returns the system's message about a library or function that it cannot load; the error itself names neither.
fn loader_message(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

fn functions(library: &Library) -> Result<Functions, String> {
    /// # Safety
    /// `F` is the function's type.
    unsafe fn get<F: Copy>(library: &Library, name: &str) -> Result<F, String> {
        // SAFETY: guaranteed by the caller.
        unsafe { library.get::<F>(name.as_bytes()) }.map(|f| *f).map_err(|e| loader_message(&e))
    }
    // SAFETY: the types match those in nccl.h.
    unsafe {
        Ok(Functions {
            get_version: get(library, "ncclGetVersion")?,
            get_unique_id: get(library, "ncclGetUniqueId")?,
            init: get(library, "ncclCommInitRankConfig")?,
            finalize: get(library, "ncclCommFinalize")?,
            destroy: get(library, "ncclCommDestroy")?,
            abort: get(library, "ncclCommAbort")?,
            async_error: get(library, "ncclCommGetAsyncError")?,
            error_string: get(library, "ncclGetErrorString")?,
            last_error: get(library, "ncclGetLastError")?,
            all_reduce: get(library, "ncclAllReduce")?,
            reduce_scatter: get(library, "ncclReduceScatter")?,
            all_gather: get(library, "ncclAllGather")?,
            broadcast: get(library, "ncclBroadcast")?,
            send: get(library, "ncclSend")?,
            recv: get(library, "ncclRecv")?,
            group_start: get(library, "ncclGroupStart")?,
            group_end: get(library, "ncclGroupEnd")?,
        })
    }
}

/// Returns the path of the NCCL that torch's Python package depends on: with `…/site-packages/torch/lib/libc10.so` mapped into this
/// process, NCCL is in `…/site-packages/nvidia/nccl/lib`.
fn next_to_libtorch() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let line = maps.lines().find(|l| l.ends_with("/libc10.so"))?;
    let file = Path::new(&line[line.find('/')?..]);
    Some(file.ancestors().nth(3)?.join("nvidia/nccl/lib").join(LIBRARY_NAME))
}
