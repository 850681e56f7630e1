//! What happens to one leased group: model input before generation, scores and submission after it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::OnceCell;
use tracing::{Instrument, Span};
use unveil_config::Config;
use unveil_core::{Breakdown, Finish, GroupId, Logprobs, Record, Sampling};
use unveil_data::prepare::Preparer;
use unveil_data::store::ContentHash;
use unveil_engine::random::group_key;
use unveil_engine::{GroupOutput, GroupRequest};
use unveil_proto::{attention_to_wire, breakdown_to_wire, group_from_wire, group_to_wire, response_to_wire, v1};
use unveil_reward::{RewardClient, RewardError, Scoring, masked_group, score_request};
use unveil_service::{ClientOptions, connect_with, continues, span};

use crate::engine::stop_rule;
use crate::experience::{Distrust, Experience};
use crate::text::{self, Frame};
use crate::{Result, RolloutError};

/// A leased group beside its request to the engine.
pub(crate) struct Leased {
    pub lease: String,
    group: GroupId,
    record: Record,
    frame: Frame,
    /// How its class is found in answers.
    scoring: Arc<Scoring>,
    /// Where the group's trace goes on; empty = there is none.
    traceparent: String,
}

impl Leased {
    /// A span in the trace of the group.
    pub fn span(&self, of: Step) -> Span {
        let span = match of {
            Step::Generate => span!(parent: None, "generate", record = self.record.id),
            Step::Score => span!(parent: None, "score", record = self.record.id),
            Step::Submit => span!(parent: None, "submit", record = self.record.id),
        };
        continues(&span, &self.traceparent);
        span
    }
}

/// What a worker does with a group.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Step {
    Generate,
    Score,
    Submit,
}

/// Turns a lease into a request to the engine. `question` stands in where the record has none; `scoring` finds classes in answers.
pub(crate) fn prepare(
    preparer: &Arc<Preparer>,
    lease: v1::LeasedGroup,
    question: &str,
    scoring: &Arc<Scoring>,
    address: &str,
) -> Result<(Leased, GroupRequest)> {
    let protocol = |what: String| RolloutError::Protocol { address: address.to_owned(), what };
    let group =
        group_from_wire(lease.group).map_err(|e| protocol(format!("sent a lease that does not hold together: {e}")))?;
    let record: Record = serde_json::from_str(&lease.record_json)
        .map_err(|e| protocol(format!("sent `{}`, which is not a record: {e}", group.record)))?;
    let asked = if record.question.is_empty() { question } else { &record.question };
    let name = format!("of record \"{}\"", record.id);
    let prepared = preparer
        .prepare_bytes(&lease.image, &name, asked)
        .map_err(|e| RolloutError::Prepare { record: record.id.clone(), source: Box::new(e) })?;
    let hash = ContentHash::parse(&lease.image_hash);
    let (input, frame) = text::group_input(&record.id, hash, prepared);
    let key = group_key(&[&group.pass.to_le_bytes(), &group.position.to_le_bytes(), group.record.as_bytes()]);
    let sampling = Sampling {
        n: lease.n as usize,
        temperature: lease.temperature,
        top_k: lease.top_k as usize,
        top_p: if lease.top_p > 0.0 { lease.top_p } else { 1.0 },
        min_p: lease.min_p,
        max_new_tokens: lease.max_new_tokens as usize,
        seed: lease.seed,
        logprobs: if lease.untempered { Logprobs::Untempered } else { Logprobs::Tempered },
    };
    let stop = stop_rule(preparer, &lease.stop);
    let scoring = Arc::clone(scoring);
    let leased = Leased { lease: lease.lease, group, record, frame, scoring, traceparent: lease.traceparent };
    Ok((leased, GroupRequest { input, key, sampling, stop }))
}

/// The reward service, connected to when it is first needed. Where it cannot be had, groups are masked.
pub(crate) struct Rewards {
    address: String,
    options: ClientOptions,
    deadline: Duration,
    client: OnceCell<RewardClient>,
}

