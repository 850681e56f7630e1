//! Attention of packed groups. Most of a dense mask over a packed sequence would be masked, so attention is computed in two parts: prompts
//! causally, and each response as a separate row over its group's prompt and itself. Rows are padded to the longest prompt and response
//! of the batch.

use tch::{Device, Kind, Tensor};

use crate::layers::ops::{minus_infinity_where, sdpa};

/// The attention of a batch of packed sequences `[B, L]`.
#[derive(Debug)]
pub(crate) struct PackedAttention {
    /// Longest prompt (P).
    prompt: i64,
    rows: Option<ResponseRows>,
    /// Index of the output of each of the `B * L` positions, among `B * P` outputs of prompts followed by `M * R` of responses.
    assemble: Tensor,
}

/// The M responses, padded to the longest (R).
#[derive(Debug)]
struct ResponseRows {
    longest: i64,
    /// Sequence of each response `[M]`.
    group: Tensor,
    /// Position in `B * L` of each token, `[M * R]`.
    index: Tensor,
    /// Additive mask `[M, 1, R, P + R]`.
    mask: Tensor,
}

impl PackedAttention {
    /// Creates the attention of sequences of `length` tokens: a prompt, then responses one after another, then padding. `groups` has the
    /// lengths of each prompt and its responses.
    pub(crate) fn new(groups: &[(usize, Vec<usize>)], length: usize, device: Device) -> Self {
        let prompt = groups.iter().map(|g| g.0).max().unwrap_or(0);
        let longest = groups.iter().flat_map(|g| &g.1).copied().max().unwrap_or(0);
        let mut group = Vec::new();
        let mut index = Vec::new();
        let mut prompts = Vec::new();
        let mut lengths = Vec::new();
        let mut assemble = Vec::with_capacity(groups.len() * length);
        for (g, (prompt_length, responses)) in groups.iter().enumerate() {
            let mut start = g * length + prompt_length;
            assemble.extend((0..*prompt_length).map(|i| (g * prompt + i) as i64));
            for &count in responses.iter().filter(|n| **n > 0) {
                let first = groups.len() * prompt + group.len() * longest;
                assemble.extend((0..count).map(|i| (first + i) as i64));
                index.extend((0..longest).map(|i| (start + i.min(count - 1)) as i64));
                group.push(g as i64);
                prompts.push(*prompt_length as i64);
                lengths.push(count as i64);
                start += count;
            }
            // Any row will do for padding: nothing reads it.
            assemble.resize((g + 1) * length, 0);
        }
        let tensor = |values: &[i64]| Tensor::from_slice(values).to_device(device);
        let rows = (!group.is_empty()).then(|| ResponseRows {
            longest: longest as i64,
            group: tensor(&group),
            index: tensor(&index),
            mask: row_mask(&tensor(&prompts), &tensor(&lengths), prompt as i64, longest as i64),
        });
        Self { prompt: prompt as i64, rows, assemble: tensor(&assemble) }
    }

    /// Returns a copy for another dtype that shares the index tensors.
    pub(crate) fn to_kind(&self, kind: Kind) -> Self {
        let rows = self.rows.as_ref().map(|r| ResponseRows {
            longest: r.longest,
            group: r.group.shallow_clone(),
            index: r.index.shallow_clone(),
            mask: r.mask.to_kind(kind),
        });
        Self { prompt: self.prompt, rows, assemble: self.assemble.shallow_clone() }
    }

    /// Computes attention of `q [B, Hq, L, d]` over `k, v [B, Hkv, L, d]`: `[B, L, Hq, d]`.
    pub(crate) fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        let size = q.size();
        let b = size[0];
        let heads = size[1];
        let l = size[2];
        let d = size[3];
        let prompt_of = |t: &Tensor| t.narrow(2, 0, self.prompt);
        let prompts =
            sdpa(&prompt_of(q), &prompt_of(k), &prompt_of(v), None, true).transpose(1, 2).reshape([-1, heads * d]);
        let all = match &self.rows {
            None => prompts,
            Some(rows) => {
                let responses_of = |t: &Tensor| {
                    let heads = t.size()[1];
                    // An embedding, because its gradient sums rows faster than that of an index.
                    let flat = t.transpose(1, 2).reshape([b * l, heads * d]);
                    Tensor::embedding(&flat, &rows.index, -1, false, false)
                        .view([-1, rows.longest, heads, d])
                        .transpose(1, 2)
                };
                let with_prompt =
                    |t: &Tensor| Tensor::cat(&[prompt_of(t).index_select(0, &rows.group), responses_of(t)], 2);
                let out = sdpa(&responses_of(q), &with_prompt(k), &with_prompt(v), Some(&rows.mask), false);
                Tensor::cat(&[prompts, out.transpose(1, 2).reshape([-1, heads * d])], 0)
            }
        };
        Tensor::embedding(&all, &self.assemble, -1, false, false).view([b, l, heads, d])
    }
}

