//! The image settings of `preprocessor_config.json`, validated at load time, and the rule for the resized size.
//!
//! Source: `Qwen2VLImageProcessor` and `smart_resize` of Hugging Face transformers 5.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer};
use unveil_data::image_store::MAX_PIXELS;

use super::Filter;
use crate::preprocess_error::PreprocessError;
use crate::preprocess_error::read_json;

/// Maximum ratio of longest to shortest side that the family accepts.
const MAX_ASPECT: f64 = 200.0;

/// Accepted image processor classes; they are names of the same class in different releases.
const PROCESSOR_CLASSES: [&str; 3] = ["Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2_5_VLImageProcessor"];

/// Validated settings of an image processor.
#[derive(Debug, Clone, PartialEq)]
pub struct ProcessorConfig {
    /// Side of a patch in pixels.
    pub patch_size: u32,
    /// Frames per patch; a still image is repeated that many times.
    pub temporal_patch_size: u32,
    /// Patches along one side of a merged cell (image token).
    pub merge_size: u32,
    /// Minimum number of pixels of a resized image.
    pub min_pixels: u64,
    /// Maximum number of pixels of a resized image.
    pub max_pixels: u64,
    /// Whether images are resized at all.
    pub do_resize: bool,
    /// Resampling filter.
    pub filter: Filter,
    /// Whether pixel values are multiplied by `rescale_factor`.
    pub do_rescale: bool,
    /// Factor for pixel values, usually 1/255.
    pub rescale_factor: f64,
    /// Whether pixel values are normalised by mean and standard deviation.
    pub do_normalize: bool,
    /// Mean of the rescaled values per channel.
    pub image_mean: [f64; 3],
    /// Standard deviation of the rescaled values per channel.
    pub image_std: [f64; 3],
}

/// Bounds of the number of pixels of resized images that replace those of a model directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PixelBounds {
    /// Minimum; `None` keeps the directory's.
    pub min: Option<u64>,
    /// Maximum; `None` keeps the directory's.
    pub max: Option<u64>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum PerChannel {
    One(f64),
    Each([f64; 3]),
}

#[derive(Deserialize)]
struct RawSize {
    shortest_edge: Option<u64>,
    longest_edge: Option<u64>,
    min_pixels: Option<u64>,
    max_pixels: Option<u64>,
}

/// A key that may be absent (the default applies), null, or a value: transformers treats null differently from an absent key.
type Nullable<T> = Option<Option<T>>;

fn nullable<'de, D: Deserializer<'de>, T: Deserialize<'de>>(d: D) -> Result<Nullable<T>, D::Error> {
    Option::deserialize(d).map(Some)
}

#[derive(Deserialize)]
struct RawConfig {
    #[serde(default, deserialize_with = "nullable")]
    patch_size: Nullable<u32>,
    #[serde(default, deserialize_with = "nullable")]
    temporal_patch_size: Nullable<u32>,
    #[serde(default, deserialize_with = "nullable")]
    merge_size: Nullable<u32>,
    min_pixels: Option<u64>,
    max_pixels: Option<u64>,
    size: Option<RawSize>,
    image_processor_type: Option<String>,
    #[serde(default, deserialize_with = "nullable")]
    do_resize: Nullable<bool>,
    #[serde(default, deserialize_with = "nullable")]
    resample: Nullable<u32>,
    #[serde(default, deserialize_with = "nullable")]
    do_rescale: Nullable<bool>,
    #[serde(default, deserialize_with = "nullable")]
    rescale_factor: Nullable<f64>,
    #[serde(default, deserialize_with = "nullable")]
    do_normalize: Nullable<bool>,
    #[serde(default, deserialize_with = "nullable")]
    image_mean: Nullable<PerChannel>,
    #[serde(default, deserialize_with = "nullable")]
    image_std: Nullable<PerChannel>,
}

#[derive(Deserialize)]
struct NestedConfig {
    image_processor: Option<RawConfig>,
}

impl ProcessorConfig {
    /// Loads `processor_config.json` if it has an `image_processor`, otherwise `preprocessor_config.json`, as transformers 5 does.
    pub fn load(dir: &Path) -> Result<Self, PreprocessError> {
        let nested = dir.join("processor_config.json");
        if nested.is_file()
            && let Some(raw) = read_json::<NestedConfig>(&nested)?.image_processor
        {
            return Self::validate(raw, nested);
        }
        let path = dir.join("preprocessor_config.json");
        Self::validate(read_json(&path)?, path)
    }

