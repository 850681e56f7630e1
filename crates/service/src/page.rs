//! A page of metrics in Prometheus' text format over HTTP, or HTTPS where the role speaks TLS.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

use crate::serve::{exposed, with_tls};
use crate::{Access, ServerTls, ServiceError, bind};

/// Serves `/metrics` on `listen` until `shutdown`, in the background; the bound address comes back. `refresh` runs before each
/// page, for values that are read rather than counted. Who reads it needs neither token nor certificate: there are counts on it,
/// nothing of the data.
///
/// # Errors
/// As [`bind`]; without TLS it listens on loopback only, unless `access` says otherwise.
pub async fn metrics_page(
    listen: &str,
    registry: Arc<Registry>,
    refresh: impl Fn() + Send + Sync + 'static,
    access: &Access,
    shutdown: CancellationToken,
) -> Result<SocketAddr, ServiceError> {
    let (listener, address) = bind(listen).await?;
    let tls = access.tls.as_ref().map(|t| ServerTls { client_ca: None, ..t.clone() });
    exposed(address, tls.is_some(), access.insecure)?;
    let server = with_tls(Server::builder().accept_http1(true), tls.as_ref())?;
    let refresh = Arc::new(refresh);
    let page = move || {
        let (registry, refresh) = (Arc::clone(&registry), Arc::clone(&refresh));
        async move {
            refresh();
            let mut text = String::new();
            match encode(&mut text, &registry) {
                Ok(()) => {
                    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
                    ([(CONTENT_TYPE, kind)], text).into_response()
                }
                Err(_) => axum::http::StatusCode::INTERNAL_SERVER_ERROR.into_response(),
            }
        }
    };
    let routes = Routes::from(Router::new().route("/metrics", get(page)));
    let mut server = server;
    let served =
        server.add_routes(routes).serve_with_incoming_shutdown(TcpIncoming::from(listener), shutdown.cancelled_owned());
    tokio::spawn(async move {
        if let Err(e) = served.await {
            tracing::warn!(%address, "the metrics page ended: {e}");
        }
    });
    Ok(address)
}
