//! libtorch's key-value store (`TCPStore`), through which ranks find each other: one rank hosts it, all join it.
//!
//! libtorch's calls wait indefinitely while the host is stopped. Here each store has a thread that makes them, and callers wait for
//! that thread until their deadline. The store has no authentication: only trusted networks may reach its port.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::IntoRawFd;
use std::sync::{OnceLock, mpsc};
use std::time::{Duration, Instant};

use crate::library::{NativeLibrary, check_call, function_table, native_library};
use crate::{ExtError, Result};

/// Receives one value of the store.
type ValueSink = unsafe extern "C" fn(*mut c_void, *const u8, usize);

// cpp/store.cc
function_table! {
    "store", library();
    new: unsafe extern "C" fn(*const c_char, u16, c_int, i64, *mut *mut c_void, *mut c_char, usize) -> c_int = b"unveil_store_new",
    clone: unsafe extern "C" fn(*mut c_void, *mut *mut c_void, *mut c_char, usize) -> c_int = b"unveil_store_clone",
    free: unsafe extern "C" fn(*mut c_void) = b"unveil_store_free",
    set: unsafe extern "C" fn(*mut c_void, *const c_char, *const u8, usize, *mut c_char, usize) -> c_int = b"unveil_store_set",
    get: unsafe extern "C" fn(*mut c_void, *const *const c_char, usize, ValueSink, *mut c_void, *mut c_char, usize) -> c_int = b"unveil_store_get",
    check: unsafe extern "C" fn(*mut c_void, *const *const c_char, usize, *mut c_int, *mut c_char, usize) -> c_int = b"unveil_store_check",
    add: unsafe extern "C" fn(*mut c_void, *const c_char, i64, *mut i64, *mut c_char, usize) -> c_int = b"unveil_store_add",
    compare_set: CompareSet = b"unveil_store_compare_set",
}

type CompareSet = unsafe extern "C" fn(
    *mut c_void,
    *const c_char,
    *const u8,
    usize,
    *const u8,
    usize,
    ValueSink,
    *mut c_void,
    *mut c_char,
    usize,
) -> c_int;

/// cpp/store.cc. libtorch itself is loaded already, since tch links it.
fn library() -> Result<&'static NativeLibrary, String> {
    native_library!("store", "LIBTORCH was not set (make setup sets it)")
}

/// One connection to the store, closed when it is dropped.
pub(crate) struct Connection {
    pub(crate) handle: *mut c_void,
    functions: &'static Functions,
}

// SAFETY: libtorch's store may be used and freed on any thread; it has its own lock.
unsafe impl Send for Connection {}

impl Drop for Connection {
    fn drop(&mut self) {
        // SAFETY: the handle came from `new` or `clone` and is not used again.
        unsafe { (self.functions.free)(self.handle) }
    }
}

type StoreTask = Box<dyn FnOnce(&Connection) + Send>;

/// A rank's client of the store. Every call has a deadline by which it must be answered.
#[derive(Debug)]
pub struct Store {
    tasks: mpsc::Sender<StoreTask>,
    address: SocketAddr,
    /// The error after which the connection is unusable.
    failure: OnceLock<ExtError>,
}

impl Store {
    /// Hosts the store on a bound socket and joins it. A socket bound to port 0 has a free port, which [`Store::address`] returns.
    ///
    /// # Errors
    /// Returns [`ExtError::Unavailable`] if the library cannot be loaded, and [`ExtError::Refused`] if libtorch refuses the socket.
    pub fn host(listener: TcpListener, deadline: Instant) -> Result<Self> {
        let refused = |e: std::io::Error| ExtError::Refused { what: "host the store", message: e.to_string() };
        let mut address = listener.local_addr().map_err(refused)?;
        functions()?;
        // The host connects to itself, even if it listens on all addresses.
        if address.ip().is_unspecified() {
            address.set_ip(match address {
                SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
                SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
            });
        }
        Self::start(address, Some(listener), deadline)
    }

