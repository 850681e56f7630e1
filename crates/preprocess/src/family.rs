//! Model families as far as preprocessing differs between them: how to detect them and how they write boxes.

use std::path::Path;

use serde::Deserialize;
use unveil_core::BoxForm;

use crate::preprocess_error::{PreprocessError, read_json};

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
    /// All supported families.
    pub const ALL: [Self; 2] = [Self::Qwen2_5Vl, Self::Qwen3Vl];

    /// Returns the `model_type`, which is also the family's name in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qwen2_5Vl => "qwen2_5_vl",
            Self::Qwen3Vl => "qwen3_vl",
        }
    }

    /// Returns the family with this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|f| f.name() == name)
    }

    /// Returns the `processor_class`.
    pub fn processor_class(self) -> &'static str {
        match self {
            Self::Qwen2_5Vl => "Qwen2_5_VLProcessor",
            Self::Qwen3Vl => "Qwen3VLProcessor",
        }
    }

    /// Detects the family from `config.json` or, in a directory without one (weights not there yet), from `processor_config.json` or
    /// `preprocessor_config.json`.
    pub fn detect(dir: &Path) -> Result<Self, PreprocessError> {
        let config = dir.join("config.json");
        let (path, name, family) = if config.is_file() {
            let name = read_json::<ModelType>(&config)?.model_type;
            let family = name.as_deref().and_then(Self::named);
            (config, name, family)
        } else {
            let (path, name) = processor_class(dir)?;
            let family = Self::ALL.into_iter().find(|f| Some(f.processor_class()) == name.as_deref());
            (path, name, family)
        };
        family.ok_or_else(|| PreprocessError::Family {
            path,
            found: name.unwrap_or_else(|| "(none)".to_owned()),
            supported: Self::ALL.map(Self::name).join(", "),
        })
    }

    /// Returns the form in which models of the family were trained to write boxes.
    pub fn box_form(self) -> BoxForm {
        match self {
            Self::Qwen2_5Vl => BoxForm::Absolute,
            Self::Qwen3Vl => BoxForm::PerMille,
        }
    }
}

/// Returns the file that names the processor class, or should, and the class.
fn processor_class(dir: &Path) -> Result<(std::path::PathBuf, Option<String>), PreprocessError> {
    let combined = dir.join("processor_config.json");
    if combined.is_file()
        && let Some(class) = read_json::<ProcessorClass>(&combined)?.processor_class
    {
        return Ok((combined, Some(class)));
    }
    let path = dir.join("preprocessor_config.json");
    let class = read_json::<ProcessorClass>(&path)?.processor_class;
    Ok((path, class))
}
