//! The network between two roles, as a TCP proxy in this process: slow, cut, or silent when told to.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How often a waiting direction looks whether something has changed.
const LOOK: Duration = Duration::from_millis(50);

/// What the network does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Weather {
    /// Passes everything on at once.
    #[default]
    Fine,
    /// Every piece of at most 16 KiB comes late, and no more than a rate gets through.
    Slow {
        /// Wait before each piece.
        delay: Duration,
        /// Bytes per second in each direction of a connection.
        rate: u64,
    },
    /// Connections are closed, new ones are refused.
    Cut,
    /// Connections stay open, new ones are taken, and nothing gets through.
    Silent,
}

struct Shared {
    weather: Mutex<Weather>,
    target: Mutex<Option<SocketAddr>>,
    /// Counted up by each cut: connections of an earlier count are closed.
    cuts: AtomicU64,
    stop: AtomicBool,
}

impl Shared {
    fn weather(&self) -> Weather {
        *lock(&self.weather)
    }

    fn over(&self, since: u64) -> bool {
        self.stop.load(Ordering::Relaxed) || self.cuts.load(Ordering::Relaxed) != since
    }
}

/// A running proxy; it ends when dropped.
pub struct Link {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl Link {
    /// Listens on a free port of the loopback. Without a target connections are closed at once.
    pub fn start(target: Option<SocketAddr>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port on the loopback");
        let address = listener.local_addr().expect("a bound listener has an address");
        let shared = Arc::new(Shared {
            weather: Mutex::default(),
            target: Mutex::new(target),
            cuts: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        });
        let known = shared.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if known.stop.load(Ordering::Relaxed) {
                    return;
                }
                let shared = known.clone();
                std::thread::spawn(move || connection(&client, &shared));
            }
        });
        Self { address, shared }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Leads new connections elsewhere.
    pub fn lead_to(&self, target: SocketAddr) {
        *lock(&self.shared.target) = Some(target);
    }

    /// Changes the weather, for connections that exist and for new ones.
    pub fn set(&self, weather: Weather) {
        *lock(&self.shared.weather) = weather;
        if weather == Weather::Cut {
            self.shared.cuts.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        // Wakes the accepting thread, so that it sees the flag.
        drop(TcpStream::connect(self.address));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn connection(client: &TcpStream, shared: &Shared) {
    let since = shared.cuts.load(Ordering::Relaxed);
    while shared.weather() == Weather::Silent && !shared.over(since) {
        std::thread::sleep(LOOK);
    }
    let target = *lock(&shared.target);
    if shared.weather() == Weather::Cut || shared.over(since) {
        return;
    }
    let Some(server) = target.and_then(|t| TcpStream::connect_timeout(&t, Duration::from_secs(2)).ok()) else {
        return;
    };
    for socket in [client, &server] {
        let _ = socket.set_nodelay(true);
        let _ = socket.set_read_timeout(Some(LOOK));
    }
    std::thread::scope(|s| {
        s.spawn(|| pump(client, &server, shared, since));
        pump(&server, client, shared, since);
    });
}

/// Passes bytes on in one direction until either end closes or the link is cut.
fn pump(mut from: &TcpStream, mut to: &TcpStream, shared: &Shared, since: u64) {
    let mut buffer = vec![0; 16 << 10];
    loop {
        if shared.over(since) {
            break;
        }
        if shared.weather() == Weather::Silent {
            std::thread::sleep(LOOK);
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
        if let Weather::Slow { delay, rate } = shared.weather() {
            wait = delay + Duration::from_secs_f64(count as f64 / rate.max(1) as f64);
        }
        let until = Instant::now() + wait;
        // What came in before the link fell silent is held back, too.
        while (Instant::now() < until || shared.weather() == Weather::Silent) && !shared.over(since) {
            std::thread::sleep(until.saturating_duration_since(Instant::now()).clamp(Duration::from_millis(1), LOOK));
        }
        if shared.over(since) || to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that sends back what it gets.
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

    fn connect(link: &Link) -> TcpStream {
        let stream = TcpStream::connect(link.address()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        stream
    }

    fn turn(mut stream: &TcpStream, text: &[u8]) -> std::io::Result<Vec<u8>> {
        stream.write_all(text)?;
        let mut back = vec![0; text.len()];
        stream.read_exact(&mut back).map(|()| back)
    }

    #[test]
    fn weather_changes_what_gets_through() {
        let link = Link::start(None);
        assert!(turn(&connect(&link), b"nobody").is_err(), "there is no target yet");
        link.lead_to(echo());
        let stream = connect(&link);
        assert_eq!(turn(&stream, b"hello").unwrap(), b"hello");

        link.set(Weather::Slow { delay: Duration::from_millis(100), rate: 10_000 });
        let begun = Instant::now();
        assert_eq!(turn(&stream, &[7; 1000]).unwrap(), [7; 1000]);
        // Both ways: a delay and a tenth of a second for the bytes.
        assert!(begun.elapsed() >= Duration::from_millis(400), "{:?}", begun.elapsed());

        link.set(Weather::Silent);
        std::thread::sleep(2 * LOOK);
        stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        assert!(turn(&stream, b"lost?").is_err());
        link.set(Weather::Fine);
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut late = [0; 5];
        (&stream).read_exact(&mut late).unwrap();
        assert_eq!(&late, b"lost?", "what was held back arrives");

        link.set(Weather::Cut);
        assert!(turn(&stream, b"gone").is_err());
        assert!(turn(&connect(&link), b"gone").is_err());
        link.set(Weather::Fine);
        assert_eq!(turn(&connect(&link), b"back").unwrap(), b"back");
    }
}
