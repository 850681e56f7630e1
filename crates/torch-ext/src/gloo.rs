//! libtorch's Gloo: collective calls among ranks on CPUs. Each call starts at once and is waited for through a handle.
//!
//! Tensors are flat, contiguous and on the CPU. fp32, fp64 and int64 are summed as they are. bf16 is summed in fp32 and rounded
//! once at the end, since Gloo's own sum of 16-bit numbers rounds after every rank. Data that is only moved is moved as bytes.
//! Reduce-scatter is an exchange of parts followed by a sum in the order of ranks on the caller's thread: libtorch's own reduces
//! everything everywhere.

use std::ffi::{c_char, c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::{Duration, Instant};

use tch::{Kind, Tensor};

use crate::library::{Part, checked};
use crate::store::{Store, text};
use crate::{ExtError, Result};

/// cpp/gloo.cc; libtorch is there, since tch links it.
fn part() -> Result<&'static Part, String> {
    static LOADED: OnceLock<Result<Part, String>> = OnceLock::new();
    let bytes = include_bytes!(concat!(env!("OUT_DIR"), "/libunveil_gloo.so"));
    let missing = "Gloo's headers were not there; install them (apt-get install libgloo-dev) and build again";
    LOADED.get_or_init(|| Part::load("unveil_gloo", bytes, missing)).as_ref().map_err(Clone::clone)
}

type Place = *mut *mut c_void;
type Move = unsafe extern "C" fn(*mut c_void, *const c_void, *const c_void, i64, Place, *mut c_char, usize) -> c_int;
type New = unsafe extern "C" fn(
    *mut c_void,
    *const c_char,
    c_int,
    c_int,
    *const c_char,
    c_int,
    i64,
    Place,
    *mut c_char,
    usize,
) -> c_int;

/// The group's functions of cpp/gloo.cc.
struct Functions {
    new: New,
    free: unsafe extern "C" fn(*mut c_void),
    all_reduce: unsafe extern "C" fn(*mut c_void, *const c_void, i64, Place, *mut c_char, usize) -> c_int,
    broadcast: unsafe extern "C" fn(*mut c_void, *const c_void, c_int, i64, Place, *mut c_char, usize) -> c_int,
    all_gather: Move,
    all_to_all: Move,
    barrier: unsafe extern "C" fn(*mut c_void, i64, Place, *mut c_char, usize) -> c_int,
    wait: unsafe extern "C" fn(*mut c_void, i64, *mut c_int, *mut c_char, usize) -> c_int,
    free_work: unsafe extern "C" fn(*mut c_void),
}

fn functions() -> Result<&'static Functions> {
    static LOADED: OnceLock<Result<Functions, String>> = OnceLock::new();
    let loaded = LOADED.get_or_init(load).as_ref();
    loaded.map_err(|e| ExtError::Unavailable { part: "Gloo", reason: e.clone() })
}

#[allow(unsafe_code)]
fn load() -> Result<Functions, String> {
    let part = part()?;
    // SAFETY: the types are those of cpp/gloo.cc.
    unsafe {
        Ok(Functions {
            new: part.get(b"unveil_gloo_new")?,
            free: part.get(b"unveil_gloo_free")?,
            all_reduce: part.get(b"unveil_gloo_all_reduce")?,
            broadcast: part.get(b"unveil_gloo_broadcast")?,
            all_gather: part.get(b"unveil_gloo_all_gather")?,
            all_to_all: part.get(b"unveil_gloo_all_to_all")?,
            barrier: part.get(b"unveil_gloo_barrier")?,
            wait: part.get(b"unveil_work_wait")?,
            free_work: part.get(b"unveil_work_free")?,
        })
    }
}

/// A libtorch group; freed with it, which waits for calls that have not ended.
struct Handle(*mut c_void, &'static Functions);

// SAFETY: libtorch's group takes calls from any thread, one at a time; `GlooGroup` is not Sync.
#[allow(unsafe_code)]
unsafe impl Send for Handle {}

impl Drop for Handle {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: the handle came from `new` and is not used again.
        unsafe { (self.1.free)(self.0) }
    }
}

