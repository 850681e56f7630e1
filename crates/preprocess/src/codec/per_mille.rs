//! Qwen3-VL writes boxes in thousandths of the image's sides, independent of its size.

use unveil_core::BoxForm;

use super::{BoxCodec, Sizes};

/// Codec with integers from 0 to 1000.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PerMille;

impl BoxCodec for PerMille {
    fn form(&self) -> BoxForm {
        BoxForm::PerMille
    }

    fn extent(&self, _: &Sizes) -> (f64, f64) {
        (1000.0, 1000.0)
    }
}