/// Builds the additive mask of response rows: a token attends to its prompt, to itself and to earlier tokens of the response. Padding
/// attends to the real tokens of the response.
fn row_mask(prompts: &Tensor, lengths: &Tensor, prompt: i64, longest: i64) -> Tensor {
    let device = prompts.device();
    let count = |n: i64| Tensor::arange(n, (Kind::Int64, device));
    let prompt_open = count(prompt).unsqueeze(0).lt_tensor(&prompts.unsqueeze(1)).view([-1, 1, 1, prompt]);
    let causal = count(longest).unsqueeze(0).le_tensor(&count(longest).unsqueeze(1));
    let real = count(longest).unsqueeze(0).lt_tensor(&lengths.unsqueeze(1)).view([-1, 1, 1, longest]);
    let response_open = causal.view([1, 1, longest, longest]).logical_and(&real);
    let open = Tensor::cat(&[prompt_open.expand([-1, 1, longest, prompt], false), response_open], -1);
    minus_infinity_where(&open.logical_not(), Kind::Float)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Outputs and gradients equal those of attention with the dense mask.
    #[test]
    fn packed_attention_equals_its_dense_mask() {
        tch::manual_seed(4);
        let options = (Kind::Double, Device::Cpu);
        for groups in [
            vec![(5, vec![3, 1, 4]), (2, vec![2]), (7, vec![0, 6])],
            vec![(3, vec![]), (4, vec![])],
            vec![(1, vec![2, 2])],
        ] {
            let length = groups.iter().map(|(p, r)| p + r.iter().sum::<usize>()).max().unwrap();
            let b = groups.len() as i64;
            let l = length as i64;
            let packed = PackedAttention::new(&groups, length, Device::Cpu).to_kind(Kind::Double);
            let leaf = |heads: i64| Tensor::randn([b, heads, l, 8], options).set_requires_grad(true);
            let q = leaf(4);
            let k = leaf(2);
            let v = leaf(2);
            let mut open = vec![false; groups.len() * length * length];
            let mut real = vec![0.0; groups.len() * length];
            for (g, (prompt, responses)) in groups.iter().enumerate() {
                let mut row = |at: usize, from: usize, to: usize, share: usize| {
                    let line = &mut open[(g * length + at) * length..][..length];
                    line[..share].fill(true);
                    line[from..=to].fill(true);
                    real[g * length + at] = 1.0;
                };
                (0..*prompt).for_each(|i| row(i, 0, i, 0));
                let mut start = *prompt;
                for count in responses {
                    (start..start + count).for_each(|i| row(i, start, i, *prompt));
                    start += count;
                }
                (start..length).for_each(|i| open[(g * length + i) * length + i] = true);
            }
            let mask = Tensor::from_slice(&open).view([b, 1, l, l]);
            let real = Tensor::from_slice(&real).view([b, l, 1, 1]);
            let weights = Tensor::randn([b, l, 4, 8], options) * real;
            let run = |out: Tensor| {
                for t in [&q, &k, &v] {
                    t.shallow_clone().zero_grad();
                }
                let loss = (out * &weights).sum(Kind::Double);
                loss.backward();
                [loss.detach(), q.grad().copy(), k.grad().copy(), v.grad().copy()]
            };
            let actual = run(packed.attend(&q, &k, &v));
            let expected = run(sdpa(&q, &k, &v, Some(&mask), false).transpose(1, 2));
            for (i, (a, b)) in actual.iter().zip(&expected).enumerate() {
                assert!((a - b).abs().max().double_value(&[]) < 1e-10, "{groups:?}: number {i}");
            }
        }
    }
}
