//! The library: where it is found, its version, its functions.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use crate::{NcclError, Result, Version};

/// The oldest version that can be used: the first with communicators that do not block (`ncclCommInitRankConfig`).
pub const NEEDED: Version = Version(21400);

const NAME: &str = "libnccl.so.2";

/// Only what is loaded already (`dlfcn.h` of Linux).
const RTLD_NOLOAD: c_int = 4;

pub(crate) const SUCCESS: c_int = 0;
pub(crate) const IN_PROGRESS: c_int = 7;

/// Names one communicator; made by one rank and handed to all others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct UniqueId(pub [u8; 128]);

/// The beginning of `ncclConfig_t`, as it was in version 2.14: newer libraries fill in what this size leaves out.
#[repr(C)]
pub(crate) struct Config {
    pub(crate) size: usize,
    pub(crate) magic: u32,
    pub(crate) version: u32,
    pub(crate) blocking: c_int,
}

pub(crate) type Comm = *mut c_void;
type Reduce = unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, *mut c_void) -> c_int;
type Exchange = unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Comm, *mut c_void) -> c_int;
type Plain = unsafe extern "C" fn(Comm) -> c_int;

/// Functions of `nccl.h`.
pub(crate) struct Functions {
    pub(crate) get_version: unsafe extern "C" fn(*mut c_int) -> c_int,
    pub(crate) get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    pub(crate) init: unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int, *mut Config) -> c_int,
    pub(crate) finalize: Plain,
    pub(crate) destroy: Plain,
    pub(crate) abort: Plain,
    pub(crate) async_error: unsafe extern "C" fn(Comm, *mut c_int) -> c_int,
    pub(crate) error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    pub(crate) last_error: unsafe extern "C" fn(Comm) -> *const c_char,
    pub(crate) all_reduce: Reduce,
    pub(crate) reduce_scatter: Reduce,
    pub(crate) all_gather: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Comm, *mut c_void) -> c_int,
    pub(crate) broadcast: Reduce,
    pub(crate) send: Exchange,
    pub(crate) recv: Exchange,
    pub(crate) group_start: unsafe extern "C" fn() -> c_int,
    pub(crate) group_end: unsafe extern "C" fn() -> c_int,
}

/// The loaded library; it stays loaded for the life of the process.
#[derive(Clone)]
pub struct Nccl {
    pub(crate) functions: Arc<Functions>,
    version: Version,
    path: Arc<str>,
}

impl Nccl {
    /// Finds the library: the copy that is loaded already (libtorch's), then the system's, then the one beside libtorch, where the
    /// process has libtorch, then in `places` (directories).
    ///
    /// # Errors
    /// It is nowhere, too old, or lacks a function.
    #[allow(unsafe_code)]
    pub fn load(places: &[&Path]) -> Result<Self> {
        let mut tried = Vec::new();
        // SAFETY: NCCL may be loaded at any time; nothing is loaded by the first of these.
        match unsafe { Library::open(Some(NAME), RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD) } {
            Ok(library) => return Self::of(library, NAME),
            Err(_) => tried.push("no copy is loaded".to_owned()),
        }
        let beside = beside_libtorch().into_iter();
        let files = std::iter::once(PathBuf::from(NAME)).chain(beside.chain(places.iter().map(|p| p.join(NAME))));
        for file in files {
            // SAFETY: as above.
            match unsafe { Library::open(Some(&file), RTLD_NOW | RTLD_LOCAL) } {
                Ok(library) => return Self::of(library, &file.display().to_string()),
                Err(e) => tried.push(e.to_string()),
            }
        }
        Err(NcclError::NotFound { tried })
    }

    /// Loads a certain file.
    ///
    /// # Errors
    /// As [`Nccl::load`].
    #[allow(unsafe_code)]
    pub fn open(file: &Path) -> Result<Self> {
        // SAFETY: the caller names an NCCL library, which may be loaded at any time.
        let library = unsafe { Library::open(Some(file), RTLD_NOW | RTLD_LOCAL) };
        let library = library.map_err(|e| NcclError::NotFound { tried: vec![e.to_string()] })?;
        Self::of(library, &file.display().to_string())
    }

    fn of(library: Library, path: &str) -> Result<Self> {
        let functions = functions(&library);
        std::mem::forget(library);
        let functions = functions.map_err(|reason| NcclError::Unusable { path: path.into(), reason })?;
        let version = version(&functions)?;
        if version < NEEDED || version.0 >= 30_000 {
            return Err(NcclError::Version { path: path.into(), found: version, needed: NEEDED });
        }
        Ok(Self { functions: Arc::new(functions), version, path: path.into() })
    }

    /// The library's version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The name or file by which the library was found.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// A new name for a communicator. The process that makes it listens for the others, so it should be one of the ranks.
    ///
    /// # Errors
    /// NCCL finds no network interface.
    #[allow(unsafe_code)]
    pub fn unique_id(&self) -> Result<UniqueId> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: the place is valid during the call.
        let code = unsafe { (self.functions.get_unique_id)(&mut id) };
        if code == SUCCESS {
            Ok(id)
        } else {
            Err(self.functions.refused("ncclGetUniqueId", code, std::ptr::null_mut()))
        }
    }
}

impl Functions {
    /// NCCL's words for a code; `comm` may be null.
    #[allow(unsafe_code)]
    pub(crate) fn refused(&self, call: &'static str, code: c_int, comm: Comm) -> NcclError {
        // SAFETY: both functions give texts that NCCL keeps, or null; a null communicator is allowed.
        let (text, last) = unsafe { (words((self.error_string)(code)), words((self.last_error)(comm))) };
        let detail = if last.is_empty() { last } else { format!(": {}", last.trim_end()) };
        NcclError::Refused { call, code, text, detail }
    }
}

/// # Safety
/// `text` is null or a text that ends with 0.
#[allow(unsafe_code)]
unsafe fn words(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: by the caller.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

#[allow(unsafe_code)]
fn version(functions: &Functions) -> Result<Version> {
    let mut code = 0;
    // SAFETY: the place is valid during the call.
    match unsafe { (functions.get_version)(&mut code) } {
        SUCCESS => Ok(Version(code)),
        other => Err(functions.refused("ncclGetVersion", other, std::ptr::null_mut())),
    }
}

#[allow(unsafe_code)]
fn functions(library: &Library) -> Result<Functions, String> {
    /// # Safety
    /// `F` is the function's type.
    unsafe fn get<F: Copy>(library: &Library, name: &str) -> Result<F, String> {
        // SAFETY: by the caller.
        unsafe { library.get::<F>(name.as_bytes()) }.map(|f| *f).map_err(|e| e.to_string())
    }
    // SAFETY: the types are those of nccl.h.
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

/// Where torch's package has NCCL: `…/site-packages/torch/lib/libc10.so` is mapped, `…/site-packages/nvidia/nccl/lib` has it.
fn beside_libtorch() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let line = maps.lines().find(|l| l.ends_with("/libc10.so"))?;
    let file = Path::new(&line[line.find('/')?..]);
    Some(file.ancestors().nth(3)?.join("nvidia/nccl/lib").join(NAME))
}
