//! The processing of one leased group: model input before generation, scores and submission after it.

use std::sync::Arc;
use std::time::Instant;

use prost::Message;
use tracing::{Instrument, Span};
use unveil_core::{Finish, GroupId, Record};
use unveil_data::image_store::ContentHash;
use unveil_engine::random::group_key;
use unveil_engine::{GroupOutput, GroupRequest};
use unveil_experience_rpc::{ClientError, ExperienceConnection, WeightRejection};
use unveil_preprocess::preprocessor::Preprocessor;
use unveil_proto::v1::release_request::Cause;
use unveil_proto::{
    ConvertError, breakdown_to_wire, group_from_wire, group_to_wire, response_to_wire, sampling_from_wire, v1,
};
use unveil_reward::vision::{VisionRule, rows_needed};
use unveil_reward::{Scoring, Unscored, score_request};
use unveil_service::{MAX_MESSAGE_BYTES, set_remote_parent, span};

use crate::attention_budget::{NeededRows, attach_rows};
use crate::engine::stop_rule;
use crate::reward_connection::RewardConnection;
use crate::text::{self, ImageGeometry};
use crate::{Result, RolloutError};

/// Most bytes of a worker's name in a message.
const MAX_WORKER_NAME_BYTES: usize = 256;

/// The part of a leased group that the engine does not need.
pub(crate) struct LeasedGroup {
    pub lease: String,
    group: GroupId,
    record: Record,
    geometry: ImageGeometry,
    /// Finds the class in answers and the attention rows that the reward reads.
    scoring: Arc<Scoring>,
    /// W3C trace context of the group; empty if tracing is disabled.
    traceparent: String,
}

impl LeasedGroup {
    /// Creates the span of a stage in the trace of the group.
    pub(crate) fn span(&self, stage: GroupStage) -> Span {
        let span = match stage {
            GroupStage::Generate => span!(parent: None, "generate", record = self.record.id),
            GroupStage::Score => span!(parent: None, "score", record = self.record.id),
            GroupStage::Submit => span!(parent: None, "submit", record = self.record.id),
        };
        set_remote_parent(&span, &self.traceparent);
        span
    }
}

/// Stage of a worker's work on a group.
#[derive(Debug, Clone, Copy)]
pub(crate) enum GroupStage {
    Generate,
    Score,
    Submit,
}

/// Builds the engine's request for a lease; `scoring` finds classes in answers.
///
/// # Errors
/// Returns [`ClientError::Protocol`] if the lease is inconsistent, and [`RolloutError::Prepare`] if the record cannot be preprocessed.
pub(crate) fn build_request(
    preprocessor: &Arc<Preprocessor>,
    lease: v1::LeasedGroup,
    scoring: &Arc<Scoring>,
    address: &str,
) -> Result<(LeasedGroup, GroupRequest)> {
    let protocol = |what: String| RolloutError::from(ClientError::Protocol { address: address.to_owned(), what });
    let inconsistent = |e: ConvertError| protocol(format!("sent an inconsistent lease: {e}"));
    let group = group_from_wire(lease.group).map_err(inconsistent)?;
    let sampling = sampling_from_wire(lease.sampling).map_err(inconsistent)?;
    let record: Record = serde_json::from_str(&lease.record_json)
        .map_err(|e| protocol(format!("sent `{}`, which is not a record: {e}", group.record)))?;
    let name = format!("of record \"{}\"", record.id);
    let prepared = preprocessor
        .prepare_bytes(&lease.image, &name, &record)
        .map_err(|e| RolloutError::Prepare { record: record.id.clone(), source: Box::new(e) })?;
    let hash = ContentHash::parse(&lease.image_hash);
    let (input, geometry) = text::group_input(&record.id, hash, prepared);
    let key = group_key(&[&group.pass.to_le_bytes(), &group.position.to_le_bytes(), group.record.as_bytes()]);
    let stop = stop_rule(preprocessor, &lease.stop);
    let scoring = Arc::clone(scoring);
    let leased = LeasedGroup { lease: lease.lease, group, record, geometry, scoring, traceparent: lease.traceparent };
    Ok((leased, GroupRequest { input, key, sampling, stop }))
}

