//! Log-probabilities of tokens, shared by rollout and learner so that they agree: logits / T, banned tokens at minus infinity,
//! log-softmax, in fp32 or fp64.

use tch::Tensor;

use crate::layers::ops::activation_kind;

/// Returns logits for sampling `[.., V]`, in fp32 (or fp64 if they are): divided by the temperature, banned tokens at minus infinity. A
/// temperature of 0 (greedy) counts as 1.
pub fn masked_logits(logits: &Tensor, temperature: f64, banned: &[u32]) -> Tensor {
    let wide = logits.to_kind(activation_kind(logits.kind()));
    // Not in place, which would change the caller's logits.
    let out = if temperature > 0.0 && temperature != 1.0 { &wide / temperature } else { wide };
    let vocab = logits.size().last().copied().unwrap_or(0);
    let ids: Vec<i64> = banned.iter().map(|t| i64::from(*t)).filter(|t| *t < vocab).collect();
    if ids.is_empty() {
        return out;
    }
    out.index_fill(-1, &Tensor::from_slice(&ids).to_device(logits.device()), f64::NEG_INFINITY)
}

/// Returns the log-probabilities of every token `[.., V]`, at least fp32.
pub fn log_softmax(logits: &Tensor, temperature: f64, banned: &[u32]) -> Tensor {
    let logits = masked_logits(logits, temperature, banned);
    logits.log_softmax(-1, logits.kind())
}

/// Returns the log-probabilities `[N]` of `targets [N]` under `logits [N, V]`.
pub fn logprobs(logits: &Tensor, targets: &Tensor, temperature: f64, banned: &[u32]) -> Tensor {
    pick(&log_softmax(logits, temperature, banned), targets)
}

/// Returns the entropy `[..]` in nats of log-probabilities `[.., V]`; tokens with probability 0 contribute nothing.
pub fn entropy(log_probs: &Tensor) -> Tensor {
    // exp(-inf) * -inf is NaN, and so is its gradient: clamp first.
    let finite = log_probs.clamp_min(-1e4);
    -(finite.exp() * &finite).sum_dim_intlist([-1i64].as_slice(), false, finite.kind())
}

/// Returns [`logprobs`] and [`entropy`] from one softmax.
pub fn logprobs_entropy(logits: &Tensor, targets: &Tensor, temperature: f64, banned: &[u32]) -> (Tensor, Tensor) {
    let all = log_softmax(logits, temperature, banned);
    (pick(&all, targets), entropy(&all))
}

fn pick(log_probs: &Tensor, targets: &Tensor) -> Tensor {
    log_probs.gather(-1, &targets.unsqueeze(-1), false).squeeze_dim(-1)
}
