//! Memory of the activations of a forward and backward pass.
//!
//! The counts are the tensors that autograd keeps, as the operations of `unveil-model` create them; two tensors that share memory count
//! once. Attention keeps queries, keys, values, output and log-sum-exp, never scores.

use crate::shape::ModelShape;

/// Rows of logits computed at a time under recomputation.
pub const HEAD_ROWS: u64 = 1024;

/// Size of one pass.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PassSize {
    /// Positions of all sequences, padding included.
    pub positions: u64,
    /// Response tokens whose log-probabilities are computed.
    pub tokens: u64,
    /// Image patches.
    pub patches: u64,
    /// Whether the entropy of each distribution is computed beside the log-probability.
    pub entropy: bool,
}

/// Bytes per value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Numerics {
    /// Size of a weight.
    pub weight: u64,
    /// Size of an activation.
    pub activation: u64,
    /// Size of the operand that a matrix product keeps for its backward pass; less than `activation` if operands are rounded.
    pub operand: u64,
    /// Size of a key or value in the KV cache.
    pub cache: u64,
    /// Whether an RMS norm keeps its normalised input, as libtorch does on the CPU.
    pub keeps_normalised: bool,
}

/// Parts of a model that are trained.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TrainedParts {
    /// Whether weights of the decoder are trained.
    pub decoder: bool,
    /// Whether weights or adapters of the vision tower are trained; otherwise it keeps no activations.
    pub vision: bool,
    /// Rank of the adapters; 0 without.
    pub adapter_rank: u64,
}

/// Bytes of the activations of one pass.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Activations {
    /// Kept by the decoder from the forward pass until the backward pass.
    pub decoder: u64,
    /// Kept by the vision tower.
    pub vision: u64,
    /// Peak of the logits and their derivatives.
    pub head: u64,
    /// Gradients within the backward pass of one decoder layer, and with recomputation its activations.
    pub layer: u64,
    /// [`Activations::layer`] for one block of the vision tower.
    pub block: u64,
}

/// Kept values of a layer, by kind of value.
struct LayerValues {
    activations: u64,
    operands: u64,
    /// Gradients that exist at the same time in its backward pass.
    gradients: u64,
}

impl LayerValues {
    fn bytes(&self, n: &Numerics) -> u64 {
        self.activations * n.activation + self.operands * n.operand
    }

    fn gradient_bytes(&self, n: &Numerics) -> u64 {
        self.gradients * n.activation
    }
}

/// Widths of a layer.
struct LayerWidths {
    residual: u64,
    /// All query heads.
    queries: u64,
    /// All key heads; as many values.
    keys: u64,
    mlp: u64,
    gated: bool,
    /// Norms that keep their normalised input.
    kept_norms: u64,
}

impl LayerWidths {
    /// Returns the values that a position keeps. The residual stream is kept before each of the two norms, their outputs as operands;
    /// queries and keys before and after rotation, values, the output of attention; the MLP's inner values before and after activation.
    fn values(&self, n: &Numerics) -> LayerValues {
        let qkv = self.queries + 2 * self.keys;
        // With narrow operands attention keeps rounded copies; otherwise it shares the memory of the rotated values.
        let narrow = n.operand < n.activation;
        let attention = if narrow { 0 } else { qkv + self.queries + self.keys };
        let attention_operands = if narrow { qkv + self.queries } else { 0 };
        let inner = if self.gated { 3 } else { 1 };
        LayerValues {
            activations: (2 + self.kept_norms) * self.residual + self.queries + attention + inner * self.mlp,
            operands: 2 * self.residual + attention_operands + self.mlp,
            gradients: 2 * self.residual + if self.gated { 4 } else { 2 } * self.mlp,
        }
    }
}

impl PassSize {
    /// Returns the size of a pass over `groups` groups of equal size, each a prompt and `n` responses.
    pub fn of_groups(groups: u64, prompt: u64, responses: (u64, u64), patches: u64) -> Self {
        let (n, length) = responses;
        Self {
            positions: groups * (prompt + n * length),
            tokens: groups * n * length,
            patches: groups * patches,
            entropy: true,
        }
    }
}

