//! Collectives among ranks on CPUs by libtorch's Gloo. Each call starts immediately and returns a handle to wait on.
//!
//! Tensors are flat, contiguous and on the CPU. fp32, fp64 and int64 are summed in their own dtype; bf16 is summed in fp32 and rounded
//! once at the end, because Gloo's sum of 16-bit numbers rounds after every rank. Data that is only moved is moved as bytes.
//! Reduce-scatter is an all-to-all followed by a sum in rank order on the caller's thread, because libtorch's own reduces everything
//! on every rank.

use std::ffi::{c_char, c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use tch::{Kind, Tensor};

use crate::library::{NativeLibrary, check_call, function_table, native_library};
use crate::store::{Store, c_string};
use crate::{ExtError, Result};

/// cpp/gloo.cc. libtorch itself is loaded already, since tch links it.
fn library() -> Result<&'static NativeLibrary, String> {
    native_library!("gloo", "Gloo's headers were not found; install them (apt-get install libgloo-dev) and build again")
}

/// Where a call writes the handle of the new object.
type OutHandle = *mut *mut c_void;
type Exchange =
    unsafe extern "C" fn(*mut c_void, *const c_void, *const c_void, i64, OutHandle, *mut c_char, usize) -> c_int;
type NewGroup = unsafe extern "C" fn(
    *mut c_void,
    *const c_char,
    c_int,
    c_int,
    *const c_char,
    c_int,
    i64,
    OutHandle,
    *mut c_char,
    usize,
) -> c_int;

// cpp/gloo.cc
function_table! {
    "Gloo", library();
    new: NewGroup = b"unveil_gloo_new",
    free: unsafe extern "C" fn(*mut c_void) = b"unveil_gloo_free",
    all_reduce: unsafe extern "C" fn(*mut c_void, *const c_void, i64, OutHandle, *mut c_char, usize) -> c_int = b"unveil_gloo_all_reduce",
    broadcast: unsafe extern "C" fn(*mut c_void, *const c_void, c_int, i64, OutHandle, *mut c_char, usize) -> c_int = b"unveil_gloo_broadcast",
    all_gather: Exchange = b"unveil_gloo_all_gather",
    all_to_all: Exchange = b"unveil_gloo_all_to_all",
    barrier: unsafe extern "C" fn(*mut c_void, i64, OutHandle, *mut c_char, usize) -> c_int = b"unveil_gloo_barrier",
    wait: unsafe extern "C" fn(*mut c_void, i64, *mut c_int, *mut c_char, usize) -> c_int = b"unveil_work_wait",
    free_work: unsafe extern "C" fn(*mut c_void) = b"unveil_work_free",
}

/// A libtorch process group. Dropping it waits for pending calls.
#[derive(Debug)]
struct Handle(*mut c_void, &'static Functions);

// SAFETY: libtorch's group accepts calls from any thread, one at a time; `GlooGroup` is not Sync.
unsafe impl Send for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: the handle came from `new` and is not used again.
        unsafe { (self.1.free)(self.0) }
    }
}

/// A group of connected ranks. All ranks must make the same calls in the same order.
#[derive(Debug)]
pub struct GlooGroup {
    handle: Option<Handle>,
    ranks: usize,
    timeout: Duration,
    /// Shared with every call; true once a call was dropped before it ended.
    abandoned: Arc<AtomicBool>,
}

impl GlooGroup {
    /// Checks that this build has Gloo.
    ///
    /// # Errors
    /// Returns [`ExtError::Unavailable`] if it does not; the message says what to install.
    pub fn available() -> Result<()> {
        functions().map(drop)
    }

