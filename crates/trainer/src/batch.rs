//! The data of an update in host memory: groups flattened per token for the loss, and their division into micro-batches.

use std::ops::Range;

use tch::{Device, Kind, Tensor};
use unveil_algo::MentionBatch;
use unveil_core::mention::overlapping_tokens;
use unveil_core::{GridThw, GroupInput, MentionFinder, TrainGroup};
use unveil_model::PackedGroup;

use crate::error::Result;

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
    /// Packs the responses with tokens and a reward; returns `None` if there are none.
    pub(crate) fn new(group: &'a TrainGroup) -> Option<Self> {
        let trainable: Vec<TrainableResponse> = group
            .totals()
            .into_iter()
            .enumerate()
            .filter(|(response, _)| !group.responses[*response].tokens.is_empty())
            .filter_map(|(response, total)| Some(TrainableResponse { response, reward: total? }))
            .collect();
        trainable.first()?;
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
            responses: trainable,
            group,
        })
    }

    /// Returns the number of response tokens.
    pub(crate) fn token_count(&self) -> usize {
        self.rollout_logprobs.len()
    }

    /// Returns the length of the packed sequence in tokens.
    pub(crate) fn packed_len(&self) -> usize {
        self.packed.prompt.tokens.len() + self.token_count()
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

/// Returns one field of all groups as a flat tensor.
pub(crate) fn flat_tensor(
    groups: &[&TrainableGroup<'_>],
    field: TokenField,
    kind: Kind,
    device: Device,
) -> Result<Tensor> {
    let values: Vec<f64> = groups.iter().flat_map(|g| field(g)).copied().collect();
    Ok(Tensor::f_from_slice(&values)?.f_to_kind(kind)?.f_to_device(device)?)
}

/// Largest share of a micro-batch that may be padding.
const MAX_PADDING: f64 = 0.05;

/// Splits groups, sorted by length, into micro-batches of consecutive groups. The padded size of a micro-batch (groups x longest
/// sequence) is at most `budget`, and at most [`MAX_PADDING`] of it is padding, unless it has a single group.
pub(crate) fn micro_batches<'m, 'a>(
    groups: &[&'m TrainableGroup<'a>],
    budget: usize,
) -> Vec<Vec<&'m TrainableGroup<'a>>> {
    let packed_lens: Vec<usize> = groups.iter().map(|g| g.packed_len()).collect();
    split_by_len(&packed_lens, budget).into_iter().map(|range| groups[range].to_vec()).collect()
}

/// Splits sequences of these lengths as [`micro_batches`] does.
fn split_by_len(packed_lens: &[usize], budget: usize) -> Vec<Range<usize>> {
    let mut out: Vec<Range<usize>> = Vec::new();
    let mut longest = 0;
    let mut filled = 0;
    for (i, len) in packed_lens.iter().enumerate() {
        longest = longest.max(*len);
        filled += len;
        match out.last_mut() {
            Some(range) if within_budget((range.len() + 1) * longest, filled, budget) => range.end = i + 1,
            _ => {
                longest = *len;
                filled = *len;
                out.push(i..i + 1);
            }
        }
    }
    out
}

fn within_budget(padded: usize, filled: usize, budget: usize) -> bool {
    padded <= budget && (padded - filled) as f64 <= MAX_PADDING * padded as f64
}

/// Returns the number of positions in the micro-batches, padding included, and the number of padding positions.
pub(crate) fn padding_positions(micro_batches: &[Vec<&TrainableGroup<'_>>]) -> (usize, usize) {
    let padded =
        |batch: &Vec<&TrainableGroup<'_>>| batch.len() * batch.iter().map(|g| g.packed_len()).max().unwrap_or(0);
    let all: usize = micro_batches.iter().map(padded).sum();
    let filled: usize = micro_batches.iter().flatten().map(|g| g.packed_len()).sum();
    (all, all - filled)
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
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

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
        let trainable = TrainableGroup::new(group)?;
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

    #[test]
    fn micro_batches_have_little_padding() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        for count in [1, 2, 16, 200] {
            let mut packed_lens: Vec<usize> = (0..count).map(|_| rng.random_range(290..1400)).collect();
            packed_lens.sort_unstable();
            let ranges = split_by_len(&packed_lens, 20_000);
            assert_eq!(ranges.iter().cloned().flatten().collect::<Vec<_>>(), (0..count).collect::<Vec<_>>());
            for range in &ranges {
                let lens = &packed_lens[range.clone()];
                let padded = lens.len() * lens.iter().max().unwrap();
                assert!(padded <= 20_000, "{lens:?}");
                assert!((padded - lens.iter().sum::<usize>()) as f64 <= 0.05 * padded as f64, "{lens:?}");
            }
        }
        assert_eq!(split_by_len(&[500, 500, 500], 1000), [0..2, 2..3]);
        assert_eq!(split_by_len(&[5000, 5000], 1000).len(), 2, "a single group may exceed the budget");
    }
}
