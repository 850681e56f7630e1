//! Lengths of prompts and responses in tokens, as far as a configuration determines them.

use unveil_config::Config;
use unveil_config::schema::DataKind;

use crate::generation::GroupSize;
use crate::shape::ModelShape;

/// Image tokens that are assumed where neither configuration nor data bound them lower: about a megapixel.
pub(crate) const ASSUMED_IMAGE_TOKENS: u64 = 1280;
/// Tokens of the chat template and of a question.
const QUESTION_TOKENS: u64 = 64;
/// Characters per token of English text, at the least.
const CHARS_PER_TOKEN: usize = 4;

/// Lengths of one group at their highest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Workload {
    pub size: GroupSize,
    /// Patches of a prompt's image.
    pub patches: u64,
    /// Whether the number of image tokens is [`ASSUMED_IMAGE_TOKENS`] without a bound.
    pub assumed: bool,
}

impl Workload {
    /// Reads the configuration; `max_pixels` is the bound of the model directory, if it has one.
    pub(crate) fn of(config: &Config, shape: &ModelShape, max_pixels: Option<u64>) -> Self {
        let v = &shape.vision;
        let tokens = |pixels: u64| pixels.div_ceil(v.pixels_per_token.max(1)).max(1);
        let configured = (config.model.max_pixels > 0).then_some(config.model.max_pixels);
        let bound = configured.or(max_pixels).map(tokens);
        let (images, assumed) = match (config.data.kind, bound) {
            (DataKind::Synth, bound) => {
                let side = u64::from(config.data.synth.size);
                let pixels = (side * side).max(config.model.min_pixels);
                (tokens(pixels).min(bound.unwrap_or(u64::MAX)), false)
            }
            (_, Some(bound)) if configured.is_some() || bound <= ASSUMED_IMAGE_TOKENS => (bound, false),
            _ => (ASSUMED_IMAGE_TOKENS, true),
        };
        let prompt = &config.prompt;
        let chars = prompt.system.len() + prompt.template.len() + prompt.suffix.len();
        let text = QUESTION_TOKENS + chars.div_ceil(CHARS_PER_TOKEN) as u64;
        let size = GroupSize {
            n: config.rollout.n as u64,
            prompt: images + text,
            images,
            response: config.rollout.max_new_tokens as u64,
        };
        Self { size, patches: images * v.patches_per_token, assumed }
    }

    /// Returns the positions of a prompt with this number of responses.
    pub(crate) fn positions(&self, responses: u64) -> u64 {
        self.size.prompt + responses * self.size.response
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::shape_7b;

    fn images(sets: impl Fn(&mut Config), max_pixels: Option<u64>) -> (u64, bool) {
        let mut config = Config::default();
        config.data.kind = DataKind::Jsonl;
        sets(&mut config);
        let workload = Workload::of(&config, &shape_7b(), max_pixels);
        assert_eq!(workload.patches, 4 * workload.size.images);
        (workload.size.images, workload.assumed)
    }

    #[test]
    fn image_tokens_follow_the_pixel_bound() {
        assert_eq!(images(|c| c.model.max_pixels = 602_112, None), (768, false));
        assert_eq!(images(|c| c.model.max_pixels = 602_112, Some(12_845_056)), (768, false));
        assert_eq!(images(|_| (), Some(401_408)), (512, false));
        // The bound of a published directory is far above what images have.
        assert_eq!(images(|_| (), Some(12_845_056)), (ASSUMED_IMAGE_TOKENS, true));
        assert_eq!(images(|_| (), None), (ASSUMED_IMAGE_TOKENS, true));
    }

    #[test]
    fn synthetic_images_have_a_known_size() {
        let synth = |c: &mut Config| {
            c.data.kind = DataKind::Synth;
            c.data.synth.size = 448;
        };
        assert_eq!(images(synth, None), (256, false));
        assert_eq!(
            images(
                |c| {
                    synth(c);
                    c.model.max_pixels = 78_400
                },
                None
            ),
            (100, false)
        );
        assert_eq!(
            images(
                |c| {
                    synth(c);
                    c.model.min_pixels = 401_408
                },
                None
            ),
            (512, false)
        );
    }

    #[test]
    fn prompts_grow_with_their_text() {
        let mut config = Config::default();
        let short = Workload::of(&config, &shape_7b(), None).size.prompt;
        config.prompt.system = "x".repeat(400);
        assert_eq!(Workload::of(&config, &shape_7b(), None).size.prompt, short + 100);
    }
}