impl Rewards {
    /// Errors when the address can never be one, or a certificate is not there.
    pub async fn new(address: &str, options: ClientOptions, config: &Config) -> Result<Self> {
        let deadline = Duration::from_secs_f64(config.reward.deadline_s);
        if let Err(e) = connect_with(address, &options, Duration::ZERO).await
            && e.is_permanent()
        {
            return Err(RolloutError::Service { role: "reward", address: address.to_owned(), source: Box::new(e) });
        }
        Ok(Self { address: address.to_owned(), options, deadline, client: OnceCell::new() })
    }

    /// One breakdown per response, masked when the service failed or the deadline has passed.
    async fn score(
        &self,
        id: &str,
        request: Result<v1::ScoreRequest, RewardError>,
        indices: &[usize],
    ) -> Vec<Breakdown> {
        let start = Instant::now();
        let masked = |reason: String| {
            tracing::warn!(group = id, "no reward, masked: {reason}");
            masked_group(id, indices, &reason)
        };
        let request = match request {
            Ok(request) => request,
            Err(e) => return masked(e.to_string()),
        };
        // Every group waits for the connection at the same time, none behind another.
        let connecting =
            self.client.get_or_try_init(|| RewardClient::connect_with(&self.address, &self.options, self.deadline));
        let client = match tokio::time::timeout(self.deadline, connecting).await {
            Ok(Ok(client)) => client,
            Ok(Err(e)) => return masked(e.to_string()),
            Err(_) => {
                return masked(format!(
                    "no connection to {} within {:.1} s",
                    self.address,
                    self.deadline.as_secs_f64()
                ));
            }
        };
        client.score(request, self.deadline.saturating_sub(start.elapsed())).await
    }
}

/// What became of a group.
pub(crate) enum Delivery {
    /// It was cancelled, and is not submitted.
    Cancelled,
    /// The answer to the submission.
    Answered { verdict: v1::submit_response::Verdict, tokens: u64, reward_ms: f64 },
    /// The service does not trust the weights that made it, and has the group back.
    Distrusted(Distrust),
}

/// Scores a generated group and submits it whole; `weights` are those that made its tokens.
pub(crate) async fn deliver(
    experience: &Experience,
    rewards: &Rewards,
    preparer: &Preparer,
    leased: &Leased,
    output: GroupOutput,
    generate_ms: f64,
    weights: Vec<v1::HeldWeights>,
) -> Result<Delivery> {
    if output.responses.iter().any(|r| r.finish == Finish::Cancelled) {
        return Ok(Delivery::Cancelled);
    }
    let indices: Vec<usize> = output.responses.iter().map(|r| r.index).collect();
    let tokens = output.responses.iter().map(|r| r.tokens.len() as u64).sum();
    let (mut bare, mut scored) = (Vec::new(), Vec::new());
    for raw in output.responses {
        let (response, spans, rows) = text::response(preparer.tokenizer(), raw);
        let wire = response_to_wire(&response, &spans, None);
        let attention = leased.frame.attention(rows.as_ref());
        let named = attention
            .as_ref()
            .and_then(|a| text::named_rows(a, &leased.scoring, &leased.record, &response.text, &spans));
        scored.push(v1::Response { attention: attention.as_ref().map(attention_to_wire), ..wire.clone() });
        bare.push(v1::Response { attention: named.as_ref().map(attention_to_wire), ..wire });
    }
    let start = Instant::now();
    let request = score_request(&leased.record, &leased.frame.sizes, preparer.box_form(), scored);
    let scoring = rewards.score(&leased.record.id, request, &indices);
    let breakdowns = scoring.instrument(leased.span(Step::Score)).await;
    let reward_ms = start.elapsed().as_secs_f64() * 1e3;
    let request = v1::SubmitRequest {
        worker: String::new(),
        lease: leased.lease.clone(),
        group: Some(group_to_wire(&leased.group)),
        responses: bare,
        breakdowns: breakdowns.iter().map(breakdown_to_wire).collect(),
        generate_ms,
        reward_ms,
        weights,
    };
    let submitted = experience.submit(request).instrument(leased.span(Step::Submit)).await?;
    Ok(match submitted {
        Ok(verdict) => Delivery::Answered { verdict, tokens, reward_ms },
        Err(what) => Delivery::Distrusted(what),
    })
}
