//! Qwen2.5-VL writes boxes as absolute pixels of the resized image.

use unveil_core::BoxForm;

use super::{BoxCodec, Sizes};

/// Codec with integer pixels of the resized image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AbsoluteResized;

impl BoxCodec for AbsoluteResized {
    fn form(&self) -> BoxForm {
        BoxForm::Absolute
    }

    fn extent(&self, sizes: &Sizes) -> (f64, f64) {
        (f64::from(sizes.resized.0), f64::from(sizes.resized.1))
    }
}
