//! Communicators, and the collective and point-to-point calls made through them.
//!
//! Calls only enqueue work on a stream; [`Communicator::wait`] waits for it. After [`Communicator::abort`] every call returns
//! [`NcclError::Aborted`].

use std::ffi::{c_int, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::library::{Comm, Config, Functions, IN_PROGRESS, SUCCESS};
use crate::{Nccl, NcclError, Result, UniqueId};

/// Element type of a buffer (`ncclDataType_t`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum DataType {
    /// 64-bit integers.
    Int64 = 4,
    /// fp32.
    Float32 = 7,
    /// fp64.
    Float64 = 8,
    /// bf16.
    Bfloat16 = 9,
}

const SUM: c_int = 0;

/// Timeout of the calls in flight when a communicator is dropped.
const FINALIZE_TIMEOUT: Duration = Duration::from_secs(5);

/// One rank's handle to a group of GPUs.
#[derive(Debug)]
pub struct Communicator {
    nccl: Nccl,
    state: Mutex<CommState>,
    rank: usize,
    ranks: usize,
}

#[derive(Debug)]
struct CommState {
    comm: Comm,
    aborted: bool,
    /// A call failed or timed out: finalizing would wait for it.
    failed: bool,
}

// SAFETY: NCCL may be called from any thread, one at a time; the mutex ensures the latter.
unsafe impl Send for CommState {}

impl Communicator {
    /// Connects rank `rank` of `ranks` on the calling thread's current GPU. All ranks call this with the same id. `cancelled` is
    /// polled while waiting.
    ///
    /// # Errors
    /// Returns [`NcclError::Rank`] for a rank out of range, [`NcclError::Failed`] if there is no GPU or a rank cannot be reached,
    /// [`NcclError::Timeout`] if ranks are missing at the deadline, and [`NcclError::Cancelled`] if `cancelled` returned true.
    pub fn init(
        nccl: &Nccl,
        (rank, ranks): (usize, usize),
        id: &UniqueId,
        deadline: Instant,
        cancelled: impl FnMut() -> bool,
    ) -> Result<Self> {
        const CALL: &str = "ncclCommInitRankConfig";
        let (Ok(rank_c), Ok(ranks_c), true) = (c_int::try_from(rank), c_int::try_from(ranks), rank < ranks) else {
            return Err(NcclError::Rank { rank, ranks });
        };
        let begin = Instant::now();
        let mut config = Config { size: size_of::<Config>(), magic: 0xcafe_beef, version: 21400, blocking: 0 };
        let mut comm: Comm = std::ptr::null_mut();
        // SAFETY: both pointers are valid during the call.
        let code = unsafe { (nccl.functions.init)(&mut comm, ranks_c, *id, rank_c, &mut config) };
        if comm.is_null() {
            return Err(nccl.functions.call_error(CALL, code, comm));
        }
        let state = Mutex::new(CommState { comm, aborted: false, failed: false });
        let communicator = Self { nccl: nccl.clone(), state, rank, ranks };
        communicator.wait_ready(CALL, code, (begin, deadline), cancelled).inspect_err(|_| communicator.abort())?;
        Ok(communicator)
    }