/// A group of ranks that are connected with each other. All ranks make the same calls in the same order.
pub struct GlooGroup {
    handle: Option<Handle>,
    ranks: usize,
    limit: Duration,
    calls: Arc<AtomicBool>,
}

impl GlooGroup {
    /// Whether this build has Gloo.
    ///
    /// # Errors
    /// It has not; the message says what to install.
    pub fn available() -> Result<()> {
        functions().map(drop)
    }

    /// Connects `ranks` ranks, which all call this with the same prefix before the deadline. `local` is the address by which the
    /// others reach this rank. A call of the group that has not ended after `limit` fails. `give_up` is asked again and again
    /// while the ranks connect.
    ///
    /// # Errors
    /// The Gloo part cannot be used, a rank does not come, an address is not this machine's, or it was given up.
    #[allow(unsafe_code)]
    pub fn connect(
        store: &Store,
        prefix: &str,
        (rank, ranks): (usize, usize),
        local: &str,
        limit: Duration,
        deadline: Instant,
        mut give_up: impl FnMut() -> bool,
    ) -> Result<Self> {
        const WHAT: &str = "connect a Gloo group";
        let functions = functions()?;
        let refused = |message: String| ExtError::Refused { what: WHAT, message };
        if rank >= ranks || c_int::try_from(ranks).is_err() {
            return Err(refused(format!("rank {rank} is not below {ranks}")));
        }
        let connection = store.connection(deadline)?;
        let (prefix, local) = (text(prefix)?, text(local)?);
        let left = deadline.saturating_duration_since(Instant::now());
        let (ready, made) = mpsc::channel();
        // libtorch may wait without end for a store whose host is stopped: on a thread that can be left behind.
        let work = move || {
            let connection = connection;
            let mut handle = std::ptr::null_mut();
            // SAFETY: all pointers are valid during the call; libtorch keeps its own reference to the connection.
            let result = checked(WHAT, |m, n| unsafe {
                let (p, l, ms) = (prefix.as_ptr(), local.as_ptr(), millis(left));
                (functions.new)(connection.handle, p, rank as c_int, ranks as c_int, l, THREADS, ms, &mut handle, m, n)
            });
            let _gone = ready.send(result.map(|()| Handle(handle, functions)));
        };
        let spawned = std::thread::Builder::new().name("gloo-connect".into()).spawn(work);
        spawned.map_err(|e| refused(e.to_string()))?;
        // libtorch's own message, which comes at the deadline, is the better one.
        let last = deadline + Duration::from_millis(500);
        let handle = loop {
            match made.recv_timeout(Duration::from_millis(50)) {
                Ok(result) => break result?,
                Err(_) if give_up() => return Err(refused("given up".into())),
                Err(_) if Instant::now() < last => {}
                Err(_) => {
                    let seconds = left.as_secs_f64();
                    return Err(refused(format!("the other ranks did not answer within {seconds:.1} s")));
                }
            }
        };
        Ok(Self { handle: Some(handle), ranks, limit, calls: Arc::default() })
    }

    /// Sums a tensor over all ranks, in place.
    ///
    /// # Errors
    /// The tensor is not flat, contiguous and on the CPU, or of another kind; or the group is broken.
    #[allow(unsafe_code)]
    pub fn all_reduce(&self, tensor: &Tensor) -> Result<GlooWork> {
        let kind = flat(tensor)?;
        let (summed, end) = if kind == Kind::BFloat16 {
            let wide = made(tensor.f_detach().and_then(|t| t.f_to_kind(Kind::Float)))?;
            (wide.shallow_clone(), End::Copy { from: wide, to: tensor.shallow_clone() })
        } else {
            (tensor.shallow_clone(), End::Give(tensor.shallow_clone()))
        };
        self.start("all_reduce", end, |f, g, ms, out, m, n| unsafe {
            (f.all_reduce)(g, summed.as_ptr().cast(), ms, out, m, n)
        })
    }

