//! Free ports of the loopback, and a loop that accepts connections on one.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};

/// Returns an address of the loopback on which nothing listens, another one at each call. Its port is below the ephemeral range: a
/// connection could take an ephemeral port before it is listened on.
pub fn free_address() -> SocketAddr {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = 12_000 + (std::process::id() % 1_000) as u16 * 16;
    let addresses = std::iter::repeat_with(|| first + NEXT.fetch_add(1, Ordering::Relaxed) % 4_000);
    let mut free =
        addresses.take(4_000).filter_map(|port| TcpListener::bind(("127.0.0.1", port)).ok()?.local_addr().ok());
    free.next().expect("a free port on the loopback")
}

/// A thread that accepts connections on a free loopback port, stopped on drop.
#[derive(Debug)]
pub(crate) struct AcceptLoop {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
}

impl AcceptLoop {
    /// Calls `serve` with each connection, on one thread per connection, until `stop` is set.
    pub(crate) fn start(stop: Arc<AtomicBool>, serve: impl Fn(TcpStream) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port on the loopback");
        let address = listener.local_addr().expect("a bound listener has an address");
        let serve = Arc::new(serve);
        let stopped = stop.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let serve = serve.clone();
                std::thread::spawn(move || serve(client));
            }
        });
        Self { address, stop }
    }

    /// Returns the listen address.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for AcceptLoop {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Wake the accepting thread, so that it sees the flag.
        drop(TcpStream::connect(self.address));
    }
}
