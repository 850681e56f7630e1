//! An HTTP proxy in front of an object store that injects faults: errors, silence, truncated and lost answers, delays.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::loopback::AcceptLoop;

/// A request to the store.
#[derive(Debug, Clone)]
pub struct StoreCall {
    /// Number of earlier requests.
    pub number: usize,
    /// `GET`, `PUT`…
    pub method: String,
    /// Path and query of the URL.
    pub path: String,
    /// Whether it writes only if the object does not exist (`If-None-Match: *`).
    pub conditional: bool,
}

/// Fault that is injected into a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreFault {
    /// The store is not called; the answer is this status with this S3 error code.
    Status(u16, &'static str),
    /// There is no answer for this time, or until the faults change; then the connection closes.
    Silence(Duration),
    /// The answer breaks off in the middle.
    TruncatedAnswer,
    /// The request is forwarded after this time.
    Delay(Duration),
    /// The store executes the request, but the connection closes before the answer.
    LostAnswer,
}

type FaultRule = dyn Fn(&StoreCall) -> Option<StoreFault> + Send + Sync;

struct Shared {
    target: String,
    rule: Mutex<Arc<FaultRule>>,
    /// Number of changes of the fault rule.
    generation: AtomicUsize,
    calls: AtomicUsize,
    faulted: AtomicUsize,
    stop: Arc<AtomicBool>,
    /// Serialises conditional writes, which are atomic in S3; s3s-fs 0.14 checks first and writes afterwards.
    conditional: Mutex<()>,
}

/// The running proxy, stopped on drop.
pub struct StoreProxy {
    connections: AcceptLoop,
    shared: Arc<Shared>,
}

impl std::fmt::Debug for StoreProxy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StoreProxy").field("target", &self.shared.target).finish_non_exhaustive()
    }
}

impl StoreProxy {
    /// Serves the store at `endpoint` (`http://host:port`) on a free loopback port.
    pub fn start(endpoint: &str) -> Self {
        let shared = Arc::new(Shared {
            target: endpoint.trim_start_matches("http://").trim_end_matches('/').to_owned(),
            rule: Mutex::new(Arc::new(|_| None)),
            generation: AtomicUsize::new(0),
            calls: AtomicUsize::new(0),
            faulted: AtomicUsize::new(0),
            stop: Arc::default(),
            conditional: Mutex::new(()),
        });
        let state = shared.clone();
        let connections = AcceptLoop::start(shared.stop.clone(), move |client| serve(&client, &state));
        Self { connections, shared }
    }

    /// Returns the URL, `http://127.0.0.1:port`.
    pub fn url(&self) -> String {
        format!("http://{}", self.connections.address())
    }

    /// Sets the rule that decides on a fault for each request; it is called from any thread.
    pub fn inject_faults(&self, rule: impl Fn(&StoreCall) -> Option<StoreFault> + Send + Sync + 'static) {
        *self.shared.rule.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(rule);
        self.shared.generation.fetch_add(1, Ordering::Relaxed);
    }

    /// Stops injecting faults.
    pub fn clear_faults(&self) {
        self.inject_faults(|_| None);
    }

    /// Returns the number of requests with a fault so far.
    pub fn faulted_requests(&self) -> usize {
        self.shared.faulted.load(Ordering::Relaxed)
    }
}

/// A request as received, forwarded unchanged because its signature covers the head.
struct RawRequest {
    call: StoreCall,
    head: Vec<u8>,
    body: Vec<u8>,
}

fn serve(client: &TcpStream, shared: &Shared) {
    let mut reader = BufReader::new(client);
    while let Some(request) = read_request(&mut reader, &shared.calls) {
        let (rule, generation) = {
            let rule = shared.rule.lock().unwrap_or_else(PoisonError::into_inner);
            (rule.clone(), shared.generation.load(Ordering::Relaxed))
        };
        let fault = rule(&request.call);
        shared.faulted.fetch_add(usize::from(fault.is_some()), Ordering::Relaxed);
        let wait = |limit: Duration| {
            let until = Instant::now() + limit;
            let same =
                || shared.generation.load(Ordering::Relaxed) == generation && !shared.stop.load(Ordering::Relaxed);
            while Instant::now() < until && same() {
                std::thread::sleep(Duration::from_millis(10));
            }
        };
        let forward = || {
            let guard =
                request.call.conditional.then(|| shared.conditional.lock().unwrap_or_else(PoisonError::into_inner));
            let answer = call_store(&shared.target, &request);
            drop(guard);
            answer
        };
        match fault {
            Some(StoreFault::Status(code, name)) => {
                let body =
                    format!("<?xml version=\"1.0\"?><Error><Code>{name}</Code><Message>for a test</Message></Error>");
                let body = if request.call.method == "HEAD" { String::new() } else { body };
                let head = format!(
                    "HTTP/1.1 {code} x\r\ncontent-type: application/xml\r\ncontent-length: {}\r\n\r\n",
                    body.len()
                );
                if (&mut &*client).write_all(&[head.as_bytes(), body.as_bytes()].concat()).is_err() {
                    return;
                }
                continue;
            }
            Some(StoreFault::Silence(time)) => wait(time),
            Some(StoreFault::LostAnswer) => drop(forward()),
            Some(StoreFault::TruncatedAnswer) => {
                let answer = forward().unwrap_or_default();
                let head = answer.windows(4).position(|w| w == b"\r\n\r\n").map_or(answer.len(), |start| start + 4);
                // Nothing is sent of an answer without a body.
                let end = if head == answer.len() { 0 } else { head + (answer.len() - head) / 2 };
                drop((&mut &*client).write_all(&answer[..end]));
            }
            Some(StoreFault::Delay(time)) => {
                wait(time);
                drop(forward().and_then(|answer| (&mut &*client).write_all(&answer)));
            }
            None => drop(forward().and_then(|answer| (&mut &*client).write_all(&answer))),
        }
        // The store closes its connection after each answer, and the forwarded answer announces that.
        return;
    }
}