    /// Sums over all ranks and gives rank r part r of the sum, a new tensor.
    ///
    /// # Errors
    /// As [`GlooGroup::all_reduce`]; also when the number of elements does not divide by that of ranks.
    #[allow(unsafe_code)]
    pub fn reduce_scatter(&self, tensor: &Tensor) -> Result<GlooWork> {
        let kind = flat(tensor)?;
        let (count, ranks) = (tensor.numel(), self.ranks);
        if count % ranks != 0 {
            let message = format!("{count} elements do not divide over {ranks} ranks");
            return Err(ExtError::Refused { what: "reduce_scatter", message });
        }
        let from = bytes(tensor)?;
        let to = made(from.f_empty_like())?;
        let parts = made(to.f_view_dtype(kind).and_then(|t| t.f_view([ranks as i64, (count / ranks) as i64])))?;
        self.start("reduce_scatter", End::Sum(parts), |f, g, ms, out, m, n| unsafe {
            (f.all_to_all)(g, to.as_ptr().cast(), from.as_ptr().cast(), ms, out, m, n)
        })
    }

    /// Puts the tensors of all ranks one after another, in a new tensor.
    ///
    /// # Errors
    /// As [`GlooGroup::all_reduce`].
    #[allow(unsafe_code)]
    pub fn all_gather(&self, tensor: &Tensor) -> Result<GlooWork> {
        let kind = flat(tensor)?;
        let from = bytes(tensor)?;
        let to = made(Tensor::f_empty([from.numel() as i64 * self.ranks as i64], (Kind::Uint8, tch::Device::Cpu)))?;
        let all = made(to.f_view_dtype(kind))?;
        self.start("all_gather", End::Give(all), |f, g, ms, out, m, n| unsafe {
            (f.all_gather)(g, to.as_ptr().cast(), from.as_ptr().cast(), ms, out, m, n)
        })
    }

    /// Copies the tensor of rank `root` to all, in place.
    ///
    /// # Errors
    /// As [`GlooGroup::all_reduce`]; also when there is no such rank.
    #[allow(unsafe_code)]
    pub fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<GlooWork> {
        flat(tensor)?;
        if root >= self.ranks {
            let message = format!("rank {root} is not below {}", self.ranks);
            return Err(ExtError::Refused { what: "broadcast", message });
        }
        let moved = bytes(tensor)?;
        self.start("broadcast", End::Give(tensor.shallow_clone()), |f, g, ms, out, m, n| unsafe {
            (f.broadcast)(g, moved.as_ptr().cast(), root as c_int, ms, out, m, n)
        })
    }

    /// Ends when every rank has come to it and all calls before it have ended.
    ///
    /// # Errors
    /// The group is broken.
    #[allow(unsafe_code)]
    pub fn barrier(&self) -> Result<GlooWork> {
        self.start("barrier", End::Nothing, |f, g, ms, out, m, n| unsafe { (f.barrier)(g, ms, out, m, n) })
    }

    /// The tensors that `call` uses are alive during it; libtorch keeps references of its own while the work runs.
    fn start(
        &self,
        what: &'static str,
        end: End,
        call: impl FnOnce(&Functions, *mut c_void, i64, Place, *mut c_char, usize) -> c_int,
    ) -> Result<GlooWork> {
        let gone = || ExtError::Refused { what, message: "the group is closed".into() };
        let Handle(group, functions) = self.handle.as_ref().ok_or_else(gone)?;
        let mut handle = std::ptr::null_mut();
        checked(what, |m, n| call(functions, *group, millis(self.limit), &mut handle, m, n))?;
        Ok(GlooWork { handle, functions, what, end, ended: false, calls: self.calls.clone() })
    }
}

impl Drop for GlooGroup {
    /// Freeing waits for calls in flight, which end at their limit at the latest: where there are some, on another thread.
    fn drop(&mut self) {
        if Arc::strong_count(&self.calls) > 1 || self.calls.load(Ordering::Acquire) {
            let handle = self.handle.take();
            let _detached = std::thread::Builder::new().name("gloo-close".into()).spawn(move || drop(handle));
        }
    }
}

/// Gloo's threads per group: with two, a large call does not hold up a small one.
const THREADS: c_int = 2;