    /// Joins the store at an address, retrying until the deadline.
    ///
    /// # Errors
    /// Returns [`ExtError::Unavailable`] if the library cannot be loaded, and [`ExtError::Refused`] or [`ExtError::Timeout`] if
    /// nothing answers at the address.
    pub fn join(address: SocketAddr, deadline: Instant) -> Result<Self> {
        Self::start(address, None, deadline)
    }

    fn start(address: SocketAddr, listener: Option<TcpListener>, deadline: Instant) -> Result<Self> {
        let functions = functions()?;
        let what = if listener.is_some() { "host the store" } else { "join the store" };
        let left = deadline.saturating_duration_since(Instant::now());
        let (tasks, queue) = mpsc::channel::<StoreTask>();
        let (sender, connected) = mpsc::channel();
        let work = move || {
            let connection = connect(functions, address, listener, what, left);
            let (connection, result) = match connection {
                Ok(c) => (Some(c), Ok(())),
                Err(e) => (None, Err(e)),
            };
            let _receiver_gone = sender.send(result);
            if let Some(connection) = connection {
                queue.iter().for_each(|task| task(&connection));
            }
        };
        let spawned = std::thread::Builder::new().name("store".into()).spawn(work);
        spawned.map_err(|e| ExtError::Refused { what, message: e.to_string() })?;
        let timeout = || ExtError::Timeout { what, address: address.to_string(), seconds: left.as_secs_f64() };
        // libtorch counts whole seconds: its own, more precise message may come a little later.
        connected.recv_timeout(left + Duration::from_secs(2)).unwrap_or_else(|_| Err(timeout()))?;
        Ok(Self { tasks, address, failure: OnceLock::new() })
    }

    /// Returns the address of the store; on the host, with the port that was chosen.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Makes one call on the store's thread.
    fn call<T: Send + 'static>(
        &self,
        what: &'static str,
        deadline: Instant,
        call: impl FnOnce(&Connection) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        if let Some(failure) = self.failure.get() {
            return Err(failure.clone());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let (sender, answer) = mpsc::channel();
        let task: StoreTask = Box::new(move |connection| {
            let _receiver_gone = sender.send(call(connection));
        });
        let timeout = || ExtError::Timeout { what, address: self.address.to_string(), seconds: left.as_secs_f64() };
        let result = match self.tasks.send(task) {
            Ok(()) => answer.recv_timeout(left).map_err(|_| timeout()),
            Err(_) => Err(timeout()),
        };
        // A connection on which an answer is missing cannot be used again.
        result.inspect_err(|e| drop(self.failure.set(e.clone())))?
    }

    /// Sets a key.
    ///
    /// # Errors
    /// Returns [`ExtError::Timeout`] if the host does not answer, after which every later call fails immediately, and
    /// [`ExtError::Refused`] if libtorch reports an error.
    pub fn set(&self, key: &str, value: &[u8], deadline: Instant) -> Result<()> {
        let key = c_string(key)?;
        let value = value.to_vec();
        self.call("set", deadline, move |c| {
            // SAFETY: all pointers are valid during the call.
            check_call("set a key of the store", |m, n| unsafe {
                (c.functions.set)(c.handle, key.as_ptr(), value.as_ptr(), value.len(), m, n)
            })
        })
    }

    /// Returns whether all keys exist, without waiting for them.
    ///
    /// # Errors
    /// Returns the same errors as [`Store::set`].
    pub fn check(&self, keys: &[&str], deadline: Instant) -> Result<bool> {
        let keys = keys.iter().map(|k| c_string(k)).collect::<Result<Vec<_>>>()?;
        self.call("check", deadline, move |c| {
            let pointers: Vec<_> = keys.iter().map(|k| k.as_ptr()).collect();
            let mut all = 0;
            // SAFETY: all pointers are valid during the call.
            check_call("check keys of the store", |m, n| unsafe {
                (c.functions.check)(c.handle, pointers.as_ptr(), pointers.len(), &mut all, m, n)
            })?;
            Ok(all != 0)
        })
    }

