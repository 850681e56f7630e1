//! A network link between two roles, as a TCP proxy in this process that can be slow, cut or silent.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::loopback::AcceptLoop;

/// Interval at which a waiting direction checks for changes.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Condition of the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NetworkCondition {
    /// Data is forwarded immediately.
    #[default]
    Normal,
    /// Every chunk of at most 16 KiB is delayed, at a limited rate.
    Slow {
        /// Delay of each chunk.
        delay: Duration,
        /// Bytes per second in each direction of a connection.
        rate: u64,
    },
    /// Existing connections are closed, new ones refused.
    Cut,
    /// Connections stay open and new ones are accepted, but no data is forwarded.
    Silent,
}

#[derive(Debug)]
struct Shared {
    condition: Mutex<NetworkCondition>,
    target: Mutex<Option<SocketAddr>>,
    /// Number of cuts so far; connections from before the last one are closed.
    cuts: AtomicU64,
    stop: Arc<AtomicBool>,
}

impl Shared {
    fn condition(&self) -> NetworkCondition {
        *lock(&self.condition)
    }

    /// Returns whether a connection from after cut number `since` must close.
    fn is_over(&self, since: u64) -> bool {
        self.stop.load(Ordering::Relaxed) || self.cuts.load(Ordering::Relaxed) != since
    }
}

/// A running proxy, stopped on drop.
#[derive(Debug)]
pub struct NetworkLink {
    connections: AcceptLoop,
    shared: Arc<Shared>,
}

impl NetworkLink {
    /// Listens on a free loopback port. Without a target, connections are closed immediately.
    pub fn start(target: Option<SocketAddr>) -> Self {
        let shared = Arc::new(Shared {
            condition: Mutex::default(),
            target: Mutex::new(target),
            cuts: AtomicU64::new(0),
            stop: Arc::default(),
        });
        let state = shared.clone();
        let connections = AcceptLoop::start(shared.stop.clone(), move |client| serve(&client, &state));
        Self { connections, shared }
    }

    /// Returns the listen address.
    pub fn address(&self) -> SocketAddr {
        self.connections.address()
    }

    /// Redirects new connections to `target`.
    pub fn redirect_to(&self, target: SocketAddr) {
        *lock(&self.shared.target) = Some(target);
    }

    /// Changes the condition of existing and new connections.
    pub fn set(&self, condition: NetworkCondition) {
        *lock(&self.shared.condition) = condition;
        if condition == NetworkCondition::Cut {
            self.shared.cuts.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serves one connection.
fn serve(client: &TcpStream, shared: &Shared) {
    let since = shared.cuts.load(Ordering::Relaxed);
    while shared.condition() == NetworkCondition::Silent && !shared.is_over(since) {
        std::thread::sleep(POLL_INTERVAL);
    }
    let target = *lock(&shared.target);
    if shared.condition() == NetworkCondition::Cut || shared.is_over(since) {
        return;
    }
    let Some(server) = target.and_then(|t| TcpStream::connect_timeout(&t, Duration::from_secs(2)).ok()) else {
        return;
    };
    for socket in [client, &server] {
        let _ = socket.set_nodelay(true);
        let _ = socket.set_read_timeout(Some(POLL_INTERVAL));
    }
    std::thread::scope(|s| {
        s.spawn(|| forward(client, &server, shared, since));
        forward(&server, client, shared, since);
    });
}

/// Forwards bytes in one direction until either end closes or the link is cut.
fn forward(mut from: &TcpStream, mut to: &TcpStream, shared: &Shared, since: u64) {
    let mut buffer = vec![0; 16 << 10];
    loop {
        if shared.is_over(since) {
            break;
        }
        if shared.condition() == NetworkCondition::Silent {
            std::thread::sleep(POLL_INTERVAL);
            continue;
        }
        let count = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {
                continue;
            }
            Err(_) => break,
        };
        let mut wait = Duration::ZERO;
        if let NetworkCondition::Slow { delay, rate } = shared.condition() {
            wait = delay + Duration::from_secs_f64(count as f64 / rate.max(1) as f64);
        }
        let until = Instant::now() + wait;
        // Data that arrived before the link fell silent is held back too.
        while (Instant::now() < until || shared.condition() == NetworkCondition::Silent) && !shared.is_over(since) {
            std::thread::sleep(
                until.saturating_duration_since(Instant::now()).clamp(Duration::from_millis(1), POLL_INTERVAL),
            );
        }
        if shared.is_over(since) || to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// Starts a server that echoes its input.
    fn echo() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                std::thread::spawn(move || std::io::copy(&mut &stream, &mut &stream));
            }
        });
        address
    }

    fn connect(link: &NetworkLink) -> TcpStream {
        let stream = TcpStream::connect(link.address()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        stream
    }

    /// Sends `text` and reads the echo.
    fn round_trip(mut stream: &TcpStream, text: &[u8]) -> std::io::Result<Vec<u8>> {
        stream.write_all(text)?;
        let mut back = vec![0; text.len()];
        stream.read_exact(&mut back).map(|()| back)
    }

    #[test]
    fn the_condition_controls_the_traffic() {
        let link = NetworkLink::start(None);
        assert!(round_trip(&connect(&link), b"no target").is_err(), "there is no target yet");
        link.redirect_to(echo());
        let stream = connect(&link);
        assert_eq!(round_trip(&stream, b"hello").unwrap(), b"hello");

        link.set(NetworkCondition::Slow { delay: Duration::from_millis(100), rate: 10_000 });
        let started = Instant::now();
        assert_eq!(round_trip(&stream, &[7; 1000]).unwrap(), [7; 1000]);
        // In each direction: the delay, and a tenth of a second for the bytes.
        assert!(started.elapsed() >= Duration::from_millis(400), "{:?}", started.elapsed());

        link.set(NetworkCondition::Silent);
        std::thread::sleep(2 * POLL_INTERVAL);
        stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        assert!(round_trip(&stream, b"lost?").is_err());
        link.set(NetworkCondition::Normal);
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut late = [0; 5];
        (&stream).read_exact(&mut late).unwrap();
        assert_eq!(&late, b"lost?", "held back data arrives");

        link.set(NetworkCondition::Cut);
        assert!(round_trip(&stream, b"cut").is_err());
        assert!(round_trip(&connect(&link), b"cut").is_err());
        link.set(NetworkCondition::Normal);
        assert_eq!(round_trip(&connect(&link), b"back").unwrap(), b"back");
    }
}
