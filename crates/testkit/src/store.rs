//! An HTTP proxy in front of an object store that does what stores do on bad days: errors, silence, halves of answers, slowness.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A request to the store.
#[derive(Debug, Clone)]
pub struct StoreCall {
    /// How many came before it.
    pub number: usize,
    /// `GET`, `PUT`…
    pub method: String,
    /// Path and query of its URL.
    pub path: String,
    /// It is to write only where nothing is.
    pub only_new: bool,
}

/// What is done to a request instead of passing it on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreFault {
    /// The store is not asked; the answer is this status with this S3 error code.
    Status(u16, &'static str),
    /// No answer for so long, or until the faults are over; then the connection closes.
    Silence(Duration),
    /// The answer breaks off in its middle.
    Half,
    /// The request is passed on after a wait.
    Late(Duration),
    /// The store does it, but the connection closes before its answer.
    LostAnswer,
}

type Decide = dyn Fn(&StoreCall) -> Option<StoreFault> + Send + Sync;

struct Shared {
    target: String,
    decide: Mutex<Arc<Decide>>,
    /// Counted up by each change of the faults.
    era: AtomicUsize,
    calls: AtomicUsize,
    met: AtomicUsize,
    stop: AtomicBool,
    /// S3 makes conditional writes atomic. s3s-fs 0.14 looks first and writes then, so they go to it one at a time.
    only_new: Mutex<()>,
}

/// The running proxy; it ends when dropped.
pub struct StoreProxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl StoreProxy {
    /// Serves on a free port of the loopback what the store at `endpoint` (`http://host:port`) has.
    pub fn start(endpoint: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port on the loopback");
        let address = listener.local_addr().expect("a bound listener has an address");
        let shared = Arc::new(Shared {
            target: endpoint.trim_start_matches("http://").trim_end_matches('/').to_owned(),
            decide: Mutex::new(Arc::new(|_| None)),
            era: AtomicUsize::new(0),
            calls: AtomicUsize::new(0),
            met: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            only_new: Mutex::new(()),
        });
        let known = shared.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if known.stop.load(Ordering::Relaxed) {
                    return;
                }
                let shared = known.clone();
                std::thread::spawn(move || serve(&client, &shared));
            }
        });
        Self { address, shared }
    }

    /// `http://127.0.0.1:port`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// From here on `decide` says what happens to each request. It is asked from any thread.
    pub fn fail(&self, decide: impl Fn(&StoreCall) -> Option<StoreFault> + Send + Sync + 'static) {
        *self.shared.decide.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(decide);
        self.shared.era.fetch_add(1, Ordering::Relaxed);
    }

    /// All is well from here on.
    pub fn heal(&self) {
        self.fail(|_| None);
    }

    /// Requests so far that something was done to.
    pub fn met(&self) -> usize {
        self.shared.met.load(Ordering::Relaxed)
    }
}

impl Drop for StoreProxy {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        // Wakes the accepting thread, so that it sees the flag.
        drop(TcpStream::connect(self.address));
    }
}

/// One request as it came in, to be passed on byte by byte: its signature covers the head.
struct Raw {
    call: StoreCall,
    head: Vec<u8>,
    body: Vec<u8>,
}

fn serve(client: &TcpStream, shared: &Shared) {
    let mut reader = BufReader::new(client);
    while let Some(raw) = read(&mut reader, &shared.calls) {
        let (decide, era) = {
            let decide = shared.decide.lock().unwrap_or_else(PoisonError::into_inner);
            (decide.clone(), shared.era.load(Ordering::Relaxed))
        };
        let fault = decide(&raw.call);
        shared.met.fetch_add(usize::from(fault.is_some()), Ordering::Relaxed);
        let wait = |most: Duration| {
            let until = Instant::now() + most;
            let same = || shared.era.load(Ordering::Relaxed) == era && !shared.stop.load(Ordering::Relaxed);
            while Instant::now() < until && same() {
                std::thread::sleep(Duration::from_millis(10));
            }
        };
        let pass = || {
            let only_one = raw.call.only_new.then(|| shared.only_new.lock().unwrap_or_else(PoisonError::into_inner));
            let answer = ask(&shared.target, &raw);
            drop(only_one);
            answer
        };
        match fault {
            Some(StoreFault::Status(code, name)) => {
                let body =
                    format!("<?xml version=\"1.0\"?><Error><Code>{name}</Code><Message>for a test</Message></Error>");
                let length = if raw.call.method == "HEAD" { String::new() } else { body.clone() };
                let head = format!(
                    "HTTP/1.1 {code} x\r\ncontent-type: application/xml\r\ncontent-length: {}\r\n\r\n",
                    length.len()
                );
                if (&mut &*client).write_all(&[head.as_bytes(), length.as_bytes()].concat()).is_err() {
                    return;
                }
                continue;
            }
            Some(StoreFault::Silence(most)) => wait(most),
            Some(StoreFault::LostAnswer) => drop(pass()),
            Some(StoreFault::Half) => {
                let answer = pass().unwrap_or_default();
                let head = answer.windows(4).position(|w| w == b"\r\n\r\n").map_or(answer.len(), |at| at + 4);
                // Of an answer without a body nothing is sent at all.
                let end = if head == answer.len() { 0 } else { head + (answer.len() - head) / 2 };
                drop((&mut &*client).write_all(&answer[..end]));
            }
            Some(StoreFault::Late(by)) => {
                wait(by);
                drop(pass().and_then(|answer| (&mut &*client).write_all(&answer)));
            }
            None => drop(pass().and_then(|answer| (&mut &*client).write_all(&answer))),
        }
        // The store was told to close its connection after each answer, and the answer says so.
        return;
    }
}

