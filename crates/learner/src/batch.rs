//! What an update is made of, as host data: groups with prompt, pixels, responses and rewards; and the same as flat rows ready
//! for the loss. Knows no service and no optimiser.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use tch::{Device, Kind, Tensor};
use unveil_algo::MentionBatch;
use unveil_core::{Attention, Breakdown, Grid, GroupId, Record, Response};
use unveil_model::{GridThw, PackedGroup, Prompt};
use unveil_reward::Scoring;
use unveil_reward::mention::tokens_of;

use crate::error::Result;

/// Prompt and image of one group.
#[derive(Debug, Clone)]
pub struct GroupInput {
    /// The record, boxes in pixels of the image that the policy saw.
    pub record: Record,
    /// Width and height of that image in pixels.
    pub image_size: (u32, u32),
    /// Prompt with image placeholders expanded.
    pub prompt: Prompt,
    /// Flattened patches `[t*h*w, patch length]` of its image.
    pub patches: Vec<f32>,
    /// Merged image-token grid.
    pub merged: Grid,
    /// The encoded image as it was leased; empty where none was.
    pub encoded: Bytes,
}

/// A whole group as it comes back from a rollout worker.
#[derive(Debug, Clone)]
pub struct TrainGroup {
    /// Which turn in which pass.
    pub id: GroupId,
    /// Who made it; empty where that is not known.
    pub worker: String,
    /// Prompt and image.
    pub input: Arc<GroupInput>,
    /// n responses.
    pub responses: Vec<Response>,
    /// Per response, the bytes of its text that each token covers.
    pub spans: Vec<Vec<(usize, usize)>>,
    /// Per response.
    pub breakdowns: Vec<Breakdown>,
    /// Per response, the rows of the tokens that name the class, where the worker sent them; kept for the report.
    pub attention: Vec<Option<Attention>>,
    /// Time that generation took, in ms.
    pub generate_ms: f64,
    /// Time that scoring took, in ms.
    pub reward_ms: f64,
}

impl TrainGroup {
    /// Totals in the order of the responses; a response without a breakdown counts as masked.
    pub fn totals(&self) -> Vec<Option<f64>> {
        let total = |r: &Response| self.breakdowns.iter().find(|b| b.index == r.index).and_then(|b| b.total);
        self.responses.iter().map(total).collect()
    }

    /// Whether there is something to learn from: some response has tokens and a reward.
    pub fn is_rewarded(&self) -> bool {
        self.responses.iter().zip(self.totals()).any(|(r, total)| total.is_some() && !r.tokens.is_empty())
    }
}

/// One response's rows within a batch.
pub(crate) struct Row {
    /// Which of the group's responses.
    pub response: usize,
    /// Reward of the whole response.
    pub reward: f64,
}

/// A group that takes part in an update, and its tokens' numbers in flat order (response, position).
pub(crate) struct Member<'a> {
    pub group: &'a TrainGroup,
    pub rows: Vec<Row>,
    pub packed: PackedGroup,
    /// Log-probabilities as the rollout recorded them.
    pub old: Vec<f64>,
    pub versions: Vec<u64>,
    /// The learner's log-probabilities before the update.
    pub proximal: Vec<f64>,
    pub advantages: Vec<f64>,
    pub old_values: Vec<f64>,
    pub targets: Vec<f64>,
    pub reference: Vec<f64>,
}

