//! The metrics page in Prometheus text format, over HTTP or, if the role uses TLS, HTTPS.

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

use crate::serve::{check_exposure, with_tls};
use crate::{ServerTls, ServiceAccess, ServiceError, bind};

/// Serves `/metrics` on `listen` in the background until `shutdown` and returns the bound address. `refresh` runs before each page, for
/// values that are sampled rather than counted. Readers need neither token nor certificate, because the page contains no data.
///
/// # Errors
/// See [`bind`]; also returns [`ServiceError::Exposed`] for a non-loopback address without TLS, unless `access` allows it.
pub async fn serve_metrics(
    listen: &str,
    registry: Arc<Registry>,
    refresh: impl Fn() + Send + Sync + 'static,
    access: &ServiceAccess,
    shutdown: CancellationToken,
) -> Result<SocketAddr, ServiceError> {
    let (listener, address) = bind(listen).await?;
    let tls = access.tls.as_ref().map(|t| ServerTls { client_ca: None, ..t.clone() });
    check_exposure(address, tls.is_some(), access.insecure)?;
    let server = with_tls(Server::builder().accept_http1(true), tls.as_ref())?;
    let refresh = Arc::new(refresh);
    let page = move || {
        let registry = Arc::clone(&registry);
        let refresh = Arc::clone(&refresh);
        async move {
            refresh();
            let mut text = String::new();
            match encode(&mut text, &registry) {
                Ok(()) => {
                    let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
                    ([(CONTENT_TYPE, content_type)], text).into_response()
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
            tracing::warn!(%address, "metrics page failed: {e}");
        }
    });
    Ok(address)
}
