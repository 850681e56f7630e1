//! A client for JSON over HTTP(S): bounded bodies, no redirects, no proxies from the environment, TLS by rustls with the system's root
//! certificates.

use std::borrow::Cow;
use std::path::Path;
use std::time::Duration;

use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, RETRY_AFTER};
use unveil_core::{Secret, redact};

/// Maximum size of a response body in bytes.
pub const MAX_RESPONSE_BYTES: usize = 4 << 20;

/// Response of an HTTP server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpResponse {
    /// HTTP status code.
    pub code: u16,
    /// Complete body.
    pub body: Vec<u8>,
    /// Value of `Retry-After` if it is a number of seconds.
    pub retry_after: Option<Duration>,
}

/// A client that posts JSON to one URL. Cheap to clone; clones share connections.
#[derive(Debug, Clone)]
pub struct HttpClient {
    url: reqwest::Url,
    client: reqwest::Client,
    key: Option<Secret>,
}

impl HttpClient {
    /// Creates a client for `url`. `key` is sent as bearer token; `ca` is a PEM file with authorities trusted in addition to the system's.
    ///
    /// # Errors
    /// Returns a message that says what is wrong with the URL, the key or the file.
    pub fn new(url: &str, key: Option<Secret>, ca: Option<&Path>) -> Result<Self, String> {
        let url: reqwest::Url = url.parse().map_err(|e| format!("{e}; write http(s)://host[:port]/path"))?;
        if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
            return Err("not an HTTP address; write http(s)://host[:port]/path".to_owned());
        }
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(key) = &key {
            let bearer = HeaderValue::from_str(&format!("Bearer {}", key.reveal()));
            let mut bearer =
                bearer.map_err(|_| "the key contains characters that are invalid in a header".to_owned())?;
            bearer.set_sensitive(true);
            headers.insert(AUTHORIZATION, bearer);
        }
        let mut builder = reqwest::Client::builder()
            .default_headers(headers)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .connect_timeout(Duration::from_secs(10))
            .user_agent(concat!("unveil/", env!("CARGO_PKG_VERSION")));
        if let Some(path) = ca {
            let pem = std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
            let certificates = reqwest::Certificate::from_pem_bundle(&pem)
                .map_err(|e| format!("{} is not a PEM file with certificates: {e}", path.display()))?;
            builder = builder.tls_certs_merge(certificates);
        }
        let client = builder.build().map_err(|e| crate::client::error_chain(&e))?;
        Ok(Self { url, client, key })
    }

    /// Posts `body` and returns the response with any status. There is no time limit: wrap the call in a timeout.
    ///
    /// # Errors
    /// Returns a message, without the key, if the connection fails or the response is larger than [`MAX_RESPONSE_BYTES`].
    pub async fn post(&self, body: String) -> Result<HttpResponse, String> {
        let failed = |e: reqwest::Error| self.scrub(&crate::client::error_chain(&e.without_url())).into_owned();
        let mut response = self.client.post(self.url.clone()).body(body).send().await.map_err(failed)?;
        let seconds = response.headers().get(RETRY_AFTER).and_then(|v| v.to_str().ok()?.trim().parse::<f64>().ok());
        let retry_after = seconds.and_then(|s| Duration::try_from_secs_f64(s).ok());
        let code = response.status().as_u16();
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(failed)? {
            if body.len() + chunk.len() > MAX_RESPONSE_BYTES {
                return Err(format!("the response is larger than {MAX_RESPONSE_BYTES} bytes"));
            }
            body.extend_from_slice(&chunk);
        }
        // Remove secrets that the peer may have echoed.
        let clean = match self.scrub(&String::from_utf8_lossy(&body)) {
            Cow::Owned(clean) => Some(clean),
            Cow::Borrowed(_) => None,
        };
        if let Some(clean) = clean {
            body = clean.into_bytes();
        }
        Ok(HttpResponse { code, body, retry_after })
    }

    /// Returns the beginning of a body for messages: at most 200 characters on one line, without the key.
    pub fn excerpt(&self, body: &[u8]) -> String {
        let text = String::from_utf8_lossy(&body[..body.len().min(4096)]);
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        self.scrub(&text).chars().filter(|c| !c.is_control()).take(200).collect()
    }

    /// Removes the key, however short, and all other known secrets from a text.
    fn scrub<'a>(&self, text: &'a str) -> Cow<'a, str> {
        let key = self.key.as_ref().filter(|k| !k.reveal().is_empty() && text.contains(k.reveal()));
        let without_key = key.map_or(Cow::Borrowed(text), |k| Cow::Owned(k.scrub(text)));
        let redacted = match redact(&without_key) {
            Cow::Owned(clean) => Some(clean),
            Cow::Borrowed(_) => None,
        };
        redacted.map_or(without_key, Cow::Owned)
    }
}