    fn validate(raw: RawConfig, path: PathBuf) -> Result<Self, PreprocessError> {
        let invalid =
            |key: &'static str, what: &str| PreprocessError::Config { path: path.clone(), key, what: what.to_owned() };
        let null = |key| invalid(key, "is null, but it must have a value");
        let side = |key: &'static str, value: Nullable<u32>, default: u32| match value.unwrap_or(Some(default)) {
            Some(v @ 1..=1024) => Ok(v),
            Some(v) => Err(invalid(key, &format!("is {v}, but it must be from 1 to 1024"))),
            None => Err(null(key)),
        };
        if let Some(other) = raw.image_processor_type.filter(|t| !PROCESSOR_CLASSES.contains(&t.as_str())) {
            return Err(invalid(
                "image_processor_type",
                &format!("is {other}, but supported are {}", PROCESSOR_CLASSES.join(", ")),
            ));
        }
        let flag = |value: Nullable<bool>| value.unwrap_or(Some(true)).unwrap_or(false);
        let (shortest, longest) = raw.size.map_or((Some(56 * 56), Some(28 * 28 * 1280)), |s| {
            (s.shortest_edge.or(s.min_pixels), s.longest_edge.or(s.max_pixels))
        });
        let min_pixels = raw.min_pixels.or(shortest).filter(|v| *v > 0);
        let max_pixels = raw.max_pixels.or(longest).filter(|v| *v > 0);
        let do_normalize = flag(raw.do_normalize);
        let channels = |key, value: Nullable<PerChannel>, default: [f64; 3]| {
            let v = match value {
                Some(None) if do_normalize => return Err(null(key)),
                None | Some(None) => default,
                Some(Some(PerChannel::One(v))) => [v; 3],
                Some(Some(PerChannel::Each(v))) => v,
            };
            if v.iter().all(|x| x.is_finite()) { Ok(v) } else { Err(invalid(key, "must be finite")) }
        };
        let config = Self {
            patch_size: side("patch_size", raw.patch_size, 14)?,
            temporal_patch_size: side("temporal_patch_size", raw.temporal_patch_size, 2)?,
            merge_size: side("merge_size", raw.merge_size, 2)?,
            min_pixels: min_pixels
                .ok_or_else(|| invalid("size", "needs `shortest_edge` (the minimum number of pixels), at least 1"))?,
            max_pixels: max_pixels
                .ok_or_else(|| invalid("size", "needs `longest_edge` (the maximum number of pixels), at least 1"))?,
            do_resize: flag(raw.do_resize),
            filter: match raw.resample.unwrap_or(Some(3)).ok_or_else(|| null("resample"))? {
                2 => Filter::Bilinear,
                3 => Filter::Bicubic,
                v => {
                    return Err(invalid(
                        "resample",
                        &format!("is {v}, but supported are 2 (bilinear) and 3 (bicubic)"),
                    ));
                }
            },
            do_rescale: flag(raw.do_rescale),
            rescale_factor: raw.rescale_factor.unwrap_or(Some(1.0 / 255.0)).ok_or_else(|| null("rescale_factor"))?,
            do_normalize,
            image_mean: channels("image_mean", raw.image_mean, [0.481_454_66, 0.457_827_5, 0.408_210_73])?,
            image_std: channels("image_std", raw.image_std, [0.268_629_54, 0.261_302_58, 0.275_777_11])?,
        };
        if !(config.rescale_factor.is_finite() && config.rescale_factor > 0.0) {
            return Err(invalid("rescale_factor", "must be a positive number"));
        }
        if config.do_normalize && config.image_std.contains(&0.0) {
            return Err(invalid("image_std", "must not be 0"));
        }
        Ok(config)
    }

    /// Replaces the bounds of the resize.
    ///
    /// # Errors
    /// Returns [`PreprocessError::Pixels`] if the resulting bounds contradict each other, leave no image token, or have no effect.
    pub fn bounded(self, bounds: PixelBounds) -> Result<Self, PreprocessError> {
        if bounds == PixelBounds::default() {
            return Ok(self);
        }
        let min = bounds.min.unwrap_or(self.min_pixels);
        let max = bounds.max.unwrap_or(self.max_pixels);
        let side = self.factor();
        let cell = u64::from(side) * u64::from(side);
        let what = if !self.do_resize {
            "model.min_pixels and model.max_pixels have no effect, because `do_resize` is off in the model directory: remove them".to_owned()
        } else if max < cell {
            format!(
                "model.max_pixels is {max}, but one image token stands for {side} x {side} pixels: use {cell} or more"
            )
        } else if min > MAX_PIXELS {
            format!("model.min_pixels is {min}: use at most {MAX_PIXELS}")
        } else if min > max {
            match (bounds.min, bounds.max) {
                (Some(_), None) => format!(
                    "model.min_pixels ({min}) is above the maximum of the model directory ({max}): set model.max_pixels too"
                ),
                (None, _) => format!(
                    "model.max_pixels ({max}) is below the minimum of the model directory ({min}): set model.min_pixels too"
                ),
                (Some(_), Some(_)) => format!("model.min_pixels ({min}) is above model.max_pixels ({max})"),
            }
        } else {
            return Ok(Self { min_pixels: min, max_pixels: max, ..self });
        };
        Err(PreprocessError::Pixels { what })
    }

    /// Returns the side of a merged cell in resized pixels.
    pub fn factor(&self) -> u32 {
        self.patch_size * self.merge_size
    }

    /// Returns the size `(width, height)` to which an image of size `(width, height)` is resized.
    pub fn resized_size(&self, (width, height): (u32, u32)) -> Result<(u32, u32), PreprocessError> {
        let factor = self.factor();
        if self.do_resize {
            let (h, w) = smart_resize(height, width, factor, self.min_pixels, self.max_pixels)?;
            return Ok((w, h));
        }
        if width == 0 || height == 0 || !width.is_multiple_of(factor) || !height.is_multiple_of(factor) {
            let what = format!("is not a multiple of {factor} pixels on both sides, and `do_resize` is off");
            return Err(PreprocessError::Size { width, height, what });
        }
        Ok((width, height))
    }
}

