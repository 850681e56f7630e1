//! The caller's side: scores, or breakdowns with every component masked. Never a 0 that nobody computed.

use std::sync::Arc;
use std::time::Duration;

use tonic::Code;
use tonic::transport::Channel;
use unveil_config::schema::Reward;
use unveil_core::{BoxForm, Breakdown, Component, MaskReason, Record, Secret};
use unveil_data::codec::Sizes;
use unveil_proto::v1::reward_client::RewardClient as Generated;
use unveil_proto::{box_form_to_wire, breakdown_from_wire, v1};
use unveil_service::{
    Backoff, ClientOptions, ServiceError, authorised, carry, connect_with, limited, retry, with_deadline,
};

use crate::RewardError;
use crate::score::COMPONENTS;

/// Why a group has no scores.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unscored {
    /// The service could not be had: it is away, overloaded, too slow, or it does not let us in. Another group would fare no better.
    #[error("{0}")]
    Away(String),
    /// The service could not score this group, or what it said cannot be used.
    #[error("{0}")]
    Refused(String),
}

impl Unscored {
    /// Of a call that failed.
    fn of(e: &ServiceError) -> Self {
        match e {
            ServiceError::Call { status, .. } if !is_away(status.code()) => Self::Refused(e.to_string()),
            _ => Self::Away(e.to_string()),
        }
    }

    /// The reason of a component that is masked for it.
    fn reason(&self) -> MaskReason {
        match self {
            Self::Away(why) => MaskReason::Unavailable(why.clone()),
            Self::Refused(why) => MaskReason::Failed(why.clone()),
        }
    }
}

/// Whether an answer says nothing about what was asked, but of the way to whoever is asked.
pub(crate) fn is_away(code: Code) -> bool {
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

    /// Sends and takes messages of so many bytes at most: what the service takes.
    pub fn at_most(self, bytes: usize) -> Self {
        Self { inner: limited!(self.inner, bytes), token: self.token }
    }

    /// [`RewardClient::try_score`] where every component of every response is masked with the cause of a failure.
    pub async fn score(&self, request: v1::ScoreRequest, deadline: Duration) -> Vec<Breakdown> {
        let id = record_id(&request.record_json);
        let indices: Vec<usize> = request.responses.iter().map(|r| r.index as usize).collect();
        self.try_score(request, deadline).await.unwrap_or_else(|e| {
            tracing::warn!(group = id, "no reward, masked: {e}");
            masked_group(&id, &indices, &e.reason())
        })
    }

    /// Scores a group; tries again while the service is away, up to `deadline`. The current span goes on in the service.
    ///
    /// # Errors
    /// There are no scores, and why.
    pub async fn try_score(&self, request: v1::ScoreRequest, deadline: Duration) -> Result<Vec<Breakdown>, Unscored> {
        let id = record_id(&request.record_json);
        let indices: Vec<usize> = request.responses.iter().map(|r| r.index as usize).collect();
        let answer = retry("reward score", deadline, Backoff::default(), |left| {
            let request = carry(with_deadline(request.clone(), left), &tracing::Span::current());
            let request = authorised(request, self.token.as_deref());
            let mut client = self.inner.clone();
            async move { client.score(request?).await }
        })
        .await
        .map_err(|e| Unscored::of(&e))?;
        checked(&id, &indices, answer.into_inner()).map_err(Unscored::Refused)
    }

    /// Asks for nothing, to see whether the service answers and lets us in.
    ///
    /// # Errors
    /// It does not, and why.
    pub async fn probe(&self, deadline: Duration) -> Result<(), Unscored> {
        match self.try_score(v1::ScoreRequest::default(), deadline).await {
            Err(away @ Unscored::Away(_)) => Err(away),
            Ok(_) | Err(Unscored::Refused(_)) => Ok(()),
        }
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

/// Why a group has no reward at all although it may have one later: nothing with a weight has a value, and somebody who computes such
/// a component could not be had. None where it has one, or where asking again would not help.
pub fn out_of_reach(breakdowns: &[Breakdown], reward: &Reward) -> Option<String> {
    if breakdowns.iter().any(|b| b.total.is_some()) {
        return None;
    }
    let counts = |name: &str| reward.components().iter().any(|(n, weight, _)| *n == name && *weight > 0.0);
    let parts = breakdowns.iter().flat_map(|b| &b.components).filter(|(name, _)| counts(name));
    parts.into_iter().find_map(|(name, c)| match &c.reason {
        Some(MaskReason::Unavailable(why)) => Some(format!("`{name}`: {why}")),
        _ => None,
    })
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
