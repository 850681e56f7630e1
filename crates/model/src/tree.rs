//! Attention of packed groups. A dense mask over a packed sequence would be mostly closed, so it is computed in two parts that have no
//! more than their share: prompts causally, and each response as a row of its own over its group's prompt and itself. Rows are
//! padded to the longest prompt and response of the batch. Knows no layers.

use tch::{Device, Kind, Tensor};

use crate::ops::sdpa;

/// How a batch of packed sequences `[B, L]` attends.
pub(crate) struct Tree {
    /// Longest prompt (P).
    prompt: i64,
    rows: Option<Rows>,
    /// Where the output of each of the `B * L` positions is, among `B * P` of prompts and then `M * R` of responses.
    assemble: Tensor,
}

/// The M responses, padded to the longest (R).
struct Rows {
    longest: i64,
    /// Each response's sequence `[M]`.
    group: Tensor,
    /// Each token's position in `B * L`, `[M * R]`.
    index: Tensor,
    /// Additive mask `[M, 1, R, P + R]`.
    mask: Tensor,
}

impl Tree {
    /// For sequences of `length` tokens: a prompt, then responses one behind the other, then padding.
    pub(crate) fn new(groups: &[(usize, Vec<usize>)], length: usize, device: Device) -> Self {
        let prompt = groups.iter().map(|g| g.0).max().unwrap_or(0);
        let longest = groups.iter().flat_map(|g| &g.1).copied().max().unwrap_or(0);
        let (mut group, mut index, mut prompts, mut lengths) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut assemble = Vec::with_capacity(groups.len() * length);
        for (g, (own, responses)) in groups.iter().enumerate() {
            let mut at = g * length + own;
            assemble.extend((0..*own).map(|i| (g * prompt + i) as i64));
            for &count in responses.iter().filter(|n| **n > 0) {
                let first = groups.len() * prompt + group.len() * longest;
                assemble.extend((0..count).map(|i| (first + i) as i64));
                index.extend((0..longest).map(|i| (at + i.min(count - 1)) as i64));
                group.push(g as i64);
                prompts.push(*own as i64);
                lengths.push(count as i64);
                at += count;
            }
            // Padding takes any row: nothing reads it.
            assemble.resize((g + 1) * length, 0);
        }
        let tensor = |values: &[i64]| Tensor::from_slice(values).to_device(device);
        let rows = (!group.is_empty()).then(|| Rows {
            longest: longest as i64,
            group: tensor(&group),
            index: tensor(&index),
            mask: row_mask(&tensor(&prompts), &tensor(&lengths), prompt as i64, longest as i64),
        });
        Self { prompt: prompt as i64, rows, assemble: tensor(&assemble) }
    }

    /// The same for numbers of another kind.
    pub(crate) fn of_kind(&self, kind: Kind) -> Self {
        let rows = self.rows.as_ref().map(|r| Rows {
            longest: r.longest,
            group: r.group.shallow_clone(),
            index: r.index.shallow_clone(),
            mask: r.mask.to_kind(kind),
        });
        Self { prompt: self.prompt, rows, assemble: self.assemble.shallow_clone() }
    }

    /// Attention of `q [B, Hq, L, d]` over `k, v [B, Hkv, L, d]`: `[B, L, Hq, d]`.
    pub(crate) fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        let size = q.size();
        let (b, heads, l, d) = (size[0], size[1], size[2], size[3]);
        let start = |t: &Tensor| t.narrow(2, 0, self.prompt);
        let prompts = sdpa(&start(q), &start(k), &start(v), None, true).transpose(1, 2).reshape([-1, heads * d]);
        let all = match &self.rows {
            None => prompts,
            Some(rows) => {
                let own = |t: &Tensor| {
                    let heads = t.size()[1];
                    // As an embedding: its gradient adds rows up faster than that of an index.
                    let flat = t.transpose(1, 2).reshape([b * l, heads * d]);
                    Tensor::embedding(&flat, &rows.index, -1, false, false)
                        .view([-1, rows.longest, heads, d])
                        .transpose(1, 2)
                };
                let behind = |t: &Tensor| Tensor::cat(&[start(t).index_select(0, &rows.group), own(t)], 2);
                let out = sdpa(&own(q), &behind(k), &behind(v), Some(&rows.mask), false);
                Tensor::cat(&[prompts, out.transpose(1, 2).reshape([-1, heads * d])], 0)
            }
        };
        Tensor::embedding(&all, &self.assemble, -1, false, false).view([b, l, heads, d])
    }
}

/// Open where a token of a response may look: at its prompt, and at itself and what came before it. What is padding looks at the
/// first token of the response, too.
fn row_mask(prompts: &Tensor, lengths: &Tensor, prompt: i64, longest: i64) -> Tensor {
    let device = prompts.device();
    let count = |n: i64| Tensor::arange(n, (Kind::Int64, device));
    let at_prompt = count(prompt).unsqueeze(0).lt_tensor(&prompts.unsqueeze(1)).view([-1, 1, 1, prompt]);
    let causal = count(longest).unsqueeze(0).le_tensor(&count(longest).unsqueeze(1));
    let real = count(longest).unsqueeze(0).lt_tensor(&lengths.unsqueeze(1)).view([-1, 1, 1, longest]);
    let own = causal.view([1, 1, longest, longest]).logical_and(&real);
    let open = Tensor::cat(&[at_prompt.expand([-1, 1, longest, prompt], false), own], -1);
    Tensor::zeros(open.size().as_slice(), (Kind::Float, device)).masked_fill(&open.logical_not(), f64::NEG_INFINITY)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Outputs and gradients equal those under the dense mask.
    #[test]
    fn the_tree_equals_its_dense_mask() {
        tch::manual_seed(4);
        let options = (Kind::Double, Device::Cpu);
        for groups in [
            vec![(5, vec![3, 1, 4]), (2, vec![2]), (7, vec![0, 6])],
            vec![(3, vec![]), (4, vec![])],
            vec![(1, vec![2, 2])],
        ] {
            let length = groups.iter().map(|(p, r)| p + r.iter().sum::<usize>()).max().unwrap();
            let (b, l) = (groups.len() as i64, length as i64);
            let tree = Tree::new(&groups, length, Device::Cpu).of_kind(Kind::Double);
            let leaf = |heads: i64| Tensor::randn([b, heads, l, 8], options).set_requires_grad(true);
            let (q, k, v) = (leaf(4), leaf(2), leaf(2));
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
                let mut at = *prompt;
                for count in responses {
                    (at..at + count).for_each(|i| row(i, at, i, *prompt));
                    at += count;
                }
                (at..length).for_each(|i| open[(g * length + i) * length + i] = true);
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
            let found = run(tree.attend(&q, &k, &v));
            let wanted = run(sdpa(&q, &k, &v, Some(&mask), false).transpose(1, 2));
            for (i, (a, b)) in found.iter().zip(&wanted).enumerate() {
                assert!((a - b).abs().max().double_value(&[]) < 1e-10, "{groups:?}: number {i}");
            }
        }
    }
}