    /// Returns this rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Returns the number of ranks.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// Enqueues the calls that `body` makes as one group. NCCL may have to connect first: `cancelled` is polled meanwhile.
    ///
    /// # Errors
    /// Returns [`NcclError::Failed`] if NCCL rejects a call, [`NcclError::Aborted`] after an abort, [`NcclError::Timeout`] if NCCL is
    /// still connecting at the deadline, and [`NcclError::Cancelled`] if `cancelled` returned true.
    pub fn group(
        &self,
        deadline: Instant,
        cancelled: impl FnMut() -> bool,
        body: impl FnOnce(&GroupCalls<'_>) -> Result<()>,
    ) -> Result<()> {
        const CALL: &str = "ncclGroupEnd";
        let begin = Instant::now();
        let code = {
            let mut state = self.lock_live(CALL)?;
            let functions = &*self.nccl.functions;
            let checked = |call, code| match code {
                SUCCESS | IN_PROGRESS => Ok(code),
                _ => Err(functions.call_error(call, code, state.comm)),
            };
            // SAFETY: start and end are called in pairs, on this thread.
            let started = checked("ncclGroupStart", unsafe { (functions.group_start)() });
            let result = started.and_then(|_| {
                let called = body(&GroupCalls { functions, comm: state.comm });
                // SAFETY: see above.
                let ended = checked(CALL, unsafe { (functions.group_end)() });
                called.and(ended)
            });
            state.failed |= result.is_err();
            result?
        };
        self.wait_ready(CALL, code, (begin, deadline), cancelled)
    }

    /// Waits until `finished` reports that the stream has completed the work, and polls NCCL for asynchronous errors meanwhile.
    ///
    /// # Errors
    /// Returns [`NcclError::Failed`] if NCCL failed, [`NcclError::Stream`] if `finished` did, [`NcclError::Aborted`] after an abort,
    /// and [`NcclError::Timeout`] at the deadline; after a timeout the work can be waited for again.
    pub fn wait(
        &self,
        call: &'static str,
        deadline: Instant,
        mut finished: impl FnMut() -> Result<bool, String>,
    ) -> Result<()> {
        let begin = Instant::now();
        let mut backoff = PollBackoff::default();
        loop {
            match finished() {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(message) => {
                    self.lock_live(call)?.failed = true;
                    return Err(NcclError::Stream { call, message });
                }
            }
            self.check(call)?;
            backoff.sleep(call, begin, deadline)?;
        }
    }

    /// Checks for an asynchronous error of work in flight, without waiting.
    ///
    /// # Errors
    /// Returns [`NcclError::Failed`] if NCCL reports one, and [`NcclError::Aborted`] after an abort.
    pub fn check(&self, call: &'static str) -> Result<()> {
        let mut state = self.lock_live(call)?;
        match poll(&self.nccl.functions, state.comm) {
            SUCCESS | IN_PROGRESS => Ok(()),
            code => {
                state.failed = true;
                Err(self.nccl.functions.call_error(call, code, state.comm))
            }
        }
    }

    /// Aborts the communicator and ends its work on the GPU, whatever that waits for. Further calls do nothing.
    pub fn abort(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !std::mem::replace(&mut state.aborted, true) {
            // SAFETY: the communicator is live and not used again.
            let _code = unsafe { (self.nccl.functions.abort)(state.comm) };
        }
    }

    fn lock_live(&self, call: &'static str) -> Result<MutexGuard<'_, CommState>> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.aborted { Err(NcclError::Aborted { call }) } else { Ok(state) }
    }

    /// Waits while NCCL reports a non-blocking call as in progress.
    fn wait_ready(
        &self,
        call: &'static str,
        mut code: c_int,
        (begin, deadline): (Instant, Instant),
        mut cancelled: impl FnMut() -> bool,
    ) -> Result<()> {
        let mut backoff = PollBackoff::default();
        loop {
            let result = match code {
                SUCCESS => return Ok(()),
                IN_PROGRESS if cancelled() => Err(NcclError::Cancelled { call }),
                IN_PROGRESS => backoff.sleep(call, begin, deadline),
                code => Err(self.nccl.functions.call_error(call, code, self.lock_live(call)?.comm)),
            };
            let mut state = self.lock_live(call)?;
            state.failed |= result.is_err();
            result?;
            code = poll(&self.nccl.functions, state.comm);
        }
    }
}

impl Drop for Communicator {
    /// Finalizes and destroys the communicator, or aborts it if that fails or times out.
    fn drop(&mut self) {
        const CALL: &str = "ncclCommFinalize";
        let code = match self.lock_live(CALL) {
            Err(_) => return,
            Ok(state) if state.failed => None,
            // SAFETY: the communicator is live.
            Ok(state) => Some(unsafe { (self.nccl.functions.finalize)(state.comm) }),
        };
        let now = Instant::now();
        if code.is_none_or(|code| self.wait_ready(CALL, code, (now, now + FINALIZE_TIMEOUT), || false).is_err()) {
            return self.abort();
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.aborted = true;
        // SAFETY: the communicator is finalized and not used again.
        let _code = unsafe { (self.nccl.functions.destroy)(state.comm) };
    }
}

/// Returns the result code of the newest non-blocking call, or of asynchronous work.
fn poll(functions: &Functions, comm: Comm) -> c_int {
    let mut result = SUCCESS;
    // SAFETY: the caller holds the lock of a live communicator; the out-pointer is valid during the call.
    match unsafe { (functions.async_error)(comm, &mut result) } {
        SUCCESS => result,
        code => code,
    }
}

/// Delay between polls, which doubles from 20 microseconds up to 1 ms.
struct PollBackoff(Duration);

impl Default for PollBackoff {
    fn default() -> Self {
        Self(Duration::from_micros(20))
    }
}

impl PollBackoff {
    fn sleep(&mut self, call: &'static str, begin: Instant, deadline: Instant) -> Result<()> {
        if Instant::now() >= deadline {
            return Err(NcclError::Timeout { call, seconds: begin.elapsed().as_secs_f64() });
        }
        std::thread::sleep(self.0);
        self.0 = (self.0 * 2).min(Duration::from_millis(1));
        Ok(())
    }
}

/// The elements that one call transfers, and the stream that it runs on.
#[derive(Debug, Clone, Copy)]
pub struct Transfer {
    /// Number of elements.
    pub count: usize,
    /// Type of an element.
    pub dtype: DataType,
    /// A stream of the communicator's GPU.
    pub stream: *mut c_void,
}

/// Makes the calls of one group. All buffers are on the communicator's GPU; the calls run in stream order.
#[derive(Debug)]
pub struct GroupCalls<'a> {
    functions: &'a Functions,
    comm: Comm,
}

impl GroupCalls<'_> {
    fn checked(&self, call: &'static str, code: c_int) -> Result<()> {
        match code {
            SUCCESS | IN_PROGRESS => Ok(()),
            code => Err(self.functions.call_error(call, code, self.comm)),
        }
    }

