//! A communicator: one rank's end of a group of GPUs.
//!
//! Calls only put work on a stream; [`Communicator::wait`] watches it. A communicator that failed is aborted, once, and answers
//! every later call with [`NcclError::Aborted`].

use std::ffi::{c_int, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::library::{Comm, Config, Functions, IN_PROGRESS, SUCCESS};
use crate::{Nccl, NcclError, Result, UniqueId};

/// Kinds of numbers (`ncclDataType_t`).
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

/// How long Drop waits for calls that are still under way.
const CLOSING: Duration = Duration::from_secs(5);

/// One rank's end of a group of GPUs.
pub struct Communicator {
    nccl: Nccl,
    state: Mutex<State>,
    rank: usize,
    ranks: usize,
}

struct State {
    comm: Comm,
    aborted: bool,
    /// A call failed or was late: closing in good order would wait for it.
    failed: bool,
}

// SAFETY: NCCL takes calls from any thread, one at a time; the mutex sees to that.
#[allow(unsafe_code)]
unsafe impl Send for State {}

impl Communicator {
    /// Connects rank `rank` of `ranks` on the calling thread's current GPU; all ranks call this with the same id. `give_up` is
    /// asked again and again meanwhile.
    ///
    /// # Errors
    /// There is no GPU, a rank cannot be reached, not all have come by the deadline, or it was given up.
    #[allow(unsafe_code)]
    pub fn init(
        nccl: &Nccl,
        (rank, ranks): (usize, usize),
        id: &UniqueId,
        deadline: Instant,
        give_up: impl FnMut() -> bool,
    ) -> Result<Self> {
        const WHAT: &str = "ncclCommInitRankConfig";
        let (Ok(r), Ok(n), true) = (c_int::try_from(rank), c_int::try_from(ranks), rank < ranks) else {
            return Err(NcclError::Rank { rank, ranks });
        };
        let begin = Instant::now();
        let mut config = Config { size: size_of::<Config>(), magic: 0xcafe_beef, version: 21400, blocking: 0 };
        let mut comm: Comm = std::ptr::null_mut();
        // SAFETY: both places are valid during the call.
        let code = unsafe { (nccl.functions.init)(&mut comm, n, *id, r, &mut config) };
        if comm.is_null() {
            return Err(nccl.functions.refused(WHAT, code, comm));
        }
        let state = Mutex::new(State { comm, aborted: false, failed: false });
        let this = Self { nccl: nccl.clone(), state, rank, ranks };
        this.settle(WHAT, code, (begin, deadline), give_up).inspect_err(|_| this.abort())?;
        Ok(this)
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many ranks there are.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// Puts the calls that `body` makes on their streams as one piece of work. NCCL may have to connect first: `give_up` is asked
    /// meanwhile.
    ///
    /// # Errors
    /// NCCL refuses a call, the communicator was aborted, NCCL is still connecting at the deadline, or it was given up.
    #[allow(unsafe_code)]
    pub fn group(
        &self,
        deadline: Instant,
        give_up: impl FnMut() -> bool,
        body: impl FnOnce(&Calls<'_>) -> Result<()>,
    ) -> Result<()> {
        const WHAT: &str = "ncclGroupEnd";
        let begin = Instant::now();
        let code = {
            let mut state = self.live(WHAT)?;
            let functions = &*self.nccl.functions;
            let checked = |call, code| match code {
                SUCCESS | IN_PROGRESS => Ok(code),
                _ => Err(functions.refused(call, code, state.comm)),
            };
            // SAFETY: start and end are called on this thread, in pairs.
            let started = checked("ncclGroupStart", unsafe { (functions.group_start)() });
            let result = started.and_then(|_| {
                let made = body(&Calls { functions, comm: state.comm });
                // SAFETY: as above.
                let ended = checked(WHAT, unsafe { (functions.group_end)() });
                made.and(ended)
            });
            state.failed |= result.is_err();
            result?
        };
        self.settle(WHAT, code, (begin, deadline), give_up)
    }

    /// Waits until `finished` says that the stream has come past the work, and asks NCCL meanwhile whether it failed.
    ///
    /// # Errors
    /// NCCL or the GPU failed, the deadline passed, or the communicator was aborted. After a deadline it can be waited for again.
    pub fn wait(
        &self,
        what: &'static str,
        deadline: Instant,
        mut finished: impl FnMut() -> Result<bool, String>,
    ) -> Result<()> {
        let begin = Instant::now();
        let mut pause = Pause::default();
        loop {
            match finished() {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(message) => {
                    self.live(what)?.failed = true;
                    return Err(NcclError::Stream { what, message });
                }
            }
            self.check(what)?;
            pause.take(what, begin, deadline)?;
        }
    }

    /// Asks NCCL whether work that is under way has failed; does not wait.
    ///
    /// # Errors
    /// It has, or the communicator was aborted.
    pub fn check(&self, what: &'static str) -> Result<()> {
        let mut state = self.live(what)?;
        match poll(&self.nccl.functions, state.comm) {
            SUCCESS | IN_PROGRESS => Ok(()),
            code => {
                state.failed = true;
                Err(self.nccl.functions.refused(what, code, state.comm))
            }
        }
    }

    /// Gives the communicator up: work on the GPU ends, whatever it waits for. Only the first call does anything.
    #[allow(unsafe_code)]
    pub fn abort(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !std::mem::replace(&mut state.aborted, true) {
            // SAFETY: the communicator is live, and not used again.
            let _what_else = unsafe { (self.nccl.functions.abort)(state.comm) };
        }
    }

    fn live(&self, what: &'static str) -> Result<MutexGuard<'_, State>> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.aborted { Err(NcclError::Aborted { what }) } else { Ok(state) }
    }

    /// Waits until NCCL has taken a call in.
    fn settle(
        &self,
        what: &'static str,
        mut code: c_int,
        (begin, deadline): (Instant, Instant),
        mut give_up: impl FnMut() -> bool,
    ) -> Result<()> {
        let mut pause = Pause::default();
        loop {
            let result = match code {
                SUCCESS => return Ok(()),
                IN_PROGRESS if give_up() => Err(NcclError::GivenUp { what }),
                IN_PROGRESS => pause.take(what, begin, deadline),
                code => Err(self.nccl.functions.refused(what, code, self.live(what)?.comm)),
            };
            let mut state = self.live(what)?;
            state.failed |= result.is_err();
            result?;
            code = poll(&self.nccl.functions, state.comm);
        }
    }
}

impl Drop for Communicator {
    /// Closes in good order, or aborts where that does not end.
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        const WHAT: &str = "ncclCommFinalize";
        let code = match self.live(WHAT) {
            Err(_) => return,
            Ok(state) if state.failed => None,
            // SAFETY: the communicator is live.
            Ok(state) => Some(unsafe { (self.nccl.functions.finalize)(state.comm) }),
        };
        let now = Instant::now();
        if code.is_none_or(|code| self.settle(WHAT, code, (now, now + CLOSING), || false).is_err()) {
            return self.abort();
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.aborted = true;
        // SAFETY: the communicator is finalized, and not used again.
        let _what_else = unsafe { (self.nccl.functions.destroy)(state.comm) };
    }
}

#[allow(unsafe_code)]
fn poll(functions: &Functions, comm: Comm) -> c_int {
    let mut state = SUCCESS;
    // SAFETY: the caller holds the lock of a live communicator; the place is valid during the call.
    match unsafe { (functions.async_error)(comm, &mut state) } {
        SUCCESS => state,
        code => code,
    }
}

/// Longer and longer looks away, from 20 microseconds to 1 ms.
struct Pause(Duration);

impl Default for Pause {
    fn default() -> Self {
        Self(Duration::from_micros(20))
    }
}

impl Pause {
    fn take(&mut self, what: &'static str, begin: Instant, deadline: Instant) -> Result<()> {
        if Instant::now() >= deadline {
            return Err(NcclError::Late { what, seconds: begin.elapsed().as_secs_f64() });
        }
        std::thread::sleep(self.0);
        self.0 = (self.0 * 2).min(Duration::from_millis(1));
        Ok(())
    }
}

/// The calls of one group. All buffers lie on the communicator's GPU; work on them runs when the stream comes to it.
pub struct Calls<'a> {
    functions: &'a Functions,
    comm: Comm,
}

#[allow(unsafe_code)]
impl Calls<'_> {
    fn checked(&self, call: &'static str, code: c_int) -> Result<()> {
        match code {
            SUCCESS | IN_PROGRESS => Ok(()),
            code => Err(self.functions.refused(call, code, self.comm)),
        }
    }

    /// Sums `count` numbers of every rank into `to` of every rank; `from` and `to` may be the same.
    ///
    /// # Safety
    /// Both buffers hold `count` numbers and stay until the stream has come past this call; `stream` is a stream of the GPU.
    ///
    /// # Errors
    /// NCCL refuses.
    pub unsafe fn all_reduce(
        &self,
        (from, to): (*const c_void, *mut c_void),
        count: usize,
        kind: DataType,
        stream: *mut c_void,
    ) -> Result<()> {
        // SAFETY: by the caller.
        let code = unsafe { (self.functions.all_reduce)(from, to, count, kind as c_int, SUM, self.comm, stream) };
        self.checked("ncclAllReduce", code)
    }

    /// Sums over all ranks and gives rank r part r of the sum; a part has `count` numbers.
    ///
    /// # Safety
    /// As [`Calls::all_reduce`]; `from` holds `count` numbers for each rank.
    ///
    /// # Errors
    /// NCCL refuses.
    pub unsafe fn reduce_scatter(
        &self,
        (from, to): (*const c_void, *mut c_void),
        count: usize,
        kind: DataType,
        stream: *mut c_void,
    ) -> Result<()> {
        // SAFETY: by the caller.
        let code = unsafe { (self.functions.reduce_scatter)(from, to, count, kind as c_int, SUM, self.comm, stream) };
        self.checked("ncclReduceScatter", code)
    }

    /// Puts `count` numbers of every rank one after another into `to` of every rank.
    ///
    /// # Safety
    /// As [`Calls::all_reduce`]; `to` holds `count` numbers for each rank.
    ///
    /// # Errors
    /// NCCL refuses.
    pub unsafe fn all_gather(
        &self,
        (from, to): (*const c_void, *mut c_void),
        count: usize,
        kind: DataType,
        stream: *mut c_void,
    ) -> Result<()> {
        // SAFETY: by the caller.
        let code = unsafe { (self.functions.all_gather)(from, to, count, kind as c_int, self.comm, stream) };
        self.checked("ncclAllGather", code)
    }

    /// Copies `count` numbers of rank `root` to all, in place.
    ///
    /// # Safety
    /// As [`Calls::all_reduce`].
    ///
    /// # Errors
    /// NCCL refuses.
    pub unsafe fn broadcast(
        &self,
        buffer: *mut c_void,
        count: usize,
        kind: DataType,
        root: usize,
        stream: *mut c_void,
    ) -> Result<()> {
        let root = c_int::try_from(root).unwrap_or(-1);
        // SAFETY: by the caller.
        let code = unsafe { (self.functions.broadcast)(buffer, buffer, count, kind as c_int, root, self.comm, stream) };
        self.checked("ncclBroadcast", code)
    }

    /// Sends `count` numbers to a rank, which receives as many in a group of its own.
    ///
    /// # Safety
    /// As [`Calls::all_reduce`].
    ///
    /// # Errors
    /// NCCL refuses.
    pub unsafe fn send(
        &self,
        from: *const c_void,
        count: usize,
        kind: DataType,
        to: usize,
        stream: *mut c_void,
    ) -> Result<()> {
        let to = c_int::try_from(to).unwrap_or(-1);
        // SAFETY: by the caller; NCCL only reads here.
        let code = unsafe { (self.functions.send)(from.cast_mut(), count, kind as c_int, to, self.comm, stream) };
        self.checked("ncclSend", code)
    }

    /// Receives `count` numbers from a rank.
    ///
    /// # Safety
    /// As [`Calls::all_reduce`].
    ///
    /// # Errors
    /// NCCL refuses.
    pub unsafe fn recv(
        &self,
        to: *mut c_void,
        count: usize,
        kind: DataType,
        from: usize,
        stream: *mut c_void,
    ) -> Result<()> {
        let from = c_int::try_from(from).unwrap_or(-1);
        // SAFETY: by the caller.
        let code = unsafe { (self.functions.recv)(to, count, kind as c_int, from, self.comm, stream) };
        self.checked("ncclRecv", code)
    }
}
