//! The caller's side: scores, or breakdowns with every component masked. Never a 0 that nobody computed.

use std::sync::Arc;
use std::time::Duration;

use tonic::transport::Channel;
use unveil_core::{BoxForm, Breakdown, Component, MaskReason, Record, Secret};
use unveil_data::codec::Sizes;
use unveil_proto::v1::reward_client::RewardClient as Generated;
use unveil_proto::{box_form_to_wire, breakdown_from_wire, v1};
use unveil_service::{Backoff, ClientOptions, authorised, carry, connect_with, limited, retry, with_deadline};

use crate::RewardError;
use crate::score::COMPONENTS;

/// A client of the reward service. Cheap to clone; clones share the connection.
#[derive(Debug, Clone)]
pub struct RewardClient {
    inner: Generated<Channel>,
    token: Option<Arc<Secret>>,
}

impl RewardClient {
    /// Connects to `http://host:port`, trying until `deadline`.
    ///
    /// # Errors
    /// The address cannot be read, or nobody answered.
    pub async fn connect(address: &str, deadline: Duration) -> Result<Self, RewardError> {
        Self::connect_with(address, &ClientOptions::default(), deadline).await
    }

    /// [`RewardClient::connect`] with TLS and a token; see [`unveil_service::client_options`].
    ///
    /// # Errors
    /// As there; also when a certificate or key cannot be used.
    pub async fn connect_with(address: &str, options: &ClientOptions, deadline: Duration) -> Result<Self, RewardError> {
        let token = options.token.clone().map(Arc::new);
        Ok(Self { token, ..Self::new(connect_with(address, options, deadline).await?) })
    }

    /// A client over an existing channel.
    pub fn new(channel: Channel) -> Self {
        Self { inner: limited!(Generated::new(channel)), token: None }
    }

    /// Scores a group; tries again while the service is away, up to `deadline`. On any failure the cause is logged and every
    /// component of every response is masked as failed. The current span goes on in the service.
    pub async fn score(&self, request: v1::ScoreRequest, deadline: Duration) -> Vec<Breakdown> {
        let id = record_id(&request.record_json);
        let indices: Vec<usize> = request.responses.iter().map(|r| r.index as usize).collect();
        let answer = retry("reward score", deadline, Backoff::default(), |left| {
            let request = carry(with_deadline(request.clone(), left), &tracing::Span::current());
            let request = authorised(request, self.token.as_deref());
            let mut client = self.inner.clone();
            async move { client.score(request?).await }
        })
        .await
        .map_err(|e| e.to_string())
        .and_then(|r| checked(&id, &indices, r.into_inner()));
        answer.unwrap_or_else(|reason| {
            tracing::warn!(group = id, "no reward, masked: {reason}");
            masked_group(&id, &indices, &reason)
        })
    }
}

/// The request for a group; `record.boxes` in pixels of the original image, those of the responses written as `boxes` says.
///
/// # Errors
/// The record cannot be written as JSON.
pub fn score_request(
    record: &Record,
    sizes: &Sizes,
    boxes: BoxForm,
    responses: Vec<v1::Response>,
) -> Result<v1::ScoreRequest, RewardError> {
    let record_json = serde_json::to_string(record).map_err(|e| RewardError::request("record_json", e.to_string()))?;
    Ok(v1::ScoreRequest {
        record_json,
        image_width: sizes.original.0,
        image_height: sizes.original.1,
        resized_width: sizes.resized.0,
        resized_height: sizes.resized.1,
        responses,
        box_form: box_form_to_wire(boxes).into(),
    })
}

/// Breakdowns of a group whose reward could not be computed.
pub fn masked_group(id: &str, indices: &[usize], reason: &str) -> Vec<Breakdown> {
    let masked = || Component::masked(MaskReason::Failed(reason.to_owned()));
    let breakdown = |&index: &usize| Breakdown {
        id: id.to_owned(),
        index,
        total: None,
        components: COMPONENTS.iter().map(|n| ((*n).to_owned(), masked())).collect(),
    };
    indices.iter().map(breakdown).collect()
}

/// The answer must speak of the responses that were sent, in their order, in finite numbers.
fn checked(id: &str, indices: &[usize], response: v1::ScoreResponse) -> Result<Vec<Breakdown>, String> {
    let out: Vec<Breakdown> = response.breakdowns.into_iter().map(|b| breakdown_from_wire(id, b)).collect();
    if !out.iter().map(|b| b.index).eq(indices.iter().copied()) {
        return Err("the reward service answered for other responses than were sent".to_owned());
    }
    let finite = |b: &Breakdown| {
        b.total.is_none_or(f64::is_finite)
            && b.components.values().all(|c| c.masked == c.value.is_none() && c.value.is_none_or(f64::is_finite))
    };
    match out.iter().find(|b| !finite(b)) {
        Some(b) => Err(format!("the reward service answered with a value that is no number (response {})", b.index)),
        None => Ok(out),
    }
}

fn record_id(record_json: &str) -> String {
    #[derive(serde::Deserialize)]
    struct Id {
        id: String,
    }
    serde_json::from_str::<Id>(record_json).map(|r| r.id).unwrap_or_default()
}
