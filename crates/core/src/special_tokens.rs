//! The special tokens that tokenizer and model configuration must agree on.

/// Ids of the special tokens of the Qwen families.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpecialTokens {
    /// `<|image_pad|>`, one per image token.
    pub image_pad: u32,
    /// `<|video_pad|>`.
    pub video_pad: u32,
    /// `<|vision_start|>`.
    pub vision_start: u32,
    /// `<|vision_end|>`.
    pub vision_end: u32,
    /// `<|im_start|>`, starts a message.
    pub im_start: u32,
    /// `<|im_end|>`, ends a message: the end token of an answer.
    pub im_end: u32,
    /// `<|endoftext|>`, also used for padding.
    pub end_of_text: u32,
}

impl SpecialTokens {
    /// Returns the ids of image and video placeholders and of vision markup, which are never sampled.
    pub fn vision(&self) -> [u32; 4] {
        [self.image_pad, self.video_pad, self.vision_start, self.vision_end]
    }

    /// Returns all ids.
    pub fn all(&self) -> [u32; 7] {
        let [image, video, start, end] = self.vision();
        [image, video, start, end, self.im_start, self.im_end, self.end_of_text]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_id_is_listed_once() {
        let special = SpecialTokens {
            image_pad: 1,
            video_pad: 2,
            vision_start: 3,
            vision_end: 4,
            im_start: 5,
            im_end: 6,
            end_of_text: 7,
        };
        assert_eq!(special.vision(), [1, 2, 3, 4]);
        assert_eq!(special.all(), [1, 2, 3, 4, 5, 6, 7]);
    }
}
