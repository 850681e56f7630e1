//! A custom scorer run by the user: another reward service over gRPC, or a JSON endpoint over HTTP.

use std::path::Path;
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;
use tokio::time::timeout;
use tonic::transport::Channel;
use unveil_config::schema;
use unveil_core::{Component, MaskReason};
use unveil_proto::v1;
use unveil_proto::v1::reward_client::RewardClient;
use unveil_service::{HttpClient, lazy_channel, limited, with_deadline};

use crate::RewardError;
use crate::client::{Unscored, is_unavailable};
use crate::score::GroupInput;

/// Client of a custom scorer, with its deadline and range.
#[derive(Debug)]
pub struct CustomScorer {
    name: String,
    deadline: Duration,
    range: [f64; 2],
    transport: Transport,
}

#[derive(Debug)]
enum Transport {
    Grpc(RewardClient<Channel>),
    Http(HttpClient),
}

/// Answer of an HTTP scorer.
#[derive(Debug, Deserialize)]
struct HttpAnswer {
    /// One value per response, in order; null if it could not be computed.
    scores: Vec<Option<f64>>,
    #[serde(default)]
    version: String,
}

/// Values of the responses and the version that the scorer reported.
type ScoresAndVersion = (Vec<Option<f64>>, String);

impl CustomScorer {
    /// Creates the client of a configured scorer. Nothing is sent yet; needs a tokio runtime.
    ///
    /// # Errors
    /// Returns [`RewardError::Named`] if the address or the file of certificate authorities cannot be used.
    pub fn new(config: &schema::Custom) -> Result<Self, RewardError> {
        let ca = Some(Path::new(&config.ca)).filter(|p| !p.as_os_str().is_empty());
        let fail = |why: String| RewardError::Named { what: format!("reward.custom `{}`", config.name), why };
        let transport = if let Some(rest) = config.address.strip_prefix("grpc") {
            // grpc:// and grpcs:// are http:// and https:// underneath.
            let channel = lazy_channel(&format!("http{rest}"), ca).map_err(|e| fail(e.to_string()))?;
            Transport::Grpc(limited!(RewardClient::new(channel)))
        } else {
            Transport::Http(HttpClient::new(&config.address, None, ca).map_err(fail)?)
        };
        let deadline = Duration::from_secs_f64(config.deadline_s);
        Ok(Self { name: config.name.clone(), deadline, range: config.range, transport })
    }

    /// Returns the name of the component.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns one component per response, within the configured range; masked if the scorer failed, was late, or left the range.
    /// Over gRPC the scorer answers as this service does: its component of the configured name counts, else its total. Over HTTP
    /// it receives `{"name","record","responses":[{"index","text"}]}` and answers `{"scores":[number or null],"version"}`.
    pub async fn score(&self, group: &GroupInput) -> Vec<Component> {
        let answer = match timeout(self.deadline, self.request_scores(group)).await {
            Ok(answer) => answer,
            Err(_) => Err(Unscored::Unavailable(format!("no answer within {:.1} s", self.deadline.as_secs_f64()))),
        };
        let failed = |why: String| Component::masked(MaskReason::Failed(format!("{}: {why}", self.name)));
        match answer {
            Err(Unscored::Refused(why)) => group.responses.iter().map(|_| failed(why.clone())).collect(),
            Err(Unscored::Unavailable(why)) => {
                let reason = MaskReason::Unavailable(format!("{}: {why}", self.name));
                group.responses.iter().map(|_| Component::masked(reason.clone())).collect()
            }
            Ok((values, version)) => {
                let [low, high] = self.range;
                let component = |value: Option<f64>| match value {
                    None => failed("could not compute it".to_owned()),
                    Some(v) if (low..=high).contains(&v) => {
                        Component::value(v).with_version(format!("custom-1:{version}"))
                    }
                    Some(v) => failed(format!("the value {v} is outside {low} to {high}")),
                };
                values.into_iter().map(component).collect()
            }
        }
    }

    async fn request_scores(&self, group: &GroupInput) -> Result<ScoresAndVersion, Unscored> {
        let (values, version) = match &self.transport {
            Transport::Http(http) => self.request_over_http(http, group).await?,
            Transport::Grpc(client) => self.request_over_grpc(client.clone(), group).await?,
        };
        if values.len() != group.responses.len() {
            let what = format!("{} values for {} responses", values.len(), group.responses.len());
            return Err(Unscored::Refused(what));
        }
        Ok((values, version.chars().filter(|c| !c.is_control()).take(80).collect()))
    }

    async fn request_over_http(&self, http: &HttpClient, group: &GroupInput) -> Result<ScoresAndVersion, Unscored> {
        let responses: Vec<_> = group.responses.iter().map(|r| json!({"index": r.index, "text": r.text})).collect();
        let body = json!({"name": self.name, "record": group.record, "responses": responses});
        let answer = http.post(body.to_string()).await.map_err(Unscored::Unavailable)?;
        if answer.code != 200 {
            let what = format!("answered {}: {}", answer.code, http.excerpt(&answer.body));
            let unavailable = matches!(answer.code, 401 | 403 | 404 | 408 | 429) || answer.code >= 500;
            return Err(if unavailable { Unscored::Unavailable(what) } else { Unscored::Refused(what) });
        }
        let unreadable = |e| Unscored::Refused(format!("the answer has no scores: {e}"));
        let answer: HttpAnswer = serde_json::from_slice(&answer.body).map_err(unreadable)?;
        Ok((answer.scores, answer.version))
    }

    async fn request_over_grpc(
        &self,
        mut client: RewardClient<Channel>,
        group: &GroupInput,
    ) -> Result<ScoresAndVersion, Unscored> {
        let request = with_deadline(request_without_attention(group).map_err(Unscored::Refused)?, self.deadline);
        let answer = client.score(request).await.map_err(|s| {
            let what = format!("{:?}: {}", s.code(), s.message());
            if is_unavailable(s.code()) { Unscored::Unavailable(what) } else { Unscored::Refused(what) }
        });
        let answer = answer?.into_inner();
        let indices = answer.breakdowns.iter().map(|b| b.index as usize);
        if !indices.eq(group.responses.iter().map(|r| r.index)) {
            return Err(Unscored::Refused("it answered for responses that were not sent".to_owned()));
        }
        let value = |b: &v1::Breakdown| match b.components.get(&self.name) {
            Some(c) => c.value.filter(|_| !c.masked),
            None => b.total,
        };
        Ok((answer.breakdowns.iter().map(value).collect(), answer.scorer_version))
    }
}

/// Builds the request for a group without attention, which only this service scores.
fn request_without_attention(group: &GroupInput) -> Result<v1::ScoreRequest, String> {
    let response =
        |r: &crate::ResponseInput| v1::Response { index: r.index as u32, text: r.text.clone(), ..Default::default() };
    let responses = group.responses.iter().map(response).collect();
    crate::score_request(&group.record, &group.sizes, group.boxes, responses).map_err(|e| e.to_string())
}
