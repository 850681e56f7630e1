//! Names of the notations in which models write boxes. The codecs write and parse them.

use serde::{Deserialize, Serialize};

/// Notation of boxes in answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BoxForm {
    /// `[x1,y1,x2,y2]` in whole pixels of the resized image (Qwen2.5-VL).
    #[default]
    Absolute,
    /// `[x1,y1,x2,y2]` in thousandths of the image's sides (Qwen3-VL).
    PerMille,
    /// `(x1,y1),(x2,y2)` in thousandths, between Qwen2-VL's box tokens, after the label.
    Qwen2Vl,
    /// `[x1,y1,x2,y2]` as fractions of the image's sides with three decimals (LLaVA).
    Llava,
}

/// Error for a name that is not a box form.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a box form: use absolute, per_mille, qwen2_vl or llava")]
pub struct UnknownBoxForm(pub String);

impl BoxForm {
    /// All box forms.
    pub const ALL: [Self; 4] = [Self::Absolute, Self::PerMille, Self::Qwen2Vl, Self::Llava];

    /// Returns the name used in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Self::Absolute => "absolute",
            Self::PerMille => "per_mille",
            Self::Qwen2Vl => "qwen2_vl",
            Self::Llava => "llava",
        }
    }
}

impl std::fmt::Display for BoxForm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for BoxForm {
    type Err = UnknownBoxForm;

    fn from_str(name: &str) -> Result<Self, UnknownBoxForm> {
        Self::ALL.into_iter().find(|f| f.name() == name).ok_or_else(|| UnknownBoxForm(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_match_serde() {
        for form in BoxForm::ALL {
            assert_eq!(serde_json::to_value(form).unwrap(), form.name());
            assert_eq!(form.name().parse(), Ok(form));
        }
        let e = "pixels".parse::<BoxForm>().unwrap_err().to_string();
        assert!(e.contains("pixels") && BoxForm::ALL.iter().all(|f| e.contains(f.name())), "{e}");
    }
}