/// Reads a request; `None` if the client closed the connection.
fn read_request(reader: &mut impl BufRead, calls: &AtomicUsize) -> Option<RawRequest> {
    let mut head = Vec::new();
    let mut line = Vec::new();
    let mut length = 0;
    let mut conditional = false;
    loop {
        line.clear();
        reader.read_until(b'\n', &mut line).ok().filter(|n| *n > 0)?;
        if line.iter().all(|b| matches!(b, b'\r' | b'\n')) {
            break;
        }
        if let Some((name, value)) = String::from_utf8_lossy(&line).split_once(':') {
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = value.trim().parse().ok()?,
                "if-none-match" => conditional = true,
                _ => {}
            }
        }
        head.extend_from_slice(&line);
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let first = String::from_utf8_lossy(head.split(|b| *b == b'\n').next()?).into_owned();
    let mut words = first.split_whitespace().map(str::to_owned);
    let method = words.next()?;
    let path = words.next()?;
    let number = calls.fetch_add(1, Ordering::Relaxed);
    Some(RawRequest { call: StoreCall { number, method, path, conditional }, head, body })
}

/// Sends a request to the store and reads until it closes the connection.
fn call_store(target: &str, request: &RawRequest) -> std::io::Result<Vec<u8>> {
    let mut server = TcpStream::connect(target)?;
    server.set_nodelay(true)?;
    server.write_all(&request.head)?;
    server.write_all(b"connection: close\r\n\r\n")?;
    server.write_all(&request.body)?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer)?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// Starts a store that answers each connection once, with the path and body of the request.
    fn store() -> (String, Arc<AtomicUsize>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let calls = Arc::new(AtomicUsize::new(0));
        let count = calls.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let Some(request) = read_request(&mut BufReader::new(&stream), &count) else { continue };
                let body = format!("{} {}", request.call.path, String::from_utf8_lossy(&request.body));
                let answer = format!("HTTP/1.1 200 x\r\ncontent-length: {}\r\n\r\n{body}", body.len());
                (&mut &stream).write_all(answer.as_bytes()).unwrap();
            }
        });
        (format!("http://{address}"), calls)
    }

    /// Sends a conditional write, and reads until the connection closes or is silent for two seconds.
    fn put(proxy: &StoreProxy) -> String {
        let mut stream = TcpStream::connect(proxy.connections.address()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        let request = "PUT /b/k?x=1 HTTP/1.1\r\nHost: h\r\nIf-None-Match: *\r\nContent-Length: 4\r\n\r\nbody";
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    #[test]
    fn faults_happen_and_end() {
        let (url, calls) = store();
        let calls = || calls.load(Ordering::Relaxed);
        let proxy = StoreProxy::start(&url);
        let whole = "HTTP/1.1 200 x\r\ncontent-length: 13\r\n\r\n/b/k?x=1 body";
        assert_eq!(put(&proxy), whole);

        let inject = |fault| {
            proxy.inject_faults(move |c| (c.conditional && c.method == "PUT" && c.path == "/b/k?x=1").then_some(fault))
        };
        inject(StoreFault::Status(503, "SlowDown"));
        let answer = put(&proxy);
        assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("<Code>SlowDown</Code>"), "{answer}");
        inject(StoreFault::Silence(Duration::from_millis(200)));
        let started = Instant::now();
        assert_eq!(put(&proxy), "");
        assert!(started.elapsed() >= Duration::from_millis(200));
        assert_eq!((calls(), proxy.faulted_requests()), (1, 2), "the store was not called");

        inject(StoreFault::TruncatedAnswer);
        assert_eq!(put(&proxy), whole[..whole.len() - 7]);
        inject(StoreFault::LostAnswer);
        assert_eq!(put(&proxy), "");
        inject(StoreFault::Delay(Duration::from_millis(200)));
        let started = Instant::now();
        assert_eq!(put(&proxy), whole);
        assert!(started.elapsed() >= Duration::from_millis(200));
        assert_eq!((calls(), proxy.faulted_requests()), (4, 5), "the store was called");
        proxy.clear_faults();
        assert_eq!(put(&proxy), whole);
    }
}
