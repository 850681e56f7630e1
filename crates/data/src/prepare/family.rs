//! Model families, as far as data preparation differs: how they are told apart and how they write boxes.

use std::path::Path;

use serde::Deserialize;
use unveil_core::BoxForm;

use super::error::{PrepareError, read_json};

/// A model family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Family {
    /// Qwen2.5-VL: boxes in absolute pixels of the resized image.
    #[default]
    Qwen2_5Vl,
    /// Qwen3-VL: boxes in thousandths of the image's sides.
    Qwen3Vl,
}

#[derive(Deserialize)]
struct ModelType {
    model_type: Option<String>,
}

#[derive(Deserialize)]
struct ProcessorClass {
    processor_class: Option<String>,
}

impl Family {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Qwen2_5Vl, Self::Qwen3Vl];

    /// Its `model_type`, also its name in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qwen2_5Vl => "qwen2_5_vl",
            Self::Qwen3Vl => "qwen3_vl",
        }
    }

    /// The family of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|f| f.name() == name)
    }

    /// Its `processor_class`.
    pub fn processor_class(self) -> &'static str {
        match self {
            Self::Qwen2_5Vl => "Qwen2_5_VLProcessor",
            Self::Qwen3Vl => "Qwen3VLProcessor",
        }
    }

    /// Reads the family from `config.json`; where the weights are not there yet, from `processor_config.json` or
    /// `preprocessor_config.json`.
    pub fn detect(dir: &Path) -> Result<Self, PrepareError> {
        let config = dir.join("config.json");
        let (path, found, known) = if config.is_file() {
            let found = read_json::<ModelType>(&config)?.model_type;
            let known = found.as_deref().and_then(Self::named);
            (config, found, known)
        } else {
            let (path, found) = processor_class(dir)?;
            let known = Self::ALL.into_iter().find(|f| Some(f.processor_class()) == found.as_deref());
            (path, found, known)
        };
        known.ok_or_else(|| PrepareError::Family { path, found: found.unwrap_or_else(|| "(none)".to_owned()) })
    }

    /// How models of the family were taught to write boxes.
    pub fn box_form(self) -> BoxForm {
        match self {
            Self::Qwen2_5Vl => BoxForm::Absolute,
            Self::Qwen3Vl => BoxForm::PerMille,
        }
    }
}

/// The processor class that a directory names, and the file that names it or should.
fn processor_class(dir: &Path) -> Result<(std::path::PathBuf, Option<String>), PrepareError> {
    let whole = dir.join("processor_config.json");
    if whole.is_file()
        && let Some(class) = read_json::<ProcessorClass>(&whole)?.processor_class
    {
        return Ok((whole, Some(class)));
    }
    let path = dir.join("preprocessor_config.json");
    let class = read_json::<ProcessorClass>(&path)?.processor_class;
    Ok((path, class))
}
