//! Sizes of a model. `unveil-model` fills them from `config.json` or a preset.

use unveil_core::{selects_layer, selects_parameter};

/// Sizes of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelShape {
    /// Decoder layers.
    pub layers: u64,
    /// Width of the decoder's residual stream.
    pub hidden: u64,
    /// Width of the decoder's gated MLP.
    pub intermediate: u64,
    /// Query heads.
    pub heads: u64,
    /// Key/value heads.
    pub kv_heads: u64,
    /// Size of one attention head.
    pub head_dim: u64,
    /// Rows of the embedding matrix.
    pub vocab: u64,
    /// Vision tower.
    pub vision: VisionShape,
    /// All parameters; a tied output matrix is not listed.
    pub parameters: Vec<ParameterShape>,
}

/// Sizes of a vision tower.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VisionShape {
    /// Blocks.
    pub depth: u64,
    /// Width of the residual stream.
    pub hidden: u64,
    /// Width of the MLP.
    pub intermediate: u64,
    /// Whether the MLP is gated and the norms are RMS norms (Qwen2.5-VL), or a plain MLP with layer norms (Qwen3-VL).
    pub gated: bool,
    /// Values of one patch.
    pub patch_values: u64,
    /// Patches per image token.
    pub patches_per_token: u64,
    /// Pixels per image token.
    pub pixels_per_token: u64,
    /// Blocks whose features enter the first decoder layers.
    pub deepstack: u64,
}

/// Name and dimensions of a parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParameterShape {
    /// Name in the model.
    pub name: String,
    /// Dimensions.
    pub dimensions: Vec<u64>,
}

/// Part of a model that a parameter belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Vision,
    Layer,
    /// Embedding, last norm and output matrix.
    Outside,
}

impl ParameterShape {
    /// Returns the number of values.
    pub fn count(&self) -> u64 {
        self.dimensions.iter().product()
    }

    pub(crate) fn part(&self) -> Part {
        match self.name.as_str() {
            name if name.starts_with("visual.") => Part::Vision,
            name if name.starts_with("model.layers.") => Part::Layer,
            _ => Part::Outside,
        }
    }

    /// Returns the name of the linear layer of which this is the matrix, if an adapter can be attached to it.
    fn linear_layer(&self) -> Option<&str> {
        let layer = self.name.strip_suffix(".weight")?;
        let table = ["embed_tokens", "pos_embed", "lm_head"].iter().any(|t| layer.ends_with(t));
        (self.dimensions.len() == 2 && !table).then_some(layer)
    }
}

/// Numbers of parameters by part.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Vision tower and merger.
    pub vision: u64,
    /// All decoder layers.
    pub layers: u64,
    /// Embedding, last norm and output matrix.
    pub outside: u64,
}

impl Counts {
    /// Returns the sum.
    pub fn total(&self) -> u64 {
        self.vision + self.layers + self.outside
    }

    fn add(&mut self, part: Part, count: u64) {
        match part {
            Part::Vision => self.vision += count,
            Part::Layer => self.layers += count,
            Part::Outside => self.outside += count,
        }
    }
}

impl ModelShape {
    /// Counts the parameters whose name `filter` accepts.
    pub fn count(&self, filter: impl Fn(&str) -> bool) -> Counts {
        let mut counts = Counts::default();
        for p in self.parameters.iter().filter(|p| filter(&p.name)) {
            counts.add(p.part(), p.count());
        }
        counts
    }

    /// Counts the parameters that none of `frozen` selects.
    pub fn count_unfrozen(&self, frozen: &[String]) -> Counts {
        self.count(|name| !frozen.iter().any(|selector| selects_parameter(selector, name)))
    }

    /// Counts the parameters of adapters of rank `rank` on the layers that `targets` select, and the parameters of these layers' matrices.
    pub fn count_adapters(&self, targets: &[String], rank: u64) -> (Counts, Counts) {
        let mut adapters = Counts::default();
        let mut adapted = Counts::default();
        for p in &self.parameters {
            let Some(layer) = p.linear_layer() else { continue };
            if targets.iter().any(|target| selects_layer(target, layer)) {
                adapters.add(p.part(), rank * p.dimensions.iter().sum::<u64>());
                adapted.add(p.part(), p.count());
            }
        }
        (adapters, adapted)
    }

    /// Returns the values of keys and values per position, over all layers.
    pub fn kv_values(&self) -> u64 {
        self.layers * 2 * self.kv_heads * self.head_dim
    }
}

#[cfg(test)]
mod tests {
    use crate::fixture::shape_7b;

    #[test]
    fn parameters_are_counted_by_part() {
        let shape = shape_7b();
        let all = shape.count(|_| true);
        // Published: 8.29 B, of which the decoder with embedding and output matrix has 7.62 B.
        assert_eq!(all.total(), 8_292_166_656);
        assert_eq!(all.layers + all.outside, 7_615_616_512);
        assert_eq!(shape.count_unfrozen(&["vision_tower".into(), "merger".into()]).total(), 7_615_616_512);
        assert_eq!(shape.count_unfrozen(&["language_model".into(), "visual.".into()]).total(), 0);
    }

    #[test]
    fn adapters_are_counted() {
        let shape = shape_7b();
        let words = |w: &[&str]| w.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        // Per layer and rank: q and o 3584 + 3584 each, k and v 3584 + 512 each, gate, up and down 3584 + 18944 each.
        let all = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
        let (adapters, adapted) = shape.count_adapters(&words(&all[..]), 16);
        assert_eq!(adapters.total(), 16 * 28 * (2 * 7168 + 2 * 4096 + 3 * 22_528));
        assert_eq!(adapted.total(), 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18_944));
        let (visual, _) = shape.count_adapters(&words(&["visual.*.qkv"]), 8);
        assert_eq!((visual.vision, visual.layers), (8 * 32 * (1280 + 3840), 0));
        assert_eq!(shape.count_adapters(&words(&["embed_tokens", "lm_head"]), 8).0.total(), 0);
    }

    #[test]
    fn keys_and_values_per_position() {
        assert_eq!(shape_7b().kv_values(), 28 * 2 * 4 * 128);
    }
}
