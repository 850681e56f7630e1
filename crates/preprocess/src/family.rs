//! Detection of the model family of a directory.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use unveil_core::Family;

use crate::preprocess_error::{PreprocessError, read_json};

#[derive(Deserialize)]
struct ModelType {
    model_type: Option<String>,
}

#[derive(Deserialize)]
struct ProcessorClass {
    processor_class: Option<String>,
}

/// Returns the `processor_class` of a family.
pub fn processor_class(family: Family) -> &'static str {
    match family {
        Family::Qwen2_5Vl => "Qwen2_5_VLProcessor",
        Family::Qwen3Vl => "Qwen3VLProcessor",
    }
}

/// Detects the family from `config.json` or, in a directory without one (weights not there yet), from `processor_config.json` or
/// `preprocessor_config.json`.
///
/// # Errors
/// Returns [`PreprocessError::File`] or [`PreprocessError::Format`] if the file cannot be read, and [`PreprocessError::Family`] if it names
/// no supported family.
pub fn detect_family(dir: &Path) -> Result<Family, PreprocessError> {
    let config = dir.join("config.json");
    let (path, name, family) = if config.is_file() {
        let name = read_json::<ModelType>(&config)?.model_type;
        let family = name.as_deref().and_then(|name| name.parse::<Family>().ok());
        (config, name, family)
    } else {
        let (path, name) = stored_processor_class(dir)?;
        let family = Family::ALL.into_iter().find(|f| Some(processor_class(*f)) == name.as_deref());
        (path, name, family)
    };
    family.ok_or_else(|| PreprocessError::Family {
        path,
        found: name.unwrap_or_else(|| "(none)".to_owned()),
        supported: Family::ALL.map(Family::name).join(", "),
    })
}

/// Returns the file that names the processor class, or should, and the class.
fn stored_processor_class(dir: &Path) -> Result<(PathBuf, Option<String>), PreprocessError> {
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