impl<'a> Member<'a> {
    /// The responses that count, packed; `None` when there is none. Empty and masked ones do not count.
    pub fn new(group: &'a TrainGroup) -> Option<Self> {
        let rows: Vec<Row> = group
            .totals()
            .into_iter()
            .enumerate()
            .filter(|(response, _)| !group.responses[*response].tokens.is_empty())
            .filter_map(|(response, total)| Some(Row { response, reward: total? }))
            .collect();
        rows.first()?;
        let chosen = || rows.iter().map(|r| &group.responses[r.response]);
        let responses: Vec<Vec<u32>> = chosen().map(|r| r.tokens.clone()).collect();
        Some(Self {
            packed: PackedGroup { prompt: group.input.prompt.clone(), responses },
            old: chosen().flat_map(|r| r.logprobs.iter().map(|v| f64::from(*v))).collect(),
            versions: chosen().flat_map(|r| r.versions.iter().copied()).collect(),
            proximal: Vec::new(),
            advantages: Vec::new(),
            old_values: Vec::new(),
            targets: Vec::new(),
            reference: Vec::new(),
            rows,
            group,
        })
    }

    /// Tokens of the responses.
    pub fn tokens(&self) -> usize {
        self.old.len()
    }

    /// Length of the packed sequence.
    pub fn width(&self) -> usize {
        self.packed.prompt.tokens.len() + self.tokens()
    }

