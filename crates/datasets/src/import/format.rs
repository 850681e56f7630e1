//! Formats that can be imported, and their names on the command line.

/// A data set or an annotation format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// Pascal VOC folders.
    Voc,
    /// COCO detection JSON.
    Coco,
    /// YOLO text labels with `data.yaml`.
    Yolo,
    /// VGG Image Annotator, JSON or CSV.
    Via,
    /// DeepLesion (CT).
    DeepLesion,
    /// NIH ChestX-ray14 with its boxes.
    NihChestXray,
    /// TBX11K (tuberculosis in chest X-rays).
    Tbx11k,
    /// Kvasir-SEG boxes (polyps).
    KvasirSeg,
    /// Kidney stones in CT, a YOLO export.
    KidneyStone,
    /// Med-GRIT-270k conversations.
    MedGrit,
    /// SLAKE questions and boxes.
    Slake,
    /// VQA-RAD questions.
    VqaRad,
    /// PMC-VQA questions with choices.
    PmcVqa,
    /// OmniMedVQA questions with choices.
    OmniMedVqa,
    /// MedVH hallucination tests.
    MedVh,
    /// ms-swift `objects` lines.
    MsSwift,
    /// LLaVA conversations.
    Llava,
}

/// Error for a name that is not a format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no format \"{0}\"; the formats are {list}", list = Format::ALL.map(Format::name).join(", "))]
pub struct UnknownFormat(String);

impl Format {
    /// All formats.
    pub const ALL: [Self; 17] = [
        Self::Voc,
        Self::Coco,
        Self::Yolo,
        Self::Via,
        Self::DeepLesion,
        Self::NihChestXray,
        Self::Tbx11k,
        Self::KvasirSeg,
        Self::KidneyStone,
        Self::MedGrit,
        Self::Slake,
        Self::VqaRad,
        Self::PmcVqa,
        Self::OmniMedVqa,
        Self::MedVh,
        Self::MsSwift,
        Self::Llava,
    ];

    /// Returns the name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Voc => "voc",
            Self::Coco => "coco",
            Self::Yolo => "yolo",
            Self::Via => "via",
            Self::DeepLesion => "deeplesion",
            Self::NihChestXray => "nih-chest-xray",
            Self::Tbx11k => "tbx11k",
            Self::KvasirSeg => "kvasir-seg",
            Self::KidneyStone => "kidney-stone",
            Self::MedGrit => "med-grit",
            Self::Slake => "slake",
            Self::VqaRad => "vqa-rad",
            Self::PmcVqa => "pmc-vqa",
            Self::OmniMedVqa => "omnimedvqa",
            Self::MedVh => "medvh",
            Self::MsSwift => "ms-swift",
            Self::Llava => "llava",
        }
    }

    /// Returns whether the annotations name their images, which may then be in another folder; otherwise location decides.
    pub(super) fn names_images(self) -> bool {
        !matches!(self, Self::Voc | Self::Yolo | Self::KidneyStone | Self::Tbx11k)
    }

    /// Returns whether this is an annotation format: its records get the folder's name as `source`, those of a data set the format's name.
    pub(super) fn is_generic(self) -> bool {
        matches!(self, Self::Voc | Self::Coco | Self::Yolo | Self::Via | Self::MsSwift | Self::Llava)
    }
}

impl std::str::FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(name: &str) -> Result<Self, UnknownFormat> {
        Self::ALL.into_iter().find(|f| f.name() == name).ok_or_else(|| UnknownFormat(name.to_owned()))
    }
}
