//! Client of the reward service: returns scores, or breakdowns with every component masked; never a 0 that was not computed.

use std::sync::Arc;
use std::time::Duration;

use tonic::Code;
use tonic::transport::Channel;
use unveil_config::schema::Reward;
use unveil_core::{BoxForm, Breakdown, Component, MaskReason, Record, Secret};
use unveil_preprocess::codec::Sizes;
use unveil_proto::v1::reward_client::RewardClient as Generated;
use unveil_proto::{box_form_to_wire, breakdown_from_wire, v1};
use unveil_service::{
    Backoff, ClientOptions, ServiceError, authorize, connect_with, inject, limited, retry, with_deadline,
};

use crate::RewardError;
use crate::score::COMPONENTS;

/// Reason why a group has no scores.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unscored {
    /// The service is unreachable, overloaded, too slow, or rejects our credentials. Other groups would fail as well.
    #[error("{0}")]
    Unavailable(String),
    /// The service could not score this group, or its answer cannot be used.
    #[error("{0}")]
    Refused(String),
}

impl Unscored {
    /// Classifies a failed call.
    fn from_error(e: &ServiceError) -> Self {
        match e {
            ServiceError::Call { status, .. } if !is_unavailable(status.code()) => Self::Refused(e.to_string()),
            _ => Self::Unavailable(e.to_string()),
        }
    }

    /// Returns the reason for the mask of each component.
    fn mask_reason(&self) -> MaskReason {
        match self {
            Self::Unavailable(why) => MaskReason::Unavailable(why.clone()),
            Self::Refused(why) => MaskReason::Failed(why.clone()),
        }
    }
}

/// Whether a status code reports that the service could not be reached or refused the caller, not that the request is bad.
pub(crate) fn is_unavailable(code: Code) -> bool {
    use Code::{Aborted, Cancelled, DeadlineExceeded, PermissionDenied, ResourceExhausted, Unauthenticated};
    matches!(
        code,
        Aborted
            | Cancelled
            | DeadlineExceeded
            | PermissionDenied
            | ResourceExhausted
            | Unauthenticated
            | Code::Unavailable
            | Code::Unimplemented
            | Code::Unknown
    )
}

/// A client of the reward service. Cheap to clone; clones share the connection.
#[derive(Debug, Clone)]
pub struct RewardClient {
    inner: Generated<Channel>,
    token: Option<Arc<Secret>>,
}

impl RewardClient {
    /// Connects to `http://host:port`, retrying until `deadline`.
    ///
    /// # Errors
    /// Returns [`RewardError::Service`] if the address is invalid or no server answers.
    pub async fn connect(address: &str, deadline: Duration) -> Result<Self, RewardError> {
        Self::connect_with(address, &ClientOptions::default(), deadline).await
    }

    /// [`RewardClient::connect`] with TLS and a token; see [`unveil_service::client_options`].
    ///
    /// # Errors
    /// Returns [`RewardError::Service`] if the address, a certificate or a key cannot be used, or no server answers.
    pub async fn connect_with(address: &str, options: &ClientOptions, deadline: Duration) -> Result<Self, RewardError> {
        let token = options.token.clone().map(Arc::new);
        Ok(Self { token, ..Self::new(connect_with(address, options, deadline).await?) })
    }

    /// Creates a client over an existing channel.
    pub fn new(channel: Channel) -> Self {
        Self { inner: limited!(Generated::new(channel)), token: None }
    }

    /// Limits messages in both directions to `bytes`, the limit of the service.
    pub fn with_message_limit(self, bytes: usize) -> Self {
        Self { inner: limited!(self.inner, bytes), token: self.token }
    }

    /// Scores a group as [`RewardClient::try_score`]; on failure, every component of every response is masked with the cause.
    pub async fn score(&self, request: v1::ScoreRequest, deadline: Duration) -> Vec<Breakdown> {
        let id = record_id(&request.record_json);
        let indices: Vec<usize> = request.responses.iter().map(|r| r.index as usize).collect();
        self.try_score(request, deadline).await.unwrap_or_else(|e| {
            tracing::warn!(group = id, "reward unavailable, components masked: {e}");
            masked_group(&id, &indices, &e.mask_reason())
        })
    }