/// Outcome of the delivery of a group.
pub(crate) enum Delivery {
    /// The group was cancelled and not submitted.
    Cancelled,
    /// The service answered the submission; `why` is the reason of a rejection.
    Answered { verdict: v1::submit_response::Verdict, why: String, tokens: u64, reward_ms: f64 },
    /// The service rejected the weights that sampled the group, and has returned it to the queue.
    WeightsRejected(WeightRejection),
    /// The group has no scores and must be released.
    Unscored { cause: Cause, why: String },
}

/// Scores a generated group and submits it as a whole; `weights` are the versions that sampled its tokens.
pub(crate) async fn score_and_submit(
    (experience, rewards): (&ExperienceConnection, &RewardConnection),
    preprocessor: &Preprocessor,
    leased: &LeasedGroup,
    output: GroupOutput,
    generate_ms: f64,
    weights: Vec<v1::HeldWeights>,
) -> Result<Delivery> {
    if output.responses.iter().any(|r| r.finish == Finish::Cancelled) {
        return Ok(Delivery::Cancelled);
    }
    let tokens = output.responses.iter().map(|r| r.tokens.len() as u64).sum();
    let rule = VisionRule::new(&leased.scoring.reward.vision_relevance);
    let mut responses = Vec::new();
    let mut rows_for_learner = Vec::new();
    let mut rows_for_reward = Vec::new();
    for raw in output.responses {
        let (response, spans, rows) = text::response(preprocessor.tokenizer(), raw);
        let attention = leased.geometry.attention(rows.as_ref());
        let naming = text::naming_tokens(&leased.scoring, &leased.record, &response.text, &spans);
        rows_for_learner.push(NeededRows { attention: attention.clone(), needed: naming.clone() });
        let needed = rows_needed(naming, &response.text, &spans, rule);
        rows_for_reward.push(NeededRows { attention, needed });
        responses.push(response_to_wire(&response, &spans, None));
    }
    let start = Instant::now();
    let request = score_request(&leased.record, &leased.geometry.sizes, preprocessor.box_form(), responses.clone());
    let scored = match request {
        Ok(mut request) => {
            let length = request.encoded_len();
            let left_out = attach_rows(&mut request.responses, &rows_for_reward, length, rewards.max_message_bytes());
            if left_out > 0 {
                let record = &leased.record.id;
                tracing::warn!(
                    record,
                    left_out,
                    "attention rows left out of a message that is too small: raise reward.service.max_message_mib"
                );
            }
            drop(rows_for_reward);
            rewards.score(request).instrument(leased.span(GroupStage::Score)).await
        }
        Err(e) => Err(Unscored::Refused(e.to_string())),
    };
    let breakdowns = match scored {
        Ok(breakdowns) => breakdowns,
        Err(Unscored::Unavailable(why)) => return Ok(Delivery::Unscored { cause: Cause::Unscored, why }),
        Err(Unscored::Refused(why)) => return Ok(Delivery::Unscored { cause: Cause::Failed, why }),
    };
    let reward_ms = start.elapsed().as_secs_f64() * 1e3;
    let mut request = v1::SubmitRequest {
        worker: String::new(),
        lease: leased.lease.clone(),
        group: Some(group_to_wire(&leased.group)),
        responses,
        breakdowns: breakdowns.iter().map(breakdown_to_wire).collect(),
        generate_ms,
        reward_ms,
        weights,
    };
    // The worker's name is filled in by `submit`.
    let length = request.encoded_len() + MAX_WORKER_NAME_BYTES;
    attach_rows(&mut request.responses, &rows_for_learner, length, MAX_MESSAGE_BYTES);
    drop(rows_for_learner);
    let submitted = experience.submit(request).instrument(leased.span(GroupStage::Submit)).await?;
    Ok(match submitted {
        Ok((verdict, why)) => Delivery::Answered { verdict, why, tokens, reward_ms },
        Err(rejection) => Delivery::WeightsRejected(rejection),
    })
}