    /// Connects `ranks` ranks, which must all call this with the same prefix before the deadline. `local` is the address at which the
    /// others reach this rank. A call of the group that has not ended after `timeout` fails. `cancelled` is polled while the ranks
    /// connect.
    ///
    /// # Errors
    /// Returns [`ExtError::Unavailable`] if Gloo cannot be loaded, [`ExtError::Timeout`] if the store does not answer, and
    /// [`ExtError::Refused`] if a rank does not connect in time, if `local` is not an address of this machine, or if `cancelled`
    /// returned true.
    pub fn connect(
        store: &Store,
        prefix: &str,
        (rank, ranks): (usize, usize),
        local: &str,
        timeout: Duration,
        deadline: Instant,
        mut cancelled: impl FnMut() -> bool,
    ) -> Result<Self> {
        const WHAT: &str = "connect a Gloo group";
        let functions = functions()?;
        let refused = |message: String| ExtError::Refused { what: WHAT, message };
        if rank >= ranks || c_int::try_from(ranks).is_err() {
            return Err(refused(format!("rank {rank} is not below {ranks}")));
        }
        let connection = store.connection(deadline)?;
        let prefix = c_string(prefix)?;
        let local = c_string(local)?;
        let left = deadline.saturating_duration_since(Instant::now());
        let (sender, connected) = mpsc::channel();
        // libtorch may wait indefinitely for a store whose host is stopped, so it connects on a thread that can be left behind.
        let work = move || {
            let connection = connection;
            let mut handle = std::ptr::null_mut();
            // SAFETY: all pointers are valid during the call; libtorch keeps its own reference to the connection.
            let result = check_call(WHAT, |m, n| unsafe {
                let p = prefix.as_ptr();
                let l = local.as_ptr();
                let ms = millis(left);
                (functions.new)(
                    connection.handle,
                    p,
                    rank as c_int,
                    ranks as c_int,
                    l,
                    THREADS_PER_GROUP,
                    ms,
                    &mut handle,
                    m,
                    n,
                )
            });
            let _receiver_gone = sender.send(result.map(|()| Handle(handle, functions)));
        };
        let spawned = std::thread::Builder::new().name("gloo-connect".into()).spawn(work);
        spawned.map_err(|e| refused(e.to_string()))?;
        // libtorch's own message, which comes at the deadline, is more precise: wait for it a little longer.
        let last = deadline + Duration::from_millis(500);
        let handle = loop {
            match connected.recv_timeout(Duration::from_millis(50)) {
                Ok(result) => break result?,
                Err(_) if cancelled() => return Err(refused("cancelled".into())),
                Err(_) if Instant::now() < last => {}
                Err(_) => {
                    let seconds = left.as_secs_f64();
                    return Err(refused(format!("the other ranks did not answer within {seconds:.1} s")));
                }
            }
        };
        Ok(Self { handle: Some(handle), ranks, timeout, abandoned: Arc::default() })
    }

    /// Sums a tensor over all ranks, in place.
    ///
    /// # Errors
    /// Returns [`ExtError::Refused`] if the tensor is not flat, contiguous, on the CPU and of a supported dtype, or if the group is
    /// broken.
    pub fn all_reduce(&self, tensor: &Tensor) -> Result<GlooWork> {
        let kind = check_flat(tensor)?;
        let (summed, completion) = if kind == Kind::BFloat16 {
            let wide = prepared(tensor.f_detach().and_then(|t| t.f_to_kind(Kind::Float)))?;
            (wide.shallow_clone(), Completion::Copy { from: wide, to: tensor.shallow_clone() })
        } else {
            (tensor.shallow_clone(), Completion::Return(tensor.shallow_clone()))
        };
        // SAFETY: the tensor is alive during the call.
        self.start("all_reduce", completion, |f, g, ms, out, m, n| unsafe {
            (f.all_reduce)(g, summed.as_ptr().cast(), ms, out, m, n)
        })
    }

    /// Sums over all ranks and returns part r of the sum to rank r, as a new tensor.
    ///
    /// # Errors
    /// Returns [`ExtError::Refused`] like [`GlooGroup::all_reduce`], and if the number of elements is not a multiple of the number of
    /// ranks.
    pub fn reduce_scatter(&self, tensor: &Tensor) -> Result<GlooWork> {
        let kind = check_flat(tensor)?;
        let count = tensor.numel();
        let ranks = self.ranks;
        if !count.is_multiple_of(ranks) {
            let message = format!("{count} elements do not divide over {ranks} ranks");
            return Err(ExtError::Refused { what: "reduce_scatter", message });
        }
        let from = as_bytes(tensor)?;
        let to = prepared(from.f_empty_like())?;
        let parts = prepared(to.f_view_dtype(kind).and_then(|t| t.f_view([ranks as i64, (count / ranks) as i64])))?;
        // SAFETY: both tensors are alive during the call.
        self.start("reduce_scatter", Completion::Sum(parts), |f, g, ms, out, m, n| unsafe {
            (f.all_to_all)(g, to.as_ptr().cast(), from.as_ptr().cast(), ms, out, m, n)
        })
    }

