//! Building blocks of every gRPC role: serving with TLS, tokens, limits, health, reflection and graceful shutdown; a metrics page; channels
//! with retry, deadlines and keep-alive; the ready line; logs and traces. Also a client for chat endpoints over HTTP.
//!
//! Must not depend on: tch, and what the individual services do.
//!
//! # Examples
//! A server on loopback, and its health:
//! ```
//! use std::time::Duration;
//! use unveil_service::{CancellationToken, Routes, ServeOptions, check_health, start};
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), unveil_service::ServiceError> {
//! let shutdown = CancellationToken::new();
//! let options = ServeOptions { health_names: vec!["unveil.v1.Reward"], ..ServeOptions::default() };
//! let server = start("127.0.0.1:0", Routes::default(), options, shutdown.clone()).await?;
//!
//! let address = server.address.to_string();
//! let limit = Duration::from_secs(10);
//! assert!(check_health(&address, "unveil.v1.Reward", limit).await?);
//! assert!(!check_health(&address, "unveil.v1.Unknown", limit).await?);
//!
//! shutdown.cancel();
//! server.wait().await?;
//! # Ok(())
//! # }
//! ```

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
pub use client::{Backoff, ClientOptions, authorize, connect, connect_with, lazy_channel, retry, with_deadline};
pub use error::ServiceError;
pub use guard::{CallPermit, Guard, GuardCounts, Guarded};
pub use health::{Health, READY, check_health};
pub use http::{HttpClient, HttpResponse, MAX_RESPONSE_BYTES};
pub use page::serve_metrics;
pub use ready::{Ready, announce, parse_ready};
pub use roles::{ServiceAccess, client_options};
pub use series::{Series, role_registry};
pub use serve::{RunningServer, ServeOptions, bind, cancel_on_signal, serve, start};
pub use spans::{SPAN_TARGET, extract, inject, set_remote_parent, traceparent};
pub use tls::{ClientTls, PemPair, ServerTls};
pub use trace::{TraceOptions, Tracing, init_tracing};

// Re-exported because callers build routes and tokens with them.
pub use prometheus_client;
pub use tokio_util::sync::CancellationToken;
pub use tonic::service::{Routes, RoutesBuilder};
#[doc(hidden)] // for `span!`
pub use tracing;

/// Default maximum size of a sent or received message in bytes (64 MiB).
pub const MAX_MESSAGE_BYTES: usize = unveil_core::limits::MAX_MESSAGE_BYTES;

/// Flow-control window of a stream in bytes (RFC 9113 section 5.2). With the default of 64 KiB a sender of weights would stall every few
/// microseconds.
pub(crate) const STREAM_WINDOW: u32 = 16 << 20;

/// Flow-control window of a connection in bytes, shared by all of its streams.
pub(crate) const CONNECTION_WINDOW: u32 = 32 << 20;

/// Sets the message size limit of a generated server or client in both directions: `limited!(RewardServer::new(x))`, optionally with a
/// limit in bytes as second argument. gRPC's default of 4 MiB is too small for some groups with image and attention.
#[macro_export]
macro_rules! limited {
    ($service:expr) => {
        $crate::limited!($service, $crate::MAX_MESSAGE_BYTES)
    };
    ($service:expr, $bytes:expr) => {{
        let bytes: usize = $bytes;
        $service.max_decoding_message_size(bytes).max_encoding_message_size(bytes)
    }};
}
