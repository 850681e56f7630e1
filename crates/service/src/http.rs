//! JSON over HTTP(S), as far as clients here need it: bounded bodies, no redirects, no proxies from the environment, TLS by
//! rustls with the system's roots.

use std::borrow::Cow;
use std::path::Path;
use std::time::Duration;

use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, RETRY_AFTER};
use unveil_core::{Secret, redact};

/// Largest answer that is read, in bytes.
pub const ANSWER_LIMIT: usize = 4 << 20;

/// What an HTTP server answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpAnswer {
    /// Status code.
    pub code: u16,
    /// Body, whole.
    pub body: Vec<u8>,
    /// `Retry-After` where it is a number of seconds.
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
    /// A client for `url`; `key` goes along as bearer token, `ca` names a PEM file of authorities trusted beside the system's.
    ///
    /// # Errors
    /// What is wrong with the URL, the key or the file, in words.
    pub fn new(url: &str, key: Option<Secret>, ca: Option<&Path>) -> Result<Self, String> {
        let url: reqwest::Url = url.parse().map_err(|e| format!("{e}; write http(s)://host[:port]/path"))?;
        if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
            return Err("it is no HTTP address; write http(s)://host[:port]/path".to_owned());
        }
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(key) = &key {
            let bearer = HeaderValue::from_str(&format!("Bearer {}", key.reveal()));
            let mut bearer = bearer.map_err(|_| "the key holds characters that no header can carry".to_owned())?;
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
                .map_err(|e| format!("{} is no PEM file of certificates: {e}", path.display()))?;
            builder = builder.tls_certs_merge(certificates);
        }
        let client = builder.build().map_err(|e| crate::client::chain(&e))?;
        Ok(Self { url, client, key })
    }

    /// Posts `body`; any status is an answer. It waits as long as the server does: bound it with a timeout.
    ///
    /// # Errors
    /// The connection failed or broke, or the answer is larger than [`ANSWER_LIMIT`]; in words, without the key.
    pub async fn post(&self, body: String) -> Result<HttpAnswer, String> {
        let failed = |e: reqwest::Error| self.scrub(&crate::client::chain(&e.without_url())).into_owned();
        let mut response = self.client.post(self.url.clone()).body(body).send().await.map_err(failed)?;
        let seconds = response.headers().get(RETRY_AFTER).and_then(|v| v.to_str().ok()?.trim().parse::<f64>().ok());
        let retry_after = seconds.and_then(|s| Duration::try_from_secs_f64(s).ok());
        let code = response.status().as_u16();
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(failed)? {
            if body.len() + chunk.len() > ANSWER_LIMIT {
                return Err(format!("the answer is larger than {ANSWER_LIMIT} bytes"));
            }
            body.extend_from_slice(&chunk);
        }
        // A peer that says a secret back gets it into no answer that is kept.
        let clean = match self.scrub(&String::from_utf8_lossy(&body)) {
            Cow::Owned(clean) => Some(clean),
            Cow::Borrowed(_) => None,
        };
        if let Some(clean) = clean {
            body = clean.into_bytes();
        }
        Ok(HttpAnswer { code, body, retry_after })
    }

    /// The beginning of a body, for messages: at most 200 characters on one line, without the key.
    pub fn excerpt(&self, body: &[u8]) -> String {
        let text = String::from_utf8_lossy(&body[..body.len().min(4096)]);
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        self.scrub(&text).chars().filter(|c| !c.is_control()).take(200).collect()
    }

    /// Without the key, however short it is, and without all other secrets that are known here.
    fn scrub<'a>(&self, text: &'a str) -> Cow<'a, str> {
        let key = self.key.as_ref().filter(|k| !k.reveal().is_empty() && text.contains(k.reveal()));
        let own = key.map_or(Cow::Borrowed(text), |k| Cow::Owned(k.scrub(text)));
        let other = match redact(&own) {
            Cow::Owned(clean) => Some(clean),
            Cow::Borrowed(_) => None,
        };
        other.map_or(own, Cow::Owned)
    }
}