/// Returns a size `(height, width)` close to that of the image: multiples of `factor` with `min_pixels` to `max_pixels` pixels, if
/// rounding permits. Equal to the function of the same name in transformers.
pub fn smart_resize(
    height: u32,
    width: u32,
    factor: u32,
    min_pixels: u64,
    max_pixels: u64,
) -> Result<(u32, u32), PreprocessError> {
    if height == 0 || width == 0 {
        return Err(PreprocessError::Size { width, height, what: "has no pixels".to_owned() });
    }
    let h = f64::from(height);
    let w = f64::from(width);
    let f = f64::from(factor);
    let ratio = h.max(w) / h.min(w);
    if ratio > MAX_ASPECT {
        return Err(PreprocessError::Aspect { width, height, ratio });
    }
    let mut out_h = (h / f).round_ties_even() * f;
    let mut out_w = (w / f).round_ties_even() * f;
    if out_h * out_w > max_pixels as f64 {
        let beta = (h * w / max_pixels as f64).sqrt();
        out_h = f.max((h / beta / f).floor() * f);
        out_w = f.max((w / beta / f).floor() * f);
    } else if out_h * out_w < min_pixels as f64 {
        let beta = (min_pixels as f64 / (h * w)).sqrt();
        out_h = (h * beta / f).ceil() * f;
        out_w = (w * beta / f).ceil() * f;
    }
    if out_h * out_w > MAX_PIXELS as f64 {
        let what = format!(
            "would be resized to {out_w} x {out_h} pixels, which exceeds the limit of {MAX_PIXELS}: lower `min_pixels` or `max_pixels`"
        );
        return Err(PreprocessError::Size { width, height, what });
    }
    Ok((out_h as u32, out_w as u32))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(name: &str, text: &str) -> Result<ProcessorConfig, PreprocessError> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(name), text).unwrap();
        ProcessorConfig::load(dir.path())
    }

    #[test]
    fn defaults_and_both_spellings_of_pixel_limits() {
        let c = load("preprocessor_config.json", "{}").unwrap();
        assert_eq!((c.patch_size, c.merge_size, c.min_pixels, c.max_pixels), (14, 2, 3136, 1_003_520));
        let c = load("preprocessor_config.json", r#"{"min_pixels":10,"size":{"shortest_edge":5,"longest_edge":99}}"#)
            .unwrap();
        assert_eq!((c.min_pixels, c.max_pixels), (10, 99));
        let c = load("processor_config.json", r#"{"image_processor":{"patch_size":16}}"#).unwrap();
        assert_eq!(c.patch_size, 16);
    }

    #[test]
    fn published_and_saved_directories() {
        let c = load(
            "preprocessor_config.json",
            r#"{"size":{"shortest_edge":65536,"longest_edge":16777216},"patch_size":16}"#,
        );
        let c = c.unwrap();
        assert_eq!((c.min_pixels, c.max_pixels, c.factor()), (65_536, 16_777_216, 32));
        let both =
            r#"{"min_pixels":3136,"max_pixels":12845056,"size":{"shortest_edge":65536,"longest_edge":16777216}}"#;
        let c = load("preprocessor_config.json", both).unwrap();
        assert_eq!((c.min_pixels, c.max_pixels), (3136, 12_845_056));
        let nulls = r#"{"min_pixels":null,"max_pixels":null,"size":null,"do_normalize":null,"image_mean":null,"crop_size":null}"#;
        let c = load("preprocessor_config.json", nulls).unwrap();
        assert_eq!((c.min_pixels, c.max_pixels, c.do_normalize, c.do_rescale), (3136, 1_003_520, false, true));
    }

    #[test]
    fn errors_name_file_and_key() {
        let text = |r: Result<ProcessorConfig, PreprocessError>| r.unwrap_err().to_string();
        let missing = text(ProcessorConfig::load(Path::new("/no/such")));
        assert!(missing.contains("/no/such/preprocessor_config.json"), "{missing}");
        for (json, needle) in [
            ("{", "EOF"),
            (r#"{"patch_size":0}"#, "`patch_size`"),
            (r#"{"patch_size":"a"}"#, "invalid type"),
            (r#"{"resample":1}"#, "`resample`"),
            (r#"{"size":{"height":3}}"#, "`size`"),
            (r#"{"image_std":[0,1,1]}"#, "`image_std`"),
            (r#"{"rescale_factor":0}"#, "`rescale_factor`"),
            (r#"{"patch_size":null}"#, "`patch_size` is null"),
            (r#"{"image_mean":null}"#, "`image_mean` is null"),
            (r#"{"image_processor_type":"CLIPImageProcessor"}"#, "CLIPImageProcessor"),
        ] {
            let e = text(load("preprocessor_config.json", json));
            assert!(e.contains("preprocessor_config.json") && e.contains(needle), "{e}");
        }
    }

    #[test]
    fn bounds_replace_those_of_the_directory() {
        let c = load("preprocessor_config.json", "{}").unwrap();
        let bounded = |min, max| c.clone().bounded(PixelBounds { min, max });
        assert_eq!(bounded(None, None).unwrap(), c);
        let small = bounded(None, Some(50_176)).unwrap();
        assert_eq!((small.min_pixels, small.max_pixels), (3136, 50_176));
        let (w, h) = small.resized_size((2000, 1000)).unwrap();
        assert!(u64::from(w) * u64::from(h) <= 50_176, "{w} x {h}");
        let (w, h) = bounded(Some(200_704), None).unwrap().resized_size((60, 60)).unwrap();
        assert!(u64::from(w) * u64::from(h) >= 200_704, "{w} x {h}");
        for (min, max, needle) in [
            (None, Some(783), "model.max_pixels is 783"),
            (None, Some(1000), "model.max_pixels (1000) is below the minimum of the model directory (3136)"),
            (Some(2_000_000), None, "model.min_pixels (2000000) is above the maximum of the model directory (1003520)"),
            (Some(5000), Some(4000), "model.min_pixels (5000) is above model.max_pixels (4000)"),
            (Some(u64::MAX), Some(u64::MAX), "model.min_pixels is 18446744073709551615: use at most"),
        ] {
            let e = bounded(min, max).unwrap_err().to_string();
            assert!(e.contains(needle), "{e}");
        }
        let fixed = load("preprocessor_config.json", r#"{"do_resize":false}"#).unwrap();
        let e = fixed.bounded(PixelBounds { min: None, max: Some(50_176) }).unwrap_err().to_string();
        assert!(e.contains("do_resize") && e.contains("model.max_pixels"), "{e}");
    }

    #[test]
    fn sizes_by_hand() {
        assert_eq!(smart_resize(96, 96, 16, 9216, 12288).unwrap(), (96, 96));
        assert_eq!(smart_resize(480, 640, 16, 9216, 12288).unwrap(), (96, 128));
        assert_eq!(smart_resize(1, 1, 28, 3136, 1_003_520).unwrap(), (56, 56));
        assert!(matches!(smart_resize(1, 201, 28, 1, 100), Err(PreprocessError::Aspect { .. })));
        assert!(matches!(smart_resize(0, 5, 28, 1, 100), Err(PreprocessError::Size { .. })));
        assert!(matches!(smart_resize(10, 10, 28, u64::MAX, u64::MAX), Err(PreprocessError::Size { .. })));
    }
}