    /// Concatenates the tensors of all ranks in a new tensor.
    ///
    /// # Errors
    /// Returns [`ExtError::Refused`] like [`GlooGroup::all_reduce`].
    pub fn all_gather(&self, tensor: &Tensor) -> Result<GlooWork> {
        let kind = check_flat(tensor)?;
        let from = as_bytes(tensor)?;
        let to = prepared(Tensor::f_empty([from.numel() as i64 * self.ranks as i64], (Kind::Uint8, tch::Device::Cpu)))?;
        let all = prepared(to.f_view_dtype(kind))?;
        // SAFETY: both tensors are alive during the call.
        self.start("all_gather", Completion::Return(all), |f, g, ms, out, m, n| unsafe {
            (f.all_gather)(g, to.as_ptr().cast(), from.as_ptr().cast(), ms, out, m, n)
        })
    }

    /// Copies the tensor of rank `root` to all ranks, in place.
    ///
    /// # Errors
    /// Returns [`ExtError::Refused`] like [`GlooGroup::all_reduce`], and if there is no such rank.
    pub fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<GlooWork> {
        check_flat(tensor)?;
        if root >= self.ranks {
            let message = format!("rank {root} is not below {}", self.ranks);
            return Err(ExtError::Refused { what: "broadcast", message });
        }
        let moved = as_bytes(tensor)?;
        // SAFETY: the tensor is alive during the call.
        self.start("broadcast", Completion::Return(tensor.shallow_clone()), |f, g, ms, out, m, n| unsafe {
            (f.broadcast)(g, moved.as_ptr().cast(), root as c_int, ms, out, m, n)
        })
    }

    /// Waits for all ranks: ends when every rank has called it and all earlier calls have ended.
    ///
    /// # Errors
    /// Returns [`ExtError::Refused`] if the group is broken.
    pub fn barrier(&self) -> Result<GlooWork> {
        // SAFETY: the call is given no pointer but the group's.
        self.start("barrier", Completion::Nothing, |f, g, ms, out, m, n| unsafe { (f.barrier)(g, ms, out, m, n) })
    }

    /// Starts a collective. The tensors that `call` uses must be alive during it; libtorch keeps its own references while the work
    /// runs.
    fn start(
        &self,
        what: &'static str,
        completion: Completion,
        call: impl FnOnce(&Functions, *mut c_void, i64, OutHandle, *mut c_char, usize) -> c_int,
    ) -> Result<GlooWork> {
        let closed = || ExtError::Refused { what, message: "the group is closed".into() };
        let Handle(group, functions) = self.handle.as_ref().ok_or_else(closed)?;
        let mut handle = std::ptr::null_mut();
        check_call(what, |m, n| call(functions, *group, millis(self.timeout), &mut handle, m, n))?;
        Ok(GlooWork { handle, functions, what, completion, ended: false, abandoned: self.abandoned.clone() })
    }
}

impl Drop for GlooGroup {
    /// Frees the group on another thread if calls are in flight: freeing waits for them, at most until their timeout.
    fn drop(&mut self) {
        if Arc::strong_count(&self.abandoned) > 1 || self.abandoned.load(Ordering::Acquire) {
            let handle = self.handle.take();
            let _detached = std::thread::Builder::new().name("gloo-close".into()).spawn(move || drop(handle));
        }
    }
}

/// Gloo's threads per group: with two, a large call does not hold up a small one.
const THREADS_PER_GROUP: c_int = 2;

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX).max(1)
}