fn read(reader: &mut impl BufRead, calls: &AtomicUsize) -> Option<Raw> {
    let mut head = Vec::new();
    let mut line = Vec::new();
    let (mut length, mut only_new) = (0, false);
    loop {
        line.clear();
        reader.read_until(b'\n', &mut line).ok().filter(|n| *n > 0)?;
        if line.iter().all(|b| matches!(b, b'\r' | b'\n')) {
            break;
        }
        if let Some((name, value)) = String::from_utf8_lossy(&line).split_once(':') {
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = value.trim().parse().ok()?,
                "if-none-match" => only_new = true,
                _ => {}
            }
        }
        head.extend_from_slice(&line);
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let first = String::from_utf8_lossy(head.split(|b| *b == b'\n').next()?).into_owned();
    let mut words = first.split_whitespace().map(str::to_owned);
    let (method, path) = (words.next()?, words.next()?);
    let number = calls.fetch_add(1, Ordering::Relaxed);
    Some(Raw { call: StoreCall { number, method, path, only_new }, head, body })
}

/// Asks the store, and reads until it closes the connection.
fn ask(target: &str, raw: &Raw) -> std::io::Result<Vec<u8>> {
    let mut server = TcpStream::connect(target)?;
    server.set_nodelay(true)?;
    server.write_all(&raw.head)?;
    server.write_all(b"connection: close\r\n\r\n")?;
    server.write_all(&raw.body)?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer)?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A store that answers each connection once, with what it was asked and was sent.
    fn store() -> (String, Arc<AtomicUsize>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (address, asked) = (listener.local_addr().unwrap(), Arc::new(AtomicUsize::new(0)));
        let count = asked.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let Some(raw) = read(&mut BufReader::new(&stream), &count) else { continue };
                let body = format!("{} {}", raw.call.path, String::from_utf8_lossy(&raw.body));
                let answer = format!("HTTP/1.1 200 x\r\ncontent-length: {}\r\n\r\n{body}", body.len());
                (&mut &stream).write_all(answer.as_bytes()).unwrap();
            }
        });
        (format!("http://{address}"), asked)
    }

    /// Writes `body` where nothing is, and reads until the connection closes or says nothing for two seconds.
    fn put(proxy: &StoreProxy) -> String {
        let mut stream = TcpStream::connect(proxy.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        let request = "PUT /b/k?x=1 HTTP/1.1\r\nHost: h\r\nIf-None-Match: *\r\nContent-Length: 4\r\n\r\nbody";
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    #[test]
    fn faults_happen_and_end() {
        let (url, asked) = store();
        let asked = || asked.load(Ordering::Relaxed);
        let proxy = StoreProxy::start(&url);
        let whole = "HTTP/1.1 200 x\r\ncontent-length: 13\r\n\r\n/b/k?x=1 body";
        assert_eq!(put(&proxy), whole);

        let fail =
            |fault| proxy.fail(move |c| (c.only_new && c.method == "PUT" && c.path == "/b/k?x=1").then_some(fault));
        fail(StoreFault::Status(503, "SlowDown"));
        let answer = put(&proxy);
        assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("<Code>SlowDown</Code>"), "{answer}");
        fail(StoreFault::Silence(Duration::from_millis(200)));
        let begun = Instant::now();
        assert_eq!(put(&proxy), "");
        assert!(begun.elapsed() >= Duration::from_millis(200));
        assert_eq!((asked(), proxy.met()), (1, 2), "the store was not asked");

        fail(StoreFault::Half);
        assert_eq!(put(&proxy), whole[..whole.len() - 7]);
        fail(StoreFault::LostAnswer);
        assert_eq!(put(&proxy), "");
        fail(StoreFault::Late(Duration::from_millis(200)));
        let begun = Instant::now();
        assert_eq!(put(&proxy), whole);
        assert!(begun.elapsed() >= Duration::from_millis(200));
        assert_eq!((asked(), proxy.met()), (4, 5), "the store did these");
        proxy.heal();
        assert_eq!(put(&proxy), whole);
    }
}
