//! The supported model families.

/// A model family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// Qwen2.5-VL (arXiv 2502.13923).
    Qwen2_5Vl,
    /// Qwen3-VL, dense (arXiv 2511.21631).
    Qwen3Vl,
}

impl Family {
    /// All families.
    pub const ALL: [Self; 2] = [Self::Qwen2_5Vl, Self::Qwen3Vl];

    /// Returns the `model_type` in `config.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qwen2_5Vl => "qwen2_5_vl",
            Self::Qwen3Vl => "qwen3_vl",
        }
    }

    /// Returns the family of a `model_type`.
    ///
    /// # Errors
    /// Returns a message that lists the supported families.
    pub fn named(name: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|f| f.name() == name).ok_or_else(|| {
            let known: Vec<&str> = Self::ALL.iter().map(|f| f.name()).collect();
            format!("model_type `{name}` is not supported, supported: {}", known.join(", "))
        })
    }
}
