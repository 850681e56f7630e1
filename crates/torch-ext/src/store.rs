//! libtorch's key-value store, by which ranks find each other: one rank hosts it, all join it.
//!
//! libtorch's own calls wait without end while the host is stopped; here each store has a thread that makes them, and callers wait
//! for it until their deadline. The store has no passwords: let only trusted networks reach its port.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::IntoRawFd;
use std::sync::{OnceLock, mpsc};
use std::time::{Duration, Instant};

use crate::library::{Part, checked};
use crate::{ExtError, Result};

type Take = unsafe extern "C" fn(*mut c_void, *const u8, usize);

/// The store's functions of cpp/store.cc.
struct Functions {
    new: unsafe extern "C" fn(*const c_char, u16, c_int, i64, *mut *mut c_void, *mut c_char, usize) -> c_int,
    clone: unsafe extern "C" fn(*mut c_void, *mut *mut c_void, *mut c_char, usize) -> c_int,
    free: unsafe extern "C" fn(*mut c_void),
    set: unsafe extern "C" fn(*mut c_void, *const c_char, *const u8, usize, *mut c_char, usize) -> c_int,
    get: unsafe extern "C" fn(*mut c_void, *const *const c_char, usize, Take, *mut c_void, *mut c_char, usize) -> c_int,
    check: unsafe extern "C" fn(*mut c_void, *const *const c_char, usize, *mut c_int, *mut c_char, usize) -> c_int,
    add: unsafe extern "C" fn(*mut c_void, *const c_char, i64, *mut i64, *mut c_char, usize) -> c_int,
    swap: Swap,
}

type Swap = unsafe extern "C" fn(
    *mut c_void,
    *const c_char,
    *const u8,
    usize,
    *const u8,
    usize,
    Take,
    *mut c_void,
    *mut c_char,
    usize,
) -> c_int;

fn functions() -> Result<&'static Functions> {
    static LOADED: OnceLock<Result<Functions, String>> = OnceLock::new();
    let loaded = LOADED.get_or_init(load).as_ref();
    loaded.map_err(|e| ExtError::Unavailable { part: "store", reason: e.clone() })
}

/// cpp/store.cc; libtorch is there, since tch links it.
fn part() -> Result<&'static Part, String> {
    static LOADED: OnceLock<Result<Part, String>> = OnceLock::new();
    let bytes = include_bytes!(concat!(env!("OUT_DIR"), "/libunveil_store.so"));
    let missing = "LIBTORCH was not set (make setup sets it)";
    LOADED.get_or_init(|| Part::load("unveil_store", bytes, missing)).as_ref().map_err(Clone::clone)
}

#[allow(unsafe_code)]
fn load() -> Result<Functions, String> {
    let part = part()?;
    // SAFETY: the types are those of cpp/store.cc.
    unsafe {
        Ok(Functions {
            new: part.get(b"unveil_store_new")?,
            clone: part.get(b"unveil_store_clone")?,
            free: part.get(b"unveil_store_free")?,
            set: part.get(b"unveil_store_set")?,
            get: part.get(b"unveil_store_get")?,
            check: part.get(b"unveil_store_check")?,
            add: part.get(b"unveil_store_add")?,
            swap: part.get(b"unveil_store_swap")?,
        })
    }
}

/// One connection to the store; freed with it.
pub(crate) struct Connection {
    pub(crate) handle: *mut c_void,
    functions: &'static Functions,
}

// SAFETY: libtorch's store may be used and freed on any thread; it has a lock of its own.
#[allow(unsafe_code)]
unsafe impl Send for Connection {}

impl Drop for Connection {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: the handle came from `new` or `clone` and is not used again.
        unsafe { (self.functions.free)(self.handle) }
    }
}

type Job = Box<dyn FnOnce(&Connection) + Send>;

/// A rank's end of the store. All calls take the moment by which they must have an answer.
pub struct Store {
    jobs: mpsc::Sender<Job>,
    address: SocketAddr,
    lost: OnceLock<ExtError>,
}