/// Returns the dtype of a tensor that Gloo supports.
fn check_flat(tensor: &Tensor) -> Result<Kind> {
    let kind = tensor.kind();
    let supported = matches!(kind, Kind::Float | Kind::Double | Kind::BFloat16 | Kind::Int64);
    if supported && tensor.dim() == 1 && tensor.is_contiguous() && tensor.device() == tch::Device::Cpu {
        return Ok(kind);
    }
    let shape = tensor.size();
    let device = tensor.device();
    let message = format!(
        "a flat contiguous CPU tensor of Float, Double, BFloat16 or Int64 is needed, this is {kind:?} {shape:?} on {device:?}"
    );
    Err(ExtError::Refused { what: "pass a tensor to Gloo", message })
}

/// Views the memory of a tensor as bytes.
fn as_bytes(tensor: &Tensor) -> Result<Tensor> {
    prepared(tensor.f_detach().and_then(|t| t.f_view_dtype(Kind::Uint8)))
}

fn prepared<T>(result: Result<T, tch::TchError>) -> Result<T> {
    result.map_err(|e| ExtError::Refused { what: "prepare a tensor for Gloo", message: e.to_string() })
}

/// Work that remains after a call has ended.
#[derive(Debug)]
enum Completion {
    Nothing,
    Return(Tensor),
    Copy {
        from: Tensor,
        to: Tensor,
    },
    /// Sum the rows, one per rank, in order.
    Sum(Tensor),
}

/// A pending call. Dropping it does not stop the call, but its result is lost.
#[derive(Debug)]
pub struct GlooWork {
    handle: *mut c_void,
    functions: &'static Functions,
    what: &'static str,
    completion: Completion,
    ended: bool,
    /// Shared with the group.
    abandoned: Arc<AtomicBool>,
}

// SAFETY: libtorch's work may be waited on and freed on any thread.
unsafe impl Send for GlooWork {}

impl GlooWork {
    /// Waits up to `timeout` for the call to end; returns whether it has.
    ///
    /// # Errors
    /// Returns [`ExtError::Refused`] with libtorch's message if the call failed.
    pub fn wait(&mut self, timeout: Duration) -> Result<bool> {
        if !self.ended {
            let mut ended = 0;
            // SAFETY: the handle is valid until Drop.
            check_call(self.what, |m, n| unsafe {
                (self.functions.wait)(self.handle, timeout.as_millis() as i64, &mut ended, m, n)
            })?;
            self.ended = ended != 0;
        }
        Ok(self.ended)
    }

    /// Returns the result of a call that has ended; `None` for a barrier.
    ///
    /// # Errors
    /// Returns [`ExtError::Refused`] if the call has not ended or there is no memory for the result.
    pub fn into_result(mut self) -> Result<Option<Tensor>> {
        if !self.ended {
            return Err(ExtError::Refused { what: self.what, message: "the call has not ended".into() });
        }
        let completion = std::mem::replace(&mut self.completion, Completion::Nothing);
        tch::no_grad(|| match completion {
            Completion::Nothing => Ok(None),
            Completion::Return(tensor) => Ok(Some(tensor)),
            Completion::Copy { from, mut to } => {
                prepared(to.f_copy_(&from))?;
                Ok(Some(to))
            }
            Completion::Sum(parts) => Ok(Some(prepared(sum_rows(&parts))?)),
        })
    }
}

/// Sums the rows in order; bf16 in fp32, rounded once.
fn sum_rows(parts: &Tensor) -> Result<Tensor, tch::TchError> {
    let kind = parts.kind();
    let wide = if kind == Kind::BFloat16 { Kind::Float } else { kind };
    let mut out = parts.f_get(0)?.f_to_dtype(wide, false, true)?;
    for row in 1..parts.size()[0] {
        out = out.f_add_(&parts.f_get(row)?)?;
    }
    out.f_to_kind(kind)
}

impl Drop for GlooWork {
    fn drop(&mut self) {
        if !self.ended {
            self.abandoned.store(true, Ordering::Release);
        }
        // SAFETY: the handle came from `start` and is not used again.
        unsafe { (self.functions.free_work)(self.handle) }
    }
}
