//! Modalities of the synthetic images.

use serde::{Deserialize, Serialize};

/// Modality of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Modality {
    /// Axial CT slice.
    Ct,
    /// Chest X-ray.
    Xray,
    /// Endoscopic view of mucosa.
    Endoscopy,
}

impl Modality {
    /// Returns the name used in records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ct => "ct",
            Self::Xray => "xray",
            Self::Endoscopy => "endoscopy",
        }
    }
}