    /// Returns the values of keys that are known to exist.
    ///
    /// # Errors
    /// Returns the same errors as [`Store::set`]; a missing key is an error, too.
    pub fn get_all(&self, keys: &[&str], deadline: Instant) -> Result<Vec<Vec<u8>>> {
        let keys = keys.iter().map(|k| c_string(k)).collect::<Result<Vec<_>>>()?;
        self.call("get", deadline, move |c| {
            let pointers: Vec<_> = keys.iter().map(|k| k.as_ptr()).collect();
            let mut out: Vec<Vec<u8>> = Vec::with_capacity(keys.len());
            // SAFETY: all pointers are valid during the call, and `collect_value` is given the vector that it expects.
            check_call("get keys of the store", |m, n| unsafe {
                let values = (&raw mut out).cast();
                (c.functions.get)(c.handle, pointers.as_ptr(), pointers.len(), collect_value, values, m, n)
            })?;
            Ok(out)
        })
    }

    /// Waits for a key and returns its value.
    ///
    /// # Errors
    /// Returns the same errors as [`Store::set`], and [`ExtError::Refused`] if the key does not exist at the deadline.
    pub fn get(&self, key: &str, deadline: Instant) -> Result<Vec<u8>> {
        self.wait(&[key], deadline)?;
        let mut values = self.get_all(&[key], deadline)?;
        values.pop().ok_or_else(|| ExtError::Refused { what: "get a key of the store", message: "no value".into() })
    }

    /// Waits until all keys exist.
    ///
    /// # Errors
    /// Returns the same errors as [`Store::set`], and [`ExtError::Refused`] with the missing keys if one does not exist at the
    /// deadline.
    pub fn wait(&self, keys: &[&str], deadline: Instant) -> Result<()> {
        while !self.check(keys, deadline)? {
            // The last check must still be answered.
            if Instant::now() + POLL_INTERVAL * 2 >= deadline {
                let soon = Instant::now() + Duration::from_secs(2);
                let mut missing = Vec::new();
                for key in keys {
                    if !self.check(&[key], soon)? {
                        missing.push(*key);
                    }
                }
                let message = format!("still missing at the deadline: {}", missing.join(", "));
                return Err(ExtError::Refused { what: "wait for keys of the store", message });
            }
            std::thread::sleep(POLL_INTERVAL);
        }
        Ok(())
    }

    /// Adds to a counter that starts at 0, and returns its new value.
    ///
    /// # Errors
    /// Returns the same errors as [`Store::set`].
    pub fn add(&self, key: &str, by: i64, deadline: Instant) -> Result<i64> {
        let key = c_string(key)?;
        self.call("add", deadline, move |c| {
            let mut out = 0;
            // SAFETY: all pointers are valid during the call.
            check_call("add to a key of the store", |m, n| unsafe {
                (c.functions.add)(c.handle, key.as_ptr(), by, &mut out, m, n)
            })?;
            Ok(out)
        })
    }

    /// Atomically sets a key if its value is `expected`; returns its value afterwards.
    ///
    /// # Errors
    /// Returns the same errors as [`Store::set`].
    pub fn compare_set(&self, key: &str, expected: &[u8], value: &[u8], deadline: Instant) -> Result<Vec<u8>> {
        let key = c_string(key)?;
        let expected = expected.to_vec();
        let value = value.to_vec();
        self.call("compare_set", deadline, move |c| {
            let mut out: Vec<Vec<u8>> = Vec::new();
            // SAFETY: all pointers are valid during the call, and `collect_value` is given the vector that it expects.
            check_call("compare and set a key of the store", |m, n| unsafe {
                let values = (&raw mut out).cast();
                let e = expected.as_ptr();
                let v = value.as_ptr();
                let e_len = expected.len();
                let v_len = value.len();
                (c.functions.compare_set)(c.handle, key.as_ptr(), e, e_len, v, v_len, collect_value, values, m, n)
            })?;
            Ok(out.pop().unwrap_or_default())
        })
    }