    /// Sums the elements over all ranks into `to` of every rank; `from` and `to` may be the same buffer.
    ///
    /// # Safety
    /// Both buffers hold the elements of `transfer` and live until its stream, a stream of the communicator's GPU, has completed this call.
    ///
    /// # Errors
    /// Returns [`NcclError::Failed`] if NCCL rejects the call.
    pub unsafe fn all_reduce(&self, (from, to): (*const c_void, *mut c_void), transfer: Transfer) -> Result<()> {
        let Transfer { count, dtype, stream } = transfer;
        // SAFETY: guaranteed by the caller.
        let code = unsafe { (self.functions.all_reduce)(from, to, count, dtype as c_int, SUM, self.comm, stream) };
        self.checked("ncclAllReduce", code)
    }

    /// Sums over all ranks and writes shard r of the sum, `transfer.count` elements, to rank r.
    ///
    /// # Safety
    /// See [`GroupCalls::all_reduce`]; `from` holds `transfer.count` elements for each rank.
    ///
    /// # Errors
    /// Returns [`NcclError::Failed`] if NCCL rejects the call.
    pub unsafe fn reduce_scatter(&self, (from, to): (*const c_void, *mut c_void), transfer: Transfer) -> Result<()> {
        let Transfer { count, dtype, stream } = transfer;
        // SAFETY: guaranteed by the caller.
        let code = unsafe { (self.functions.reduce_scatter)(from, to, count, dtype as c_int, SUM, self.comm, stream) };
        self.checked("ncclReduceScatter", code)
    }

    /// Concatenates the elements of every rank into `to` of every rank.
    ///
    /// # Safety
    /// See [`GroupCalls::all_reduce`]; `to` holds `transfer.count` elements for each rank.
    ///
    /// # Errors
    /// Returns [`NcclError::Failed`] if NCCL rejects the call.
    pub unsafe fn all_gather(&self, (from, to): (*const c_void, *mut c_void), transfer: Transfer) -> Result<()> {
        let Transfer { count, dtype, stream } = transfer;
        // SAFETY: guaranteed by the caller.
        let code = unsafe { (self.functions.all_gather)(from, to, count, dtype as c_int, self.comm, stream) };
        self.checked("ncclAllGather", code)
    }

    /// Copies the elements of rank `root` to all ranks, in place.
    ///
    /// # Safety
    /// See [`GroupCalls::all_reduce`].
    ///
    /// # Errors
    /// Returns [`NcclError::Failed`] if NCCL rejects the call.
    pub unsafe fn broadcast(&self, buffer: *mut c_void, root: usize, transfer: Transfer) -> Result<()> {
        let Transfer { count, dtype, stream } = transfer;
        let root = c_int::try_from(root).unwrap_or(-1);
        // SAFETY: guaranteed by the caller.
        let code =
            unsafe { (self.functions.broadcast)(buffer, buffer, count, dtype as c_int, root, self.comm, stream) };
        self.checked("ncclBroadcast", code)
    }

    /// Sends the elements to rank `to`, which receives as many in its own group.
    ///
    /// # Safety
    /// See [`GroupCalls::all_reduce`].
    ///
    /// # Errors
    /// Returns [`NcclError::Failed`] if NCCL rejects the call.
    pub unsafe fn send(&self, from: *const c_void, to: usize, transfer: Transfer) -> Result<()> {
        let Transfer { count, dtype, stream } = transfer;
        let to = c_int::try_from(to).unwrap_or(-1);
        // SAFETY: guaranteed by the caller; NCCL only reads from the buffer.
        let code = unsafe { (self.functions.send)(from.cast_mut(), count, dtype as c_int, to, self.comm, stream) };
        self.checked("ncclSend", code)
    }

    /// Receives the elements from rank `from`.
    ///
    /// # Safety
    /// See [`GroupCalls::all_reduce`].
    ///
    /// # Errors
    /// Returns [`NcclError::Failed`] if NCCL rejects the call.
    pub unsafe fn recv(&self, to: *mut c_void, from: usize, transfer: Transfer) -> Result<()> {
        let Transfer { count, dtype, stream } = transfer;
        let from = c_int::try_from(from).unwrap_or(-1);
        // SAFETY: guaranteed by the caller.
        let code = unsafe { (self.functions.recv)(to, count, dtype as c_int, from, self.comm, stream) };
        self.checked("ncclRecv", code)
    }
}