impl Store {
    /// Hosts the store on a bound socket (port 0 at bind picks a free port: [`Store::address`] tells it), and joins it.
    ///
    /// # Errors
    /// The store's part cannot be used, or libtorch refuses the socket.
    pub fn host(listener: TcpListener, deadline: Instant) -> Result<Self> {
        let refused = |e: std::io::Error| ExtError::Refused { what: "host the store", message: e.to_string() };
        let mut address = listener.local_addr().map_err(refused)?;
        functions()?;
        // The host talks to itself, also where it listens on all addresses.
        if address.ip().is_unspecified() {
            address.set_ip(match address {
                SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
                SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
            });
        }
        Self::start(address, Some(listener), deadline)
    }

    /// Joins the store at an address, trying again until the deadline.
    ///
    /// # Errors
    /// The store's part cannot be used, or nothing answers there.
    pub fn join(address: SocketAddr, deadline: Instant) -> Result<Self> {
        Self::start(address, None, deadline)
    }

    fn start(address: SocketAddr, listener: Option<TcpListener>, deadline: Instant) -> Result<Self> {
        let functions = functions()?;
        let what = if listener.is_some() { "host the store" } else { "join the store" };
        let left = deadline.saturating_duration_since(Instant::now());
        let (jobs, todo) = mpsc::channel::<Job>();
        let (ready, made) = mpsc::channel();
        let work = move || {
            let connection = connect(functions, address, listener, what, left);
            let (connection, result) = match connection {
                Ok(c) => (Some(c), Ok(())),
                Err(e) => (None, Err(e)),
            };
            let _gone = ready.send(result);
            if let Some(connection) = connection {
                todo.iter().for_each(|job| job(&connection));
            }
        };
        let spawned = std::thread::Builder::new().name("store".into()).spawn(work);
        spawned.map_err(|e| ExtError::Refused { what, message: e.to_string() })?;
        let late = || ExtError::Late { what, address: address.to_string(), seconds: left.as_secs_f64() };
        // libtorch counts whole seconds: its own, better message may come a little later.
        made.recv_timeout(left + Duration::from_secs(2)).unwrap_or_else(|_| Err(late()))?;
        Ok(Self { jobs, address, lost: OnceLock::new() })
    }

    /// Where the store is; the host sees its own port here.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Makes one call on the store's thread.
    fn ask<T: Send + 'static>(
        &self,
        what: &'static str,
        deadline: Instant,
        call: impl FnOnce(&Connection) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        if let Some(lost) = self.lost.get() {
            return Err(lost.clone());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let (answer, answered) = mpsc::channel();
        let job: Job = Box::new(move |connection| {
            let _gone = answer.send(call(connection));
        });
        let late = || ExtError::Late { what, address: self.address.to_string(), seconds: left.as_secs_f64() };
        let result = match self.jobs.send(job) {
            Ok(()) => answered.recv_timeout(left).map_err(|_| late()),
            Err(_) => Err(late()),
        };
        // A connection on which an answer is missing cannot be used again.
        result.inspect_err(|e| drop(self.lost.set(e.clone())))?
    }

    /// Sets a key.
    ///
    /// # Errors
    /// The host is gone or does not answer; then every later call fails at once.
    #[allow(unsafe_code)]
    pub fn set(&self, key: &str, value: &[u8], deadline: Instant) -> Result<()> {
        let (key, value) = (text(key)?, value.to_vec());
        self.ask("set", deadline, move |c| {
            // SAFETY: all pointers are valid during the call.
            checked("set a key of the store", |m, n| unsafe {
                (c.functions.set)(c.handle, key.as_ptr(), value.as_ptr(), value.len(), m, n)
            })
        })
    }

    /// Whether all keys are there; does not wait for them.
    ///
    /// # Errors
    /// As [`Store::set`].
    #[allow(unsafe_code)]
    pub fn check(&self, keys: &[&str], deadline: Instant) -> Result<bool> {
        let keys = keys.iter().map(|k| text(k)).collect::<Result<Vec<_>>>()?;
        self.ask("check", deadline, move |c| {
            let pointers: Vec<_> = keys.iter().map(|k| k.as_ptr()).collect();
            let mut all = 0;
            // SAFETY: all pointers are valid during the call.
            checked("look for keys of the store", |m, n| unsafe {
                (c.functions.check)(c.handle, pointers.as_ptr(), pointers.len(), &mut all, m, n)
            })?;
            Ok(all != 0)
        })
    }

