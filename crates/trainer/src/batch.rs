//! The data of a stage 2 update in host memory: groups flattened per token for the loss.

use std::ops::Range;

use tch::{Device, Kind, Tensor};
use unveil_algo::MentionBatch;
use unveil_core::mention::overlapping_tokens;
use unveil_core::{GridThw, GroupInput, MentionFinder, TrainGroup};
use unveil_model::PackedGroup;

use crate::error::Result;
use crate::micro_batch::BatchItem;

/// A response that enters the loss.
pub(crate) struct TrainableResponse {
    /// Its position among the group's responses.
    pub response: usize,
    /// Reward of the whole response.
    pub reward: f64,
}

/// A group that enters an update. Values per token are flat, in the order (response, position).
pub(crate) struct TrainableGroup<'a> {
    pub group: &'a TrainGroup,
    pub responses: Vec<TrainableResponse>,
    /// Rewards of the responses that the overlong filter leaves out of the loss; they count in the statistics of the group.
    pub filtered_rewards: Vec<f64>,
    pub packed: PackedGroup,
    /// Log-probabilities recorded by the rollout worker.
    pub rollout_logprobs: Vec<f64>,
    /// Weight versions that the tokens were generated with.
    pub versions: Vec<u64>,
    /// The learner's log-probabilities before the update.
    pub proximal_logprobs: Vec<f64>,
    pub advantages: Vec<f64>,
    pub old_values: Vec<f64>,
    pub value_targets: Vec<f64>,
    pub reference_logprobs: Vec<f64>,
}

impl<'a> TrainableGroup<'a> {
    /// Packs the responses that enter the loss, with `overlong_filter` without those cut at the length limit; returns `None` if there are
    /// none.
    pub(crate) fn new(group: &'a TrainGroup, overlong_filter: bool) -> Option<Self> {
        let totals = group.totals();
        let entering = group.responses_in_loss(overlong_filter);
        let trainable: Vec<TrainableResponse> = entering
            .iter()
            .filter_map(|response| Some(TrainableResponse { response: *response, reward: totals[*response]? }))
            .collect();
        trainable.first()?;
        let filtered = group.responses_in_loss(false).into_iter().filter(|response| !entering.contains(response));
        let chosen = || trainable.iter().map(|r| &group.responses[r.response]);
        let tokens: Vec<Vec<u32>> = chosen().map(|r| r.tokens.clone()).collect();
        Some(Self {
            packed: PackedGroup { prompt: group.input.prompt.clone(), responses: tokens },
            rollout_logprobs: chosen().flat_map(|r| r.logprobs.iter().map(|v| f64::from(*v))).collect(),
            versions: chosen().flat_map(|r| r.versions.iter().copied()).collect(),
            proximal_logprobs: Vec::new(),
            advantages: Vec::new(),
            old_values: Vec::new(),
            value_targets: Vec::new(),
            reference_logprobs: Vec::new(),
            filtered_rewards: filtered.filter_map(|response| totals[response]).collect(),
            responses: trainable,
            group,
        })
    }

    /// Returns the range of tokens of each response, counted from the group's first response token.
    pub(crate) fn response_ranges(&self) -> Vec<Range<usize>> {
        let mut begin = 0;
        let lengths = self.packed.responses.iter().map(Vec::len);
        lengths
            .map(|n| {
                begin += n;
                begin - n..begin
            })
            .collect()
    }
}

impl BatchItem for TrainableGroup<'_> {
    fn packed(&self) -> &PackedGroup {
        &self.packed
    }

    fn input(&self) -> &GroupInput {
        &self.group.input
    }

    fn token_count(&self) -> usize {
        self.rollout_logprobs.len()
    }
}

/// Returns the pixels of several groups as one tensor `[patches, patch length]`, and their grids in order; `None` without images.
pub(crate) fn pixel_batch<'a>(
    inputs: impl Iterator<Item = &'a GroupInput>,
    patch_len: i64,
    device: Device,
) -> Result<Option<(Tensor, Vec<GridThw>)>> {
    let mut values = Vec::new();
    let mut grids = Vec::new();
    for input in inputs {
        values.extend_from_slice(&input.patches);
        grids.extend_from_slice(&input.prompt.grids);
    }
    if grids.is_empty() {
        return Ok(None);
    }
    let tensor = Tensor::f_from_slice(&values)?.f_view([-1, patch_len])?.f_to_device(device)?;
    Ok(Some((tensor, grids)))
}

