//! A page of metrics in Prometheus' text format over plain HTTP, as scrapers expect it: it holds numbers, no data, and wants no token.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use tokio_util::sync::CancellationToken;

use crate::{ServiceError, bind};

/// Serves `/metrics` on `listen` until `shutdown`, in the background; the bound address comes back. `refresh` runs before each
/// page, for values that are read rather than counted.
///
/// # Errors
/// As [`bind`].
pub async fn metrics_page(
    listen: &str,
    registry: Arc<Registry>,
    refresh: impl Fn() + Send + Sync + 'static,
    shutdown: CancellationToken,
) -> Result<SocketAddr, ServiceError> {
    let (listener, address) = bind(listen).await?;
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
    let router = Router::new().route("/metrics", get(page));
    tokio::spawn(async move {
        let served = axum::serve(listener, router).with_graceful_shutdown(shutdown.cancelled_owned());
        if let Err(e) = served.await {
            tracing::warn!(%address, "the metrics page ended: {e}");
        }
    });
    Ok(address)
}
