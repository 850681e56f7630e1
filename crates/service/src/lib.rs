//! Building blocks of every gRPC role: serving with TLS, tokens, limits, health, reflection and a graceful end; a metrics page; channels with retry, deadlines and
//! keep-alive; the ready line; logs and traces. And a client of chat endpoints over HTTP.
//!
//! Must not know: tch, and what any service is about.

mod callers;
pub mod chat;
mod client;
mod error;
mod guard;
mod health;
mod http;
pub mod issue;
mod otlp;
mod page;
mod ready;
mod roles;
mod series;
mod serve;
mod spans;
mod tls;
mod trace;

pub use callers::Callers;
pub use client::{Backoff, ClientOptions, authorised, connect, connect_with, lazy_channel, retry, with_deadline};
pub use error::ServiceError;
pub use guard::{Guard, GuardCounts, Guarded, Place};
pub use health::{Health, READY, check_health};
pub use http::{ANSWER_LIMIT, HttpAnswer, HttpClient};
pub use page::metrics_page;
pub use ready::{Ready, announce, parse_ready};
pub use roles::{Access, client_options};
pub use series::{Series, role_registry};
pub use serve::{Running, ServeOptions, bind, cancel_on_signal, serve, start};
pub use spans::{SPANS, carried, carry, context, continues};
pub use tls::{ClientTls, PemPair, ServerTls};
pub use trace::{TraceOptions, Tracing, init_tracing};

// Callers build routes and tokens with these.
pub use prometheus_client;
pub use tokio_util::sync::CancellationToken;
pub use tonic::service::{Routes, RoutesBuilder};
#[doc(hidden)] // for `span!`
pub use tracing;

/// Largest message that is sent or taken by default, in bytes (64 MiB).
pub const MESSAGE_LIMIT: usize = unveil_core::limits::MESSAGE;

/// Bytes of one stream that may be under way unread (HTTP/2 flow control, RFC 9113 section 5.2). The default of 64 KiB stops a
/// sender of weights every few microseconds.
pub(crate) const STREAM_WINDOW: u32 = 16 << 20;

/// The same of all streams of a connection.
pub(crate) const CONNECTION_WINDOW: u32 = 32 << 20;

/// Sets the message size limit of a generated server or client, both ways: `limited!(RewardServer::new(x))`, or with a limit
/// in bytes as second argument. gRPC's own default is 4 MiB, which one group with its image and attention can exceed.
#[macro_export]
macro_rules! limited {
    ($service:expr) => {
        $crate::limited!($service, $crate::MESSAGE_LIMIT)
    };
    ($service:expr, $bytes:expr) => {{
        let bytes: usize = $bytes;
        $service.max_decoding_message_size(bytes).max_encoding_message_size(bytes)
    }};
}
