//! A small scripted HTTP/1.1 server that can also misbehave: stall, drop connections, send garbage.

use std::io::{BufRead, BufReader, Read, Write};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use crate::loopback::AcceptLoop;

/// A received request.
#[derive(Debug, Clone)]
pub struct WebRequest {
    /// Number of earlier requests.
    pub number: usize,
    /// Path of the URL.
    pub path: String,
    /// Header lines, names in lower case.
    pub headers: Vec<(String, String)>,
    /// Body.
    pub body: String,
}

impl WebRequest {
    /// Returns the value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }
}

/// Reaction to a request.
#[derive(Debug, Clone)]
pub enum WebReply {
    /// Answer after `delay`.
    Answer {
        /// Delay before the answer.
        delay: Duration,
        /// Status code.
        code: u16,
        /// Additional header lines, `Name: value`.
        headers: Vec<String>,
        /// Body.
        body: Vec<u8>,
    },
    /// Close the connection without an answer.
    Drop,
    /// Announce a body, send half of it, and close.
    Truncate(Vec<u8>),
    /// Keep the connection open and never answer.
    Stall,
}

impl WebReply {
    /// Answers immediately.
    pub fn immediate(code: u16, body: impl Into<Vec<u8>>) -> Self {
        Self::delayed(Duration::ZERO, code, body)
    }

    /// Answers after `delay`.
    pub fn delayed(delay: Duration, code: u16, body: impl Into<Vec<u8>>) -> Self {
        Self::Answer { delay, code, headers: Vec::new(), body: body.into() }
    }
}

/// The running server, stopped on drop.
#[derive(Debug)]
pub struct WebServer {
    scheme: &'static str,
    connections: AcceptLoop,
    seen: Arc<Mutex<Vec<WebRequest>>>,
}

impl WebServer {
    /// Serves on a free loopback port; `act` decides on each request, from any thread.
    pub fn start(act: impl Fn(&WebRequest) -> WebReply + Send + Sync + 'static) -> Self {
        Self::open(None, act)
    }

    /// Serves like [`WebServer::start`] over TLS, with a certificate and its key (PEM files).
    pub fn start_tls(
        [certificate, key]: &[String; 2],
        act: impl Fn(&WebRequest) -> WebReply + Send + Sync + 'static,
    ) -> Self {
        let certificate = CertificateDer::from_pem_file(certificate).expect("a certificate file");
        let key = PrivateKeyDer::from_pem_file(key).expect("a key file");
        let builder = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()));
        let builder = builder.with_safe_default_protocol_versions().expect("TLS versions").with_no_client_auth();
        let config = builder.with_single_cert(vec![certificate], key).expect("a certificate and its key");
        Self::open(Some(Arc::new(config)), act)
    }

    fn open(tls: Option<Arc<ServerConfig>>, act: impl Fn(&WebRequest) -> WebReply + Send + Sync + 'static) -> Self {
        let scheme = if tls.is_some() { "https" } else { "http" };
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let count = AtomicUsize::new(0);
        let stopped = Arc::clone(&stop);
        let log = Arc::clone(&seen);
        let connections = AcceptLoop::start(stop, move |stream| match &tls {
            None => serve(stream, &act, &count, &log, &stopped),
            // A client that does not trust the certificate closes the connection; reading then ends.
            Some(tls) => {
                let connection = ServerConnection::new(Arc::clone(tls)).expect("a TLS connection");
                serve(StreamOwned::new(connection, stream), &act, &count, &log, &stopped);
            }
        });
        Self { scheme, connections, seen }
    }

    /// Returns the URL, `http://127.0.0.1:port` or `https://127.0.0.1:port`.
    pub fn url(&self) -> String {
        format!("{}://{}", self.scheme, self.connections.address())
    }

    /// Returns the requests so far.
    pub fn requests(&self) -> Vec<WebRequest> {
        self.seen.lock().expect("no test thread panicked").clone()
    }
}

fn serve(
    stream: impl Read + Write,
    act: &(dyn Fn(&WebRequest) -> WebReply + Send + Sync),
    count: &AtomicUsize,
    log: &Mutex<Vec<WebRequest>>,
    stop: &AtomicBool,
) {
    let mut reader = BufReader::new(stream);
    while let Some(mut request) = read(&mut reader) {
        request.number = count.fetch_add(1, Ordering::Relaxed);
        log.lock().expect("no test thread panicked").push(request.clone());
        let sent = match act(&request) {
            WebReply::Answer { delay, code, headers, body } => {
                std::thread::sleep(delay);
                let head: String = headers.iter().map(|h| format!("{h}\r\n")).collect();
                let head = format!("HTTP/1.1 {code} x\r\ncontent-length: {}\r\n{head}\r\n", body.len());
                let out = reader.get_mut();
                out.write_all(&[head.as_bytes(), &body].concat()).and_then(|()| out.flush()).is_ok()
            }
            WebReply::Truncate(body) => {
                let head = format!("HTTP/1.1 200 x\r\ncontent-length: {}\r\n\r\n", body.len());
                let half = &body[..body.len() / 2];
                let out = reader.get_mut();
                drop(out.write_all(&[head.as_bytes(), half].concat()).and_then(|()| out.flush()));
                false
            }
            WebReply::Drop => false,
            WebReply::Stall => {
                while !stop.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(20));
                }
                false
            }
        };
        if !sent {
            return;
        }
    }
}

fn read(reader: &mut impl BufRead) -> Option<WebRequest> {
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|n| *n > 0)?;
    let path = line.split_whitespace().nth(1)?.to_owned();
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok().filter(|n| *n > 0)?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.push((name.to_lowercase(), value.trim().to_owned()));
    }
    let length = headers.iter().find(|(n, _)| n == "content-length").and_then(|(_, v)| v.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some(WebRequest { number: 0, path, headers, body: String::from_utf8_lossy(&body).into_owned() })
}
