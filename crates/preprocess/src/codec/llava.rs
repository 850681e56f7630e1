//! LLaVA writes boxes as fractions of the image's sides, with up to three decimals.

use unveil_core::{BoxForm, format_answer};

use super::{BoxCodec, Sizes};

/// Codec with numbers from 0.0 to 1.0 as Python writes them: `[0.12,0.34,0.56,1.0]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fractions;

impl BoxCodec for Fractions {
    fn form(&self) -> BoxForm {
        BoxForm::Llava
    }

    fn extent(&self, _: &Sizes) -> (f64, f64) {
        (1.0, 1.0)
    }

    fn steps_per_unit(&self) -> f64 {
        1000.0
    }

    fn number(&self, code: i64) -> String {
        format!("{:?}", code as f64 / self.steps_per_unit())
    }

    fn write(&self, codes: &[[i64; 4]], category: &str) -> String {
        let boxes: Vec<[String; 4]> = codes.iter().map(|b| b.map(|v| self.number(v))).collect();
        format_answer(&boxes, category)
    }
}