impl Activations {
    /// Computes the activations of a pass.
    pub fn of(
        shape: &ModelShape,
        pass: &PassSize,
        numerics: &Numerics,
        trained: &TrainedParts,
        recompute: bool,
    ) -> Self {
        let n = numerics;
        let norms = |trained: bool, rms: bool| if trained && rms && n.keeps_normalised { 2 } else { 0 };
        let layer = LayerWidths {
            residual: shape.hidden,
            queries: shape.heads * shape.head_dim,
            keys: shape.kv_heads * shape.head_dim,
            mlp: shape.intermediate,
            gated: true,
            kept_norms: norms(trained.decoder, true),
        }
        .values(n);
        let v = &shape.vision;
        let block = LayerWidths {
            residual: v.hidden,
            queries: v.hidden,
            keys: v.hidden,
            mlp: v.intermediate,
            gated: v.gated,
            kept_norms: norms(trained.vision, v.gated),
        }
        .values(n);
        // Each of the seven adapted matrices keeps the product with its first factor.
        let layer_bytes = layer.bytes(n) + 7 * trained.adapter_rank * n.activation;
        let input_bytes = |width: u64| width * n.activation;
        let per_layer = if recompute { input_bytes(shape.hidden) } else { layer_bytes };
        let per_block = if recompute { input_bytes(v.hidden) } else { block.bytes(n) };
        let backward = |kept: u64, gradients: u64| gradients + if recompute { kept } else { 0 };
        // Pixels and embedding of the patches; the mergers keep four values of the tower's width per patch.
        let ends = v.patch_values + (1 + 4 * (1 + v.deepstack)) * v.hidden;
        let vision = if trained.vision {
            pass.patches * (v.depth * per_block + ends * n.activation)
        } else {
            pass.patches * v.patch_values * n.activation
        };
        let rows = if recompute { pass.tokens.min(HEAD_ROWS) } else { pass.tokens };
        Self {
            // The last norm keeps its input and output of the rows that are predicted.
            decoder: pass.positions * shape.layers * per_layer + 4 * pass.tokens * shape.hidden * n.activation,
            vision,
            head: head_bytes(shape, rows, pass.entropy, n),
            layer: pass.positions * backward(layer_bytes, layer.gradient_bytes(n)),
            block: if trained.vision { pass.patches * backward(block.bytes(n), block.gradient_bytes(n)) } else { 0 },
        }
    }

    /// Returns the bytes at the end of the forward pass, where they are highest.
    pub fn peak(&self) -> u64 {
        self.decoder + self.vision + self.head.max(self.layer)
    }
}

/// Returns the bytes of `rows` rows of logits with what is needed of them at the same time. For the log-probabilities: the logits (later their
/// gradient), the log-probabilities, and the gradient of these. For the entropy: logits, log-probabilities, these without infinities,
/// probabilities, and their product. Narrow output matrices are widened, unless operands are as narrow.
fn head_bytes(shape: &ModelShape, rows: u64, entropy: bool, n: &Numerics) -> u64 {
    let widened = if n.weight < n.operand { shape.vocab * shape.hidden * n.activation } else { 0 };
    let copies = if entropy { 5 } else { 3 };
    copies * rows * shape.vocab * n.activation + widened
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::shape_7b;

    const FP32_CPU: Numerics = Numerics { weight: 4, activation: 4, operand: 4, cache: 4, keeps_normalised: true };
    const BF16: Numerics = Numerics { weight: 2, activation: 4, operand: 2, cache: 2, keeps_normalised: false };
    const ALL: TrainedParts = TrainedParts { decoder: true, vision: true, adapter_rank: 0 };

    /// The layer of 640 values with 10 heads of 64, 2 key heads and an MLP of 2560 of which libtorch 2.11 was asked, by hooks on saved
    /// tensors, to list what it keeps for a backward pass.
    #[test]
    fn kept_values_equal_those_listed_by_libtorch() {
        let decoder = LayerWidths { residual: 640, queries: 640, keys: 128, mlp: 2560, gated: true, kept_norms: 2 };
        let values = decoder.values(&FP32_CPU);
        // Without log-sum-exp (10), inverse norms (2) and copies of weights (560 + 3200 per position).
        assert_eq!(values.activations + values.operands, 20_156 - 560 - 3200 - 12);
        let frozen = LayerWidths { kept_norms: 0, ..decoder }.values(&FP32_CPU);
        // 7 adapters of rank 16, of which libtorch lists each; without norms' normalised inputs.
        assert_eq!(frozen.activations + frozen.operands + 7 * 16, 15_228 - 12);
        let block = LayerWidths { residual: 384, queries: 384, keys: 384, mlp: 1024, gated: true, kept_norms: 2 };
        let values = block.values(&FP32_CPU);
        assert_eq!(values.activations + values.operands, 8712 - 8);
        let plain = LayerWidths { gated: false, kept_norms: 0, ..block }.values(&FP32_CPU);
        assert_eq!(plain.activations + plain.operands, 4 * 384 + 768 + 1152 + 384 + 2 * 1024);
    }

    #[test]
    fn recomputation_keeps_a_fraction() {
        let shape = shape_7b();
        let pass = PassSize::of_groups(4, 1400, (8, 256), 4 * 1280);
        let kept = Activations::of(&shape, &pass, &BF16, &ALL, false);
        let recomputed = Activations::of(&shape, &pass, &BF16, &ALL, true);
        assert!(recomputed.decoder * 10 < kept.decoder, "{recomputed:?} {kept:?}");
        assert!(recomputed.vision * 4 < kept.vision && recomputed.head * 4 < kept.head);
        assert!(recomputed.layer > kept.layer, "a recomputed layer exists in its backward pass");
    }

    #[test]
    fn frozen_tower_keeps_nothing_but_its_input() {
        let shape = shape_7b();
        let pass = PassSize::of_groups(1, 1400, (8, 256), 4 * 1280);
        let adapters = TrainedParts { decoder: false, vision: false, adapter_rank: 16 };
        let frozen = Activations::of(&shape, &pass, &FP32_CPU, &adapters, false);
        let all = Activations::of(&shape, &pass, &FP32_CPU, &ALL, false);
        assert_eq!(frozen.vision, pass.patches * 1176 * 4);
        assert!(frozen.decoder < all.decoder && frozen.block == 0);
    }
}
