//! Random batches: ragged groups of ragged responses with all inputs of a loss.

use tch::{Device, Kind, Tensor};
use unveil_algo::{AlgoError, Counts, LossParts, MentionBatch, Objective, TokenBatch, TokenLayout, policy_loss};

/// The layout of a batch and its tensors by name.
pub(crate) struct Batch {
    pub layout: TokenLayout,
    pub named: Vec<(&'static str, Tensor)>,
}

/// Names of the tensors with respect to which a loss is differentiated.
pub(crate) const LEAVES: [&str; 4] = ["logprobs", "entropy", "values", "scores"];

/// Returns `n` integers of the seeded generator in `low..high`.
pub(crate) fn integers(low: i64, high: i64, n: i64) -> Vec<i64> {
    Vec::try_from(Tensor::randint_low(low, high, [n], (Kind::Int64, Device::Cpu))).unwrap()
}

/// Returns normally distributed values on a grid of 1/64: their differences are exact in both dtypes, so that no ratio is within rounding
/// of a clip bound, where f32 and f64 may legitimately differ.
fn grid(n: i64, scale: f64) -> Tensor {
    (Tensor::randn([n], (Kind::Double, Device::Cpu)) * (scale * 64.0)).round() / 64.0
}

impl Batch {
    /// Returns a batch of dtype `kind`. Two of three responses have vision relevance, some of them without a mention.
    pub(crate) fn random(seed: u64, kind: Kind) -> Self {
        tch::manual_seed(seed as i64);
        let double = (Kind::Double, Device::Cpu);
        let groups = integers(1, 5, 1)[0];
        let lengths: Vec<Vec<usize>> = integers(1, 6, groups)
            .into_iter()
            .map(|n| integers(1, 10, n).into_iter().map(|l| l as usize).collect())
            .collect();
        let layout = TokenLayout::new(lengths);
        let n = layout.tokens() as i64;
        let cells = integers(4, 16, 1)[0];
        let mut tokens = vec![];
        let mut response = vec![];
        let mut rows = 0;
        let mut begin = 0;
        for (r, length) in layout.lengths().iter().flatten().enumerate() {
            if r % 3 != 2 {
                if rows % 4 != 3 {
                    tokens.extend((0..(*length).min(2)).map(|t| (begin + t) as i64));
                    response.extend(vec![rows; (*length).min(2)]);
                }
                rows += 1;
            }
            begin += length;
        }
        let logprobs = grid(n, 1.0) - 4.0;
        let near = |t: &Tensor, s: f64| t + grid(n, s);
        let old = near(&logprobs, 0.5);
        let old_values = grid(n, 1.0);
        let coverage = Tensor::rand([rows, cells], double).square();
        let floats = vec![
            ("behaviour", near(&old, 0.6)),
            ("reference", near(&logprobs, 0.5)),
            ("old", old),
            ("logprobs", logprobs),
            ("advantages", Tensor::randn([n], double)),
            ("entropy", Tensor::rand([n], double)),
            ("values", near(&old_values, 0.4)),
            ("targets", near(&old_values, 0.7)),
            ("old_values", old_values),
            ("scores", Tensor::randn([n, cells], double)),
            ("baseline", coverage.mean_dim([1i64].as_slice(), false, Kind::Double)),
            ("coverage", coverage),
        ];
        let mut named: Vec<(&str, Tensor)> = floats.into_iter().map(|(k, t)| (k, t.to_kind(kind))).collect();
        named.push(("mention_tokens", Tensor::from_slice(&tokens)));
        named.push(("mention_response", Tensor::from_slice(&response)));
        Self { layout, named }
    }

    pub(crate) fn get(&self, key: &str) -> &Tensor {
        &self.named.iter().find(|(k, _)| *k == key).unwrap_or_else(|| panic!("no {key}")).1
    }

    pub(crate) fn tensors(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.named.iter().map(|(k, t)| (*k, t))
    }

    /// Returns the counts of the batch, including attended responses.
    pub(crate) fn counts(&self) -> Counts {
        Counts { attended: self.get("baseline").numel() as u64, ..self.layout.counts() }
    }

    /// Returns the loss as part of a batch with `counts`, and the gradients of [`LEAVES`].
    pub(crate) fn loss(&self, objective: &Objective, counts: &Counts) -> Result<(LossParts, Vec<Tensor>), AlgoError> {
        let leaves = LEAVES.map(|k| self.get(k).copy().set_requires_grad(true));
        let [logprobs, entropy, values, scores] = &leaves;
        let attention = scores.softmax(-1, scores.kind());
        let get = |k: &str| self.get(k).shallow_clone();
        let mentions = MentionBatch {
            tokens: get("mention_tokens"),
            response: get("mention_response"),
            coverage: get("coverage"),
            baseline: get("baseline"),
        };
        let batch = TokenBatch {
            logprobs: Some(logprobs),
            old_logprobs: Some(self.get("old")),
            behaviour: Some(self.get("behaviour")),
            advantages: Some(self.get("advantages")),
            entropy: Some(entropy),
            values: Some(values),
            old_values: Some(self.get("old_values")),
            targets: Some(self.get("targets")),
            reference: Some(self.get("reference")),
            attention: Some((&attention, &mentions)),
        };
        let parts = policy_loss(objective, &batch, &self.layout, counts)?;
        parts.loss.backward();
        let gradient = |t: &Tensor| if t.grad().defined() { t.grad() } else { t.zeros_like() };
        let gradients = leaves.iter().map(gradient).collect();
        Ok((parts, gradients))
    }
}