    /// Scores a group, retrying up to `deadline` while the service is unavailable. The service continues the current tracing span.
    ///
    /// # Errors
    /// Returns [`Unscored::Unavailable`] if the service does not answer in time or rejects the caller, and [`Unscored::Refused`] if it
    /// cannot score this group or its answer is inconsistent.
    pub async fn try_score(&self, request: v1::ScoreRequest, deadline: Duration) -> Result<Vec<Breakdown>, Unscored> {
        let id = record_id(&request.record_json);
        let indices: Vec<usize> = request.responses.iter().map(|r| r.index as usize).collect();
        let answer = retry("reward score", deadline, Backoff::default(), |left| {
            let request = inject(with_deadline(request.clone(), left), &tracing::Span::current());
            let request = authorize(request, self.token.as_deref());
            let mut client = self.inner.clone();
            async move { client.score(request?).await }
        })
        .await
        .map_err(|e| Unscored::from_error(&e))?;
        check_answer(&id, &indices, answer.into_inner()).map_err(Unscored::Refused)
    }

    /// Sends an empty request to check whether the service answers and accepts our credentials.
    ///
    /// # Errors
    /// Returns [`Unscored::Unavailable`] if it does not.
    pub async fn probe(&self, deadline: Duration) -> Result<(), Unscored> {
        match self.try_score(v1::ScoreRequest::default(), deadline).await {
            Err(unavailable @ Unscored::Unavailable(_)) => Err(unavailable),
            Ok(_) | Err(Unscored::Refused(_)) => Ok(()),
        }
    }
}

/// Builds the request for a group. `record.boxes` are in pixels of the original image; the responses write theirs in the form `boxes`.
///
/// # Errors
/// Returns [`RewardError::Request`] if the record cannot be written as JSON.
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

/// Returns the breakdowns of a group whose reward could not be computed: every component is masked with `reason`.
pub fn masked_group(id: &str, indices: &[usize], reason: &MaskReason) -> Vec<Breakdown> {
    let masked = || Component::masked(reason.clone());
    let breakdown = |&index: &usize| Breakdown {
        id: id.to_owned(),
        index,
        total: None,
        components: COMPONENTS.iter().map(|n| ((*n).to_owned(), masked())).collect(),
    };
    indices.iter().map(breakdown).collect()
}

/// Returns why a group without any reward may get one later: no weighted component has a value, and the scorer of one of them was
/// unavailable. `None` if the group has a reward, or if scoring it again would not help.
pub fn unavailable_reason(breakdowns: &[Breakdown], reward: &Reward) -> Option<String> {
    if breakdowns.iter().any(|b| b.total.is_some()) {
        return None;
    }
    let counts = |name: &str| reward.components().iter().any(|(n, weight, _)| *n == name && *weight > 0.0);
    let weighted = breakdowns.iter().flat_map(|b| &b.components).filter(|(name, _)| counts(name));
    weighted.into_iter().find_map(|(name, c)| match &c.reason {
        Some(MaskReason::Unavailable(why)) => Some(format!("`{name}`: {why}")),
        _ => None,
    })
}

/// Checks that the answer holds finite scores of exactly the responses that were sent, in their order.
fn check_answer(id: &str, indices: &[usize], response: v1::ScoreResponse) -> Result<Vec<Breakdown>, String> {
    let out: Vec<Breakdown> = response.breakdowns.into_iter().map(|b| breakdown_from_wire(id, b)).collect();
    if !out.iter().map(|b| b.index).eq(indices.iter().copied()) {
        return Err("the reward service answered for responses that were not sent".to_owned());
    }
    let finite = |b: &Breakdown| {
        b.total.is_none_or(f64::is_finite)
            && b.components.values().all(|c| c.masked == c.value.is_none() && c.value.is_none_or(f64::is_finite))
    };
    match out.iter().find(|b| !finite(b)) {
        Some(b) => Err(format!("the reward service answered with a value that is not a number (response {})", b.index)),
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