    /// The values of keys that are known to be there.
    ///
    /// # Errors
    /// As [`Store::set`]; also for a key that is not there.
    #[allow(unsafe_code)]
    pub fn get_all(&self, keys: &[&str], deadline: Instant) -> Result<Vec<Vec<u8>>> {
        let keys = keys.iter().map(|k| text(k)).collect::<Result<Vec<_>>>()?;
        self.ask("get", deadline, move |c| {
            let pointers: Vec<_> = keys.iter().map(|k| k.as_ptr()).collect();
            let mut out: Vec<Vec<u8>> = Vec::with_capacity(keys.len());
            // SAFETY: all pointers are valid during the call, and `collect` is given the vector it expects.
            checked("get keys of the store", |m, n| unsafe {
                let place = (&raw mut out).cast();
                (c.functions.get)(c.handle, pointers.as_ptr(), pointers.len(), collect, place, m, n)
            })?;
            Ok(out)
        })
    }

    /// Waits for a key and gives its value.
    ///
    /// # Errors
    /// As [`Store::set`]; [`ExtError::Refused`] where the key is not there at the deadline.
    pub fn get(&self, key: &str, deadline: Instant) -> Result<Vec<u8>> {
        self.wait(&[key], deadline)?;
        let mut values = self.get_all(&[key], deadline)?;
        values.pop().ok_or_else(|| ExtError::Refused { what: "get a key of the store", message: "no value".into() })
    }

