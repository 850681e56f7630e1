//! What happens to one leased group: model input before generation, scores and submission after it.

use std::sync::Arc;
use std::time::Instant;

use prost::Message;
use tracing::{Instrument, Span};
use unveil_core::{Finish, GroupId, Logprobs, Record, Sampling};
use unveil_data::prepare::Preparer;
use unveil_data::store::ContentHash;
use unveil_engine::random::group_key;
use unveil_engine::{GroupOutput, GroupRequest};
use unveil_proto::v1::release_request::Cause;
use unveil_proto::{breakdown_to_wire, group_from_wire, group_to_wire, response_to_wire, v1};
use unveil_reward::vision::{VisionRule, rows_needed};
use unveil_reward::{Scoring, Unscored, score_request};
use unveil_service::{MESSAGE_LIMIT, continues, span};

use crate::engine::stop_rule;
use crate::experience::{Distrust, Experience};
use crate::fit::{Rows, fill};
use crate::rewards::Rewards;
use crate::text::{self, Frame};
use crate::{Result, RolloutError};

/// Bytes that a worker's name takes in a message at most.
const NAME: usize = 256;

/// A leased group beside its request to the engine.
pub(crate) struct Leased {
    pub lease: String,
    group: GroupId,
    record: Record,
    frame: Frame,
    /// How its class is found in answers, and how the reward reads attention.
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

/// What became of a group.
pub(crate) enum Delivery {
    /// It was cancelled, and is not submitted.
    Cancelled,
    /// The answer to the submission, with why where it was refused.
    Answered { verdict: v1::submit_response::Verdict, why: String, tokens: u64, reward_ms: f64 },
    /// The service does not trust the weights that made it, and has the group back.
    Distrusted(Distrust),
    /// It has no scores and is to be given back.
    Unscored { cause: Cause, why: String },
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
    let tokens = output.responses.iter().map(|r| r.tokens.len() as u64).sum();
    let rule = VisionRule::new(&leased.scoring.reward.vision_relevance);
    let (mut bare, mut named, mut needed) = (Vec::new(), Vec::new(), Vec::new());
    for raw in output.responses {
        let (response, spans, rows) = text::response(preparer.tokenizer(), raw);
        let all = leased.frame.attention(rows.as_ref());
        let first = text::named(&leased.scoring, &leased.record, &response.text, &spans);
        named.push(Rows { all: all.clone(), needed: first.clone() });
        needed.push(Rows { all, needed: rows_needed(first, &response.text, &spans, rule) });
        bare.push(response_to_wire(&response, &spans, None));
    }
    let start = Instant::now();
    let request = score_request(&leased.record, &leased.frame.sizes, preparer.box_form(), bare.clone());
    let scored = match request {
        Ok(mut request) => {
            let length = request.encoded_len();
            let left_out = fill(&mut request.responses, &needed, length, rewards.most_bytes());
            if left_out > 0 {
                let record = &leased.record.id;
                tracing::warn!(
                    record,
                    left_out,
                    "attention that does not fit into a message is left out: raise reward.service.max_message_mib"
                );
            }
            drop(needed);
            rewards.score(request).instrument(leased.span(Step::Score)).await
        }
        Err(e) => Err(Unscored::Refused(e.to_string())),
    };
    let breakdowns = match scored {
        Ok(breakdowns) => breakdowns,
        Err(Unscored::Away(why)) => return Ok(Delivery::Unscored { cause: Cause::Unscored, why }),
        Err(Unscored::Refused(why)) => return Ok(Delivery::Unscored { cause: Cause::Failed, why }),
    };
    let reward_ms = start.elapsed().as_secs_f64() * 1e3;
    let mut request = v1::SubmitRequest {
        worker: String::new(),
        lease: leased.lease.clone(),
        group: Some(group_to_wire(&leased.group)),
        responses: bare,
        breakdowns: breakdowns.iter().map(breakdown_to_wire).collect(),
        generate_ms,
        reward_ms,
        weights,
    };
    // The worker's name is still to come.
    let length = request.encoded_len() + NAME;
    fill(&mut request.responses, &named, length, MESSAGE_LIMIT);
    drop(named);
    let submitted = experience.submit(request).instrument(leased.span(Step::Submit)).await?;
    Ok(match submitted {
        Ok((verdict, why)) => Delivery::Answered { verdict, why, tokens, reward_ms },
        Err(what) => Delivery::Distrusted(what),
    })
}