/// Accessor of one field of a group with a value per token.
pub(crate) type TokenField = for<'m, 'g> fn(&'m TrainableGroup<'g>) -> &'m [f64];

/// Returns fields of all groups as flat tensors, copied to the device at once; `None` for a field that is not given.
pub(crate) fn flat_tensors<const N: usize>(
    groups: &[&TrainableGroup<'_>],
    fields: [Option<TokenField>; N],
    kind: Kind,
    device: Device,
) -> Result<[Option<Tensor>; N]> {
    let given = fields.iter().flatten().count();
    let tokens: usize = groups.iter().map(|g| g.token_count()).sum();
    let mut values: Vec<f64> = Vec::with_capacity(given * tokens);
    for field in fields.iter().flatten() {
        values.extend(groups.iter().flat_map(|g| field(g)));
    }
    let values = Tensor::f_from_slice(&values)?.f_to_kind(kind)?.f_to_device(device)?;
    let mut rows = values.f_view([given as i64, tokens as i64])?.f_unbind(0)?.into_iter();
    Ok(fields.map(|field| field.and_then(|_| rows.next())))
}

/// Returns the number of responses with vision relevance among `groups`.
pub(crate) fn attended_responses(groups: &[&TrainableGroup<'_>]) -> usize {
    groups.iter().filter(|g| lesion_coverage(g.group).is_some()).map(|g| g.responses.len()).sum()
}

/// Returns the share of each image token that the boxes cover, and the mean over all tokens. `None` if the record asks for no boxes, or
/// if the boxes cover nothing or the whole image.
fn lesion_coverage(group: &TrainGroup) -> Option<(Vec<f32>, f32)> {
    if group.input.record.is_text() {
        return None;
    }
    let (w, h) = group.input.image_size;
    let coverage = group.input.merged.coverage(&group.input.record.boxes, w as f32, h as f32);
    let share = coverage.iter().sum::<f32>() / coverage.len().max(1) as f32;
    (share > 0.0 && share < 1.0 - 1e-6).then_some((coverage, share))
}

/// Finds the tokens of a micro-batch that mention the class, as the reward finds them; `width` is the length of the attention rows.
/// Returns `None` if no response has vision relevance.
pub(crate) fn mention_batch(
    groups: &[&TrainableGroup<'_>],
    mentions: &MentionFinder,
    width: i64,
    device: Device,
) -> Option<MentionBatch> {
    let mut tokens = Vec::new();
    let mut response = Vec::new();
    let mut coverage = Vec::new();
    let mut baseline = Vec::new();
    let mut begin = 0;
    for g in groups {
        let ranges = g.response_ranges();
        if let Some((cells, share)) = lesion_coverage(g.group) {
            for (r, range) in g.responses.iter().zip(ranges) {
                let text = &g.group.responses[r.response].text;
                let spans = g.group.spans.get(r.response).map_or(&[][..], Vec::as_slice);
                let mention = mentions.find(&g.group.input.record, text);
                let named = mention.map(|bytes| overlapping_tokens(&bytes, spans)).unwrap_or_default();
                for t in named.into_iter().filter(|t| *t < range.len()) {
                    tokens.push((begin + range.start + t) as i64);
                    response.push(baseline.len() as i64);
                }
                coverage.extend(cells.iter().copied().chain(std::iter::repeat(0.0)).take(width.max(0) as usize));
                baseline.push(share);
            }
        }
        begin += g.token_count();
    }
    (!baseline.is_empty()).then(|| MentionBatch {
        tokens: Tensor::from_slice(&tokens).to_device(device),
        response: Tensor::from_slice(&response).to_device(device),
        coverage: Tensor::from_slice(&coverage).view([baseline.len() as i64, width]).to_device(device),
        baseline: Tensor::from_slice(&baseline).to_kind(Kind::Float).to_device(device),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use unveil_core::{Attention, Breakdown, Finish, Grid, GroupId, MaskReason, Prompt, Record, Response};
    use unveil_reward::Scoring;
    use unveil_reward::vision::{AttendedResponse, Region, VisionRule, score_vision_relevance};

    use super::*;

    fn answered(record: &str, texts: &[&str]) -> TrainGroup {
        let record: Record = serde_json::from_str(record).unwrap();
        let prompt = Prompt { tokens: vec![1], grids: vec![] };
        let merged = Grid { rows: 2, cols: 2 };
        let image_size = (20, 20);
        let input = GroupInput { record, image_size, prompt, patches: vec![], merged, encoded: Default::default() };
        let response = |(index, text): (usize, &&str)| {
            let n = text.chars().count();
            Response {
                index,
                tokens: vec![1; n],
                text: (*text).to_owned(),
                logprobs: vec![0.0; n],
                versions: vec![0; n],
                finish: Finish::Stop,
            }
        };
        let breakdown = |index| Breakdown { id: "a".into(), index, total: Some(0.0), components: BTreeMap::new() };
        TrainGroup {
            id: GroupId { pass: 0, position: 0, record: "a".into() },
            worker: "w".into(),
            input: Arc::new(input),
            responses: texts.iter().enumerate().map(response).collect(),
            spans: texts.iter().map(|t| t.char_indices().map(|(b, c)| (b, b + c.len_utf8())).collect()).collect(),
            breakdowns: (0..texts.len()).map(breakdown).collect(),
            attention: vec![None; texts.len()],
            generate_ms: 0.0,
            reward_ms: 0.0,
        }
    }

    /// Returns the tokens whose attention enters the loss, per response.
    fn mention_tokens(group: &TrainGroup, mentions: &MentionFinder) -> Option<Vec<Vec<usize>>> {
        let trainable = TrainableGroup::new(group, false)?;
        let batch = mention_batch(&[&trainable], mentions, 4, Device::Cpu)?;
        let tokens = Vec::<i64>::try_from(&batch.tokens).ok()?;
        let responses = Vec::<i64>::try_from(&batch.response).ok()?;
        let ranges = trainable.response_ranges();
        let mut out = vec![Vec::new(); group.responses.len()];
        for (t, r) in tokens.into_iter().zip(responses) {
            out[r as usize].push(t as usize - ranges[r as usize].start);
        }
        Some(out)
    }

    #[test]
    fn loss_and_reward_agree_on_mentions() {
        const TEXTS: [&str; 7] = [
            "[0,0,10,10] nodule nodule",
            "<think>a nodule</think>[0,0,10,10] Nodule.",
            "<think>nodule</think><answer>é nodule</answer>",
            "<think>nodule</think>mass",
            "<think>nodule",
            "nodule <answer>mass</answer>",
            "[{\"bbox_2d\": [0,0,10,10], \"label\": \"nodule\"}]",
        ];
        let scoring = Scoring::default();
        let mentions = MentionFinder::default();
        let group = answered(r#"{"id":"a","category":"nodule","boxes":[[0,0,10,10]]}"#, &TEXTS);
        let by_response = mention_tokens(&group, &mentions).unwrap();
        assert_eq!(by_response.iter().map(Vec::len).collect::<Vec<_>>(), [6, 6, 6, 0, 0, 0, 6]);
        for ((text, spans), tokens) in TEXTS.iter().zip(&group.spans).zip(&by_response) {
            // The reward needs the rows of these tokens and no others.
            let attention = Attention { grid: [2, 2], tokens: tokens.clone(), rows: vec![vec![0.25; 4]; tokens.len()] };
            let seen = AttendedResponse { text, reader: &scoring.reader, spans, attention: Some(&attention) };
            let record = &group.input.record;
            let mut region = Region::new(&record.boxes, [20, 20]);
            let rule = VisionRule::new(&scoring.reward.vision_relevance);
            let reward = score_vision_relevance(seen, &scoring.names(&record.category), &mut region, rule);
            let count = reward.detail.get("tokens").copied().unwrap_or(0.0);
            assert_eq!((reward.masked, count), (false, tokens.len() as f64), "{text}");
            let fewer = Attention { tokens: vec![], rows: vec![], ..attention };
            let reward = score_vision_relevance(
                AttendedResponse { attention: Some(&fewer), ..seen },
                &scoring.names("nodule"),
                &mut region,
                rule,
            );
            let want = if tokens.is_empty() { None } else { Some(MaskReason::NoAttention) };
            assert_eq!(reward.reason, want, "{text}");
        }
        let record = r#"{"id":"a","task":"vqa","answer":"a nodule","category":"nodule","boxes":[[0,0,10,10]]}"#;
        assert_eq!(mention_tokens(&answered(record, &TEXTS), &mentions), None, "text answers have no mentions");
    }
}