    /// Opens a second connection, for a thread that libtorch keeps waiting.
    pub(crate) fn connection(&self, deadline: Instant) -> Result<Connection> {
        self.call("connect", deadline, |c| {
            let mut handle = std::ptr::null_mut();
            // SAFETY: the handle is written before it is used.
            check_call("connect to the store", |m, n| unsafe { (c.functions.clone)(c.handle, &mut handle, m, n) })?;
            Ok(Connection { handle, functions: c.functions })
        })
    }
}

/// Time between two checks for a key.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

pub(crate) fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|e| ExtError::Refused { what: "pass a text to libtorch", message: e.to_string() })
}

fn connect(
    functions: &'static Functions,
    address: SocketAddr,
    listener: Option<TcpListener>,
    what: &'static str,
    left: Duration,
) -> Result<Connection> {
    let host = c_string(&address.ip().to_string())?;
    let host: &CStr = &host;
    let descriptor = listener.map_or(-1, IntoRawFd::into_raw_fd);
    // libtorch rounds down to whole seconds, and 0 would mean no timeout.
    let timeout_ms = left.as_secs().max(1) as i64 * 1000;
    let mut handle = std::ptr::null_mut();
    // SAFETY: the handle is written before it is used; the store becomes the owner of the socket.
    check_call(what, |m, n| unsafe {
        (functions.new)(host.as_ptr(), address.port(), descriptor, timeout_ms, &mut handle, m, n)
    })?;
    Ok(Connection { handle, functions })
}

unsafe extern "C" fn collect_value(values: *mut c_void, bytes: *const u8, length: usize) {
    // SAFETY: `values` is the vector that the caller lent for the call; an empty value may have no address.
    unsafe {
        let value = if length == 0 { &[] } else { std::slice::from_raw_parts(bytes, length) };
        (*values.cast::<Vec<Vec<u8>>>()).push(value.to_vec());
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
    fn values_are_shared_between_clients() {
        let (host, guest) = pair();
        assert_ne!(host.address().port(), 0);
        host.set("a", b"one", soon()).unwrap();
        host.set("empty", b"", soon()).unwrap();
        assert_eq!(guest.get_all(&["a", "empty"], soon()).unwrap(), [b"one".to_vec(), vec![]]);
        assert!(!guest.check(&["a", "b"], soon()).unwrap());
        assert_eq!((host.add("n", 2, soon()).unwrap(), guest.add("n", 3, soon()).unwrap()), (2, 5));
        assert_eq!(guest.compare_set("a", b"two", b"three", soon()).unwrap(), b"one");
        assert_eq!(guest.compare_set("a", b"one", b"three", soon()).unwrap(), b"three");
        assert_eq!(host.get("a", soon()).unwrap(), b"three");
    }

    #[test]
    fn waiting_returns_values_or_names_missing_keys() {
        let (host, guest) = pair();
        std::thread::scope(|s| {
            s.spawn(|| {
                std::thread::sleep(Duration::from_millis(100));
                host.set("late", b"here", soon()).unwrap();
            });
            assert_eq!(guest.get("late", soon()).unwrap(), b"here");
        });
        let error = guest.wait(&["late", "never"], Instant::now() + Duration::from_millis(200)).unwrap_err();
        assert!(error.to_string().ends_with("still missing at the deadline: never"), "{error}");
        // The store is still usable.
        guest.set("b", b"x", soon()).unwrap();
    }

    #[test]
    fn failed_and_silent_hosts_are_errors_in_time() {
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
        assert!(error.is_some(), "a store without its host still answers");

        // A socket that accepts connections and never answers.
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