fn millis(limit: Duration) -> i64 {
    i64::try_from(limit.as_millis()).unwrap_or(i64::MAX).max(1)
}

/// The kind of a tensor that Gloo can take.
fn flat(tensor: &Tensor) -> Result<Kind> {
    let kind = tensor.kind();
    let known = matches!(kind, Kind::Float | Kind::Double | Kind::BFloat16 | Kind::Int64);
    if known && tensor.dim() == 1 && tensor.is_contiguous() && tensor.device() == tch::Device::Cpu {
        return Ok(kind);
    }
    let (shape, device) = (tensor.size(), tensor.device());
    let message = format!(
        "a flat contiguous CPU tensor of Float, Double, BFloat16 or Int64 is needed, this is {kind:?} {shape:?} on {device:?}"
    );
    Err(ExtError::Refused { what: "give a tensor to Gloo", message })
}

/// The same memory as bytes.
fn bytes(tensor: &Tensor) -> Result<Tensor> {
    made(tensor.f_detach().and_then(|t| t.f_view_dtype(Kind::Uint8)))
}

fn made<T>(result: Result<T, tch::TchError>) -> Result<T> {
    result.map_err(|e| ExtError::Refused { what: "prepare a tensor for Gloo", message: e.to_string() })
}

/// What is left to do when the data has come.
enum End {
    Nothing,
    Give(Tensor),
    Copy {
        from: Tensor,
        to: Tensor,
    },
    /// One row per rank, to be summed in order.
    Sum(Tensor),
}

/// A call in flight. Dropping it does not stop the call; its result is lost.
pub struct GlooWork {
    handle: *mut c_void,
    functions: &'static Functions,
    what: &'static str,
    end: End,
    ended: bool,
    /// Shared with the group; true when a call was given up before it ended.
    calls: Arc<AtomicBool>,
}

// SAFETY: libtorch's work may be waited for and freed on any thread.
#[allow(unsafe_code)]
unsafe impl Send for GlooWork {}

impl GlooWork {
    /// Waits up to `limit` for the call to end; says whether it has.
    ///
    /// # Errors
    /// The call failed: what libtorch says.
    #[allow(unsafe_code)]
    pub fn wait(&mut self, limit: Duration) -> Result<bool> {
        if !self.ended {
            let mut ended = 0;
            // SAFETY: the handle is valid until Drop.
            checked(self.what, |m, n| unsafe {
                (self.functions.wait)(self.handle, limit.as_millis() as i64, &mut ended, m, n)
            })?;
            self.ended = ended != 0;
        }
        Ok(self.ended)
    }

    /// The result of a call that has ended: none for a barrier.
    ///
    /// # Errors
    /// It has not ended, or the memory for the result is missing.
    pub fn take(mut self) -> Result<Option<Tensor>> {
        if !self.ended {
            return Err(ExtError::Refused { what: self.what, message: "the call has not ended".into() });
        }
        let end = std::mem::replace(&mut self.end, End::Nothing);
        tch::no_grad(|| match end {
            End::Nothing => Ok(None),
            End::Give(tensor) => Ok(Some(tensor)),
            End::Copy { from, mut to } => {
                made(to.f_copy_(&from))?;
                Ok(Some(to))
            }
            End::Sum(parts) => Ok(Some(made(sum(&parts))?)),
        })
    }
}

/// Sum of the rows in their order; bf16 in fp32, rounded once.
fn sum(parts: &Tensor) -> Result<Tensor, tch::TchError> {
    let kind = parts.kind();
    let wide = if kind == Kind::BFloat16 { Kind::Float } else { kind };
    let mut out = parts.f_get(0)?.f_to_dtype(wide, false, true)?;
    for row in 1..parts.size()[0] {
        out = out.f_add_(&parts.f_get(row)?)?;
    }
    out.f_to_kind(kind)
}

impl Drop for GlooWork {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        if !self.ended {
            self.calls.store(true, Ordering::Release);
        }
        // SAFETY: the handle came from `start` and is not used again.
        unsafe { (self.functions.free_work)(self.handle) }
    }
}
