//! A user's own scorer: another reward service over gRPC, or a JSON endpoint over HTTP.

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
use crate::client::{Unscored, is_away};
use crate::score::GroupInput;

/// Where a user's scorer is, and what to expect of it.
#[derive(Debug)]
pub struct CustomScorer {
    name: String,
    deadline: Duration,
    range: [f64; 2],
    peer: Peer,
}

#[derive(Debug)]
enum Peer {
    Grpc(RewardClient<Channel>),
    Http(HttpClient),
}

/// What an HTTP scorer answers.
#[derive(Debug, Deserialize)]
struct Scores {
    /// One per response, in order; null = could not be computed.
    scores: Vec<Option<f64>>,
    #[serde(default)]
    version: String,
}

/// Values and the version that the peer gave.
type Said = (Vec<Option<f64>>, String);

impl CustomScorer {
    /// A scorer as configured. Nothing is sent yet; needs a runtime.
    ///
    /// # Errors
    /// The address or the file of authorities cannot be used.
    pub fn new(config: &schema::Custom) -> Result<Self, RewardError> {
        let ca = Some(Path::new(&config.ca)).filter(|p| !p.as_os_str().is_empty());
        let fail = |why: String| RewardError::Named { what: format!("reward.custom `{}`", config.name), why };
        let peer = if let Some(rest) = config.address.strip_prefix("grpc") {
            // grpc:// and grpcs:// are http:// and https:// underneath.
            let channel = lazy_channel(&format!("http{rest}"), ca).map_err(|e| fail(e.to_string()))?;
            Peer::Grpc(limited!(RewardClient::new(channel)))
        } else {
            Peer::Http(HttpClient::new(&config.address, None, ca).map_err(fail)?)
        };
        let deadline = Duration::from_secs_f64(config.deadline_s);
        Ok(Self { name: config.name.clone(), deadline, range: config.range, peer })
    }

    /// Name of the component.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// One component per response, within the configured range; masked where the scorer failed, was late, or left the range.
    /// Over gRPC the scorer answers as this service does: its component of the configured name counts, else its total. Over HTTP
    /// it gets `{"name","record","responses":[{"index","text"}]}` and answers `{"scores":[number or null],"version"}`.
    pub async fn score(&self, group: &GroupInput) -> Vec<Component> {
        let said = match timeout(self.deadline, self.ask(group)).await {
            Ok(said) => said,
            Err(_) => Err(Unscored::Away(format!("no answer within {:.1} s", self.deadline.as_secs_f64()))),
        };
        let failed = |why: String| Component::masked(MaskReason::Failed(format!("{}: {why}", self.name)));
        match said {
            Err(Unscored::Refused(why)) => group.responses.iter().map(|_| failed(why.clone())).collect(),
            Err(Unscored::Away(why)) => {
                let reason = MaskReason::Unavailable(format!("{}: {why}", self.name));
                group.responses.iter().map(|_| Component::masked(reason.clone())).collect()
            }
            Ok((values, version)) => {
                let [low, high] = self.range;
                let component = |value: Option<f64>| match value {
                    None => failed("could not compute it".to_owned()),
                    Some(v) if (low..=high).contains(&v) => Component::value(v).by(format!("custom-1:{version}")),
                    Some(v) => failed(format!("the value {v} lies outside {low} to {high}")),
                };
                values.into_iter().map(component).collect()
            }
        }
    }

    async fn ask(&self, group: &GroupInput) -> Result<Said, Unscored> {
        let (values, version) = match &self.peer {
            Peer::Http(http) => self.over_http(http, group).await?,
            Peer::Grpc(client) => self.over_grpc(client.clone(), group).await?,
        };
        if values.len() != group.responses.len() {
            let what = format!("{} values for {} responses", values.len(), group.responses.len());
            return Err(Unscored::Refused(what));
        }
        Ok((values, version.chars().filter(|c| !c.is_control()).take(80).collect()))
    }

    async fn over_http(&self, http: &HttpClient, group: &GroupInput) -> Result<Said, Unscored> {
        let responses: Vec<_> = group.responses.iter().map(|r| json!({"index": r.index, "text": r.text})).collect();
        let body = json!({"name": self.name, "record": group.record, "responses": responses});
        let answer = http.post(body.to_string()).await.map_err(Unscored::Away)?;
        if answer.code != 200 {
            let what = format!("answered {}: {}", answer.code, http.excerpt(&answer.body));
            let away = matches!(answer.code, 401 | 403 | 404 | 408 | 429) || answer.code >= 500;
            return Err(if away { Unscored::Away(what) } else { Unscored::Refused(what) });
        }
        let unread = |e| Unscored::Refused(format!("the answer holds no scores: {e}"));
        let said: Scores = serde_json::from_slice(&answer.body).map_err(unread)?;
        Ok((said.scores, said.version))
    }

    async fn over_grpc(&self, mut client: RewardClient<Channel>, group: &GroupInput) -> Result<Said, Unscored> {
        let request = with_deadline(request(group).map_err(Unscored::Refused)?, self.deadline);
        let said = client.score(request).await.map_err(|s| {
            let what = format!("{:?}: {}", s.code(), s.message());
            if is_away(s.code()) { Unscored::Away(what) } else { Unscored::Refused(what) }
        });
        let said = said?.into_inner();
        let indices = said.breakdowns.iter().map(|b| b.index as usize);
        if !indices.eq(group.responses.iter().map(|r| r.index)) {
            return Err(Unscored::Refused("it answered for other responses than were sent".to_owned()));
        }
        let value = |b: &v1::Breakdown| match b.components.get(&self.name) {
            Some(c) => c.value.filter(|_| !c.masked),
            None => b.total,
        };
        Ok((said.breakdowns.iter().map(value).collect(), said.scorer_version))
    }
}

/// The group without attention, which is ours to judge.
fn request(group: &GroupInput) -> Result<v1::ScoreRequest, String> {
    let response =
        |r: &crate::ResponseInput| v1::Response { index: r.index as u32, text: r.text.clone(), ..Default::default() };
    let responses = group.responses.iter().map(response).collect();
    crate::score_request(&group.record, &group.sizes, group.boxes, responses).map_err(|e| e.to_string())
}