    /// Waits until all keys are there.
    ///
    /// # Errors
    /// As [`Store::set`]; [`ExtError::Refused`] where one is not there at the deadline, with the keys that are missing.
    pub fn wait(&self, keys: &[&str], deadline: Instant) -> Result<()> {
        while !self.check(keys, deadline)? {
            // The last look must still get its answer.
            if Instant::now() + PAUSE * 2 >= deadline {
                let soon = Instant::now() + Duration::from_secs(2);
                let mut missing = Vec::new();
                for key in keys {
                    if !self.check(&[key], soon)? {
                        missing.push(*key);
                    }
                }
                let message = format!("not there at the deadline: {}", missing.join(", "));
                return Err(ExtError::Refused { what: "wait for keys of the store", message });
            }
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// Adds to a counter that begins at 0, and gives its new value.
    ///
    /// # Errors
    /// As [`Store::set`].
    #[allow(unsafe_code)]
    pub fn add(&self, key: &str, by: i64, deadline: Instant) -> Result<i64> {
        let key = text(key)?;
        self.ask("add", deadline, move |c| {
            let mut out = 0;
            // SAFETY: all pointers are valid during the call.
            checked("add to a key of the store", |m, n| unsafe {
                (c.functions.add)(c.handle, key.as_ptr(), by, &mut out, m, n)
            })?;
            Ok(out)
        })
    }

    /// Sets a key where it holds `expected`, as one step; gives what it holds afterwards.
    ///
    /// # Errors
    /// As [`Store::set`].
    #[allow(unsafe_code)]
    pub fn swap(&self, key: &str, expected: &[u8], value: &[u8], deadline: Instant) -> Result<Vec<u8>> {
        let (key, expected, value) = (text(key)?, expected.to_vec(), value.to_vec());
        self.ask("swap", deadline, move |c| {
            let mut out: Vec<Vec<u8>> = Vec::new();
            // SAFETY: all pointers are valid during the call, and `collect` is given the vector it expects.
            checked("swap a key of the store", |m, n| unsafe {
                let place = (&raw mut out).cast();
                let (e, v) = (expected.as_ptr(), value.as_ptr());
                (c.functions.swap)(c.handle, key.as_ptr(), e, expected.len(), v, value.len(), collect, place, m, n)
            })?;
            Ok(out.pop().unwrap_or_default())
        })
    }

    /// A second connection, for a thread that libtorch keeps waiting.
    #[allow(unsafe_code)]
    pub(crate) fn connection(&self, deadline: Instant) -> Result<Connection> {
        self.ask("connect", deadline, |c| {
            let mut handle = std::ptr::null_mut();
            // SAFETY: the place is written before it is used.
            checked("connect to the store", |m, n| unsafe { (c.functions.clone)(c.handle, &mut handle, m, n) })?;
            Ok(Connection { handle, functions: c.functions })
        })
    }
}

/// Between two looks for a key.
const PAUSE: Duration = Duration::from_millis(10);

pub(crate) fn text(key: &str) -> Result<CString> {
    CString::new(key).map_err(|e| ExtError::Refused { what: "name a key", message: e.to_string() })
}

#[allow(unsafe_code)]
fn connect(
    functions: &'static Functions,
    address: SocketAddr,
    listener: Option<TcpListener>,
    what: &'static str,
    left: Duration,
) -> Result<Connection> {
    let host = text(&address.ip().to_string())?;
    let host: &CStr = &host;
    let descriptor = listener.map_or(-1, IntoRawFd::into_raw_fd);
    // libtorch divides to whole seconds, and 0 would be no limit.
    let limit = left.as_secs().max(1) as i64 * 1000;
    let mut handle = std::ptr::null_mut();
    // SAFETY: the place is written before it is used; the store takes the socket over.
    checked(what, |m, n| unsafe {
        (functions.new)(host.as_ptr(), address.port(), descriptor, limit, &mut handle, m, n)
    })?;
    Ok(Connection { handle, functions })
}

#[allow(unsafe_code)]
unsafe extern "C" fn collect(place: *mut c_void, bytes: *const u8, length: usize) {
    // SAFETY: `place` is the vector that the caller lent for the call; an empty value may have no address.
    unsafe {
        let value = if length == 0 { &[] } else { std::slice::from_raw_parts(bytes, length) };
        (*place.cast::<Vec<Vec<u8>>>()).push(value.to_vec());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    fn pair() -> (Store, Store) {
        let host = Store::host(TcpListener::bind("127.0.0.1:0").unwrap(), soon()).unwrap();
        let guest = Store::join(host.address(), soon()).unwrap();
        (host, guest)
    }

    #[test]
    fn what_one_end_writes_the_other_reads() {
        let (host, guest) = pair();
        assert_ne!(host.address().port(), 0);
        host.set("a", b"one", soon()).unwrap();
        host.set("empty", b"", soon()).unwrap();
        assert_eq!(guest.get_all(&["a", "empty"], soon()).unwrap(), [b"one".to_vec(), vec![]]);
        assert!(!guest.check(&["a", "b"], soon()).unwrap());
        assert_eq!((host.add("n", 2, soon()).unwrap(), guest.add("n", 3, soon()).unwrap()), (2, 5));
        assert_eq!(guest.swap("a", b"two", b"three", soon()).unwrap(), b"one");
        assert_eq!(guest.swap("a", b"one", b"three", soon()).unwrap(), b"three");
        assert_eq!(host.get("a", soon()).unwrap(), b"three");
    }

    #[test]
    fn a_key_is_waited_for_and_named_when_it_does_not_come() {
        let (host, guest) = pair();
        std::thread::scope(|s| {
            s.spawn(|| {
                std::thread::sleep(Duration::from_millis(100));
                host.set("late", b"here", soon()).unwrap();
            });
            assert_eq!(guest.get("late", soon()).unwrap(), b"here");
        });
        let error = guest.wait(&["late", "never"], Instant::now() + Duration::from_millis(200)).unwrap_err();
        assert!(error.to_string().ends_with("not there at the deadline: never"), "{error}");
        // The store is as good as before.
        guest.set("b", b"x", soon()).unwrap();
    }

    #[test]
    fn a_host_that_is_gone_or_silent_is_an_error_in_time() {
        let (host, guest) = pair();
        drop(host);
        let mut error = None;
        for _ in 0..200 {
            error = guest.add("n", 1, soon()).err();
            if error.is_some() {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(error.is_some(), "a store without its host goes on");

        // A socket that takes connections and never answers.
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let begin = Instant::now();
        let joined = Store::join(silent.local_addr().unwrap(), begin + Duration::from_millis(1200));
        let error = match joined {
            Ok(store) => store.add("n", 1, begin + Duration::from_millis(1500)).unwrap_err(),
            Err(e) => e,
        };
        assert!(begin.elapsed() < Duration::from_secs(8), "{error}");
    }
}
