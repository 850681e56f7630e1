//! The supported model families.

use crate::answer::AnswerForm;
use crate::boxes::BoxForm;

/// A model family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// Qwen2.5-VL (arXiv 2502.13923): boxes in absolute pixels of the resized image.
    Qwen2_5Vl,
    /// Qwen3-VL, dense (arXiv 2511.21631): boxes in thousandths of the image's sides.
    Qwen3Vl,
}

/// Error for a `model_type` that is not a supported family.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("model_type `{0}` is not supported, supported: {known}", known = Family::ALL.map(Family::name).join(", "))]
pub struct UnknownFamily(pub String);

impl Family {
    /// All families.
    pub const ALL: [Self; 2] = [Self::Qwen2_5Vl, Self::Qwen3Vl];

    /// Returns the `model_type` in `config.json`, which is also the family's name in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qwen2_5Vl => "qwen2_5_vl",
            Self::Qwen3Vl => "qwen3_vl",
        }
    }

    /// Returns the form in which models of the family were trained to write boxes.
    pub fn box_form(self) -> BoxForm {
        match self {
            Self::Qwen2_5Vl => BoxForm::Absolute,
            Self::Qwen3Vl => BoxForm::PerMille,
        }
    }

    /// Returns the form in which published instruction-tuned models of the family answer when they are asked for boxes.
    pub fn published_answer_form(self) -> AnswerForm {
        match self {
            Self::Qwen2_5Vl | Self::Qwen3Vl => AnswerForm::Json,
        }
    }
}

impl std::str::FromStr for Family {
    type Err = UnknownFamily;

    fn from_str(name: &str) -> Result<Self, UnknownFamily> {
        Self::ALL.into_iter().find(|f| f.name() == name).ok_or_else(|| UnknownFamily(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_found_by_name() {
        for family in Family::ALL {
            assert_eq!(family.name().parse(), Ok(family));
        }
        for unknown in ["llava", "", "Qwen3_VL"] {
            let e = unknown.parse::<Family>().unwrap_err().to_string();
            let names_all = Family::ALL.iter().all(|f| e.contains(f.name()));
            assert!(e.contains(&format!("`{unknown}`")) && names_all, "{e}");
        }
    }
}