    /// Flat ranges of its responses, relative to its own first token.
    pub fn ranges(&self) -> Vec<Range<usize>> {
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

/// Pixels of several groups as one tensor, and their grids in order.
pub(crate) fn pixels<'a>(
    inputs: impl Iterator<Item = &'a GroupInput>,
    patch_len: i64,
    device: Device,
) -> Result<Option<(Tensor, Vec<GridThw>)>> {
    let (mut values, mut grids) = (Vec::new(), Vec::new());
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

/// Which of a member's numbers, flat over its tokens.
pub(crate) type Numbers = for<'m, 'g> fn(&'m Member<'g>) -> &'m [f64];

/// The members' numbers of one kind as a flat tensor.
pub(crate) fn flat(members: &[&Member<'_>], of: Numbers, kind: Kind, device: Device) -> Result<Tensor> {
    let values: Vec<f64> = members.iter().flat_map(|m| of(m)).copied().collect();
    Ok(Tensor::f_from_slice(&values)?.f_to_kind(kind)?.f_to_device(device)?)
}

/// Largest share of a part that may be padding.
const PADDING: f64 = 0.05;

/// Consecutive groups so that each part's padded size (groups x longest sequence) stays within `budget` and is padding to
/// [`PADDING`] at most; at least one each. Sort the members by width before.
pub(crate) fn parts<'m, 'a>(members: &[&'m Member<'a>], budget: usize) -> Vec<Vec<&'m Member<'a>>> {
    let widths: Vec<usize> = members.iter().map(|m| m.width()).collect();
    cuts(&widths, budget).into_iter().map(|range| members[range].to_vec()).collect()
}

/// [`parts`] of sequences of these widths.
fn cuts(widths: &[usize], budget: usize) -> Vec<Range<usize>> {
    let mut out: Vec<Range<usize>> = Vec::new();
    let (mut widest, mut filled) = (0, 0);
    for (i, width) in widths.iter().enumerate() {
        (widest, filled) = (widest.max(*width), filled + width);
        match out.last_mut() {
            Some(part) if fits((part.len() + 1) * widest, filled, budget) => part.end = i + 1,
            _ => {
                (widest, filled) = (*width, *width);
                out.push(i..i + 1);
            }
        }
    }
    out
}

fn fits(padded: usize, filled: usize, budget: usize) -> bool {
    padded <= budget && (padded - filled) as f64 <= PADDING * padded as f64
}

/// Positions of the parts, padding among them, and those that are padding.
pub(crate) fn padding(parts: &[Vec<&Member<'_>>]) -> (usize, usize) {
    let padded = |part: &Vec<&Member<'_>>| part.len() * part.iter().map(|m| m.width()).max().unwrap_or(0);
    let all: usize = parts.iter().map(padded).sum();
    let filled: usize = parts.iter().flatten().map(|m| m.width()).sum();
    (all, all - filled)
}

/// Responses with vision relevance among `members`.
pub(crate) fn attended(members: &[&Member<'_>]) -> usize {
    members.iter().filter(|m| region(m.group).is_some()).map(|m| m.rows.len()).sum()
}

/// Coverage and its mean, where there is something to look at and something to look away from, and a region was asked for.
fn region(group: &TrainGroup) -> Option<(Vec<f32>, f32)> {
    if group.input.record.is_text() {
        return None;
    }
    let (w, h) = group.input.image_size;
    let coverage = group.input.merged.coverage(&group.input.record.boxes, w as f32, h as f32);
    let share = coverage.iter().sum::<f32>() / coverage.len().max(1) as f32;
    (share > 0.0 && share < 1.0 - 1e-6).then_some((coverage, share))
}

/// Which attention rows of a part are mentions of the class, found in answers as rewards find them. `None` where
/// no response has vision relevance. `width` is that of the rows.
pub(crate) fn mentions(members: &[&Member<'_>], scoring: &Scoring, width: i64, device: Device) -> Option<MentionBatch> {
    let (mut tokens, mut response) = (Vec::new(), Vec::new());
    let (mut coverage, mut baseline) = (Vec::new(), Vec::new());
    let mut begin = 0;
    for m in members {
        let ranges = m.ranges();
        if let Some((cells, share)) = region(m.group) {
            for (row, range) in m.rows.iter().zip(ranges) {
                let text = &m.group.responses[row.response].text;
                let spans = m.group.spans.get(row.response).map_or(&[][..], Vec::as_slice);
                let mention = scoring.mention(&m.group.input.record, text);
                let named = mention.map(|at| tokens_of(&at, spans)).unwrap_or_default();
                for t in named.into_iter().filter(|t| *t < range.len()) {
                    tokens.push((begin + range.start + t) as i64);
                    response.push(baseline.len() as i64);
                }
                coverage.extend(cells.iter().copied().chain(std::iter::repeat(0.0)).take(width.max(0) as usize));
                baseline.push(share);
            }
        }
        begin += m.tokens();
    }
    (!baseline.is_empty()).then(|| MentionBatch {
        tokens: Tensor::from_slice(&tokens).to_device(device),
        response: Tensor::from_slice(&response).to_device(device),
        coverage: Tensor::from_slice(&coverage).view([baseline.len() as i64, width]).to_device(device),
        baseline: Tensor::from_slice(&baseline).to_kind(Kind::Float).to_device(device),
    })
}

/// A group of one response, for tests of what becomes of groups.
#[cfg(test)]
pub(crate) fn one_response(
    record: &str,
    total: Option<f64>,
    components: std::collections::BTreeMap<String, unveil_core::Component>,
) -> TrainGroup {
    let input = GroupInput {
        record: serde_json::from_value(serde_json::json!({"id": record})).unwrap(),
        image_size: (8, 8),
        prompt: Default::default(),
        patches: vec![],
        merged: Grid { rows: 1, cols: 1 },
        encoded: Default::default(),
    };
    TrainGroup {
        id: GroupId { pass: 0, position: 0, record: record.into() },
        worker: "w".into(),
        input: Arc::new(input),
        responses: vec![Response {
            index: 0,
            tokens: vec![1],
            text: "x".into(),
            logprobs: vec![-0.5],
            versions: vec![0],
            finish: unveil_core::Finish::Stop,
        }],
        spans: vec![],
        breakdowns: vec![Breakdown { id: record.into(), index: 0, total, components }],
        attention: vec![],
        generate_ms: 0.0,
        reward_ms: 0.0,
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use std::collections::BTreeMap;

    use unveil_core::{Finish, MaskReason};
    use unveil_reward::vision::{Region, Seen, VisionRule, look};

    use super::*;

    fn answered(record: &str, texts: &[&str]) -> TrainGroup {
        let record: Record = serde_json::from_str(record).unwrap();
        let prompt = Prompt { tokens: vec![1], grids: vec![] };
        let (merged, image_size) = (Grid { rows: 2, cols: 2 }, (20, 20));
        let input = GroupInput { record, image_size, prompt, patches: vec![], merged, encoded: Bytes::new() };
        let response = |(index, text): (usize, &&str)| {
            let n = text.chars().count();
            let (tokens, logprobs, versions) = (vec![1; n], vec![0.0; n], vec![0; n]);
            Response { index, tokens, text: (*text).to_owned(), logprobs, versions, finish: Finish::Stop }
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

    /// Tokens that the gradient pulls on, per response.
    fn pulled(group: &TrainGroup, scoring: &Scoring) -> Option<Vec<Vec<usize>>> {
        let member = Member::new(group)?;
        let found = mentions(&[&member], scoring, 4, Device::Cpu)?;
        let (tokens, of) = (Vec::<i64>::try_from(&found.tokens).ok()?, Vec::<i64>::try_from(&found.response).ok()?);
        let ranges = member.ranges();
        let mut out = vec![Vec::new(); group.responses.len()];
        for (t, r) in tokens.into_iter().zip(of) {
            out[r as usize].push(t as usize - ranges[r as usize].start);
        }
        Some(out)
    }

    #[test]
    fn the_gradient_pulls_on_the_mentions_that_are_rewarded() {
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
        let group = answered(r#"{"id":"a","category":"nodule","boxes":[[0,0,10,10]]}"#, &TEXTS);
        let found = pulled(&group, &scoring).unwrap();
        assert_eq!(found.iter().map(Vec::len).collect::<Vec<_>>(), [6, 6, 6, 0, 0, 0, 6]);
        for ((text, spans), tokens) in TEXTS.iter().zip(&group.spans).zip(&found) {
            // Rows of these tokens are all that the reward asks for.
            let attention = Attention { grid: [2, 2], tokens: tokens.clone(), rows: vec![vec![0.25; 4]; tokens.len()] };
            let seen = Seen { text, reading: &scoring.reading, spans, attention: Some(&attention) };
            let record = &group.input.record;
            let mut region = Region::new(&record.boxes, [20, 20]);
            let rule = VisionRule::new(&scoring.reward.vision_relevance);
            let reward = look(seen, &scoring.names(&record.category), &mut region, rule);
            let count = reward.detail.get("tokens").copied().unwrap_or(0.0);
            assert_eq!((reward.masked, count), (false, tokens.len() as f64), "{text}");
            let fewer = Attention { tokens: vec![], rows: vec![], ..attention };
            let reward = look(Seen { attention: Some(&fewer), ..seen }, &scoring.names("nodule"), &mut region, rule);
            let want = if tokens.is_empty() { None } else { Some(MaskReason::NoAttention) };
            assert_eq!(reward.reason, want, "{text}");
        }
        let record = r#"{"id":"a","task":"vqa","answer":"a nodule","category":"nodule","boxes":[[0,0,10,10]]}"#;
        assert_eq!(pulled(&answered(record, &TEXTS), &scoring), None, "answers in text are not pulled anywhere");
    }

    #[test]
    fn little_is_padding_whatever_the_widths() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        for count in [1, 2, 16, 200] {
            let mut widths: Vec<usize> = (0..count).map(|_| rng.random_range(290..1400)).collect();
            widths.sort_unstable();
            let parts = cuts(&widths, 20_000);
            assert_eq!(parts.iter().cloned().flatten().collect::<Vec<_>>(), (0..count).collect::<Vec<_>>());
            for part in &parts {
                let own = &widths[part.clone()];
                let padded = own.len() * own.iter().max().unwrap();
                assert!(padded <= 20_000, "{own:?}");
                assert!((padded - own.iter().sum::<usize>()) as f64 <= 0.05 * padded as f64, "{own:?}");
            }
        }
        assert_eq!(cuts(&[500, 500, 500], 1000), [0..2, 2..3]);
        assert_eq!(cuts(&[5000, 5000], 1000).len(), 2, "one alone is a part however long it is");
    }
}
