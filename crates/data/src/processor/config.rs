//! The image part of `preprocessor_config.json`, read and checked once, and the rule that chooses the resized size.
//!
//! Source: `Qwen2VLImageProcessor` and `smart_resize` of Hugging Face transformers 5.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer};

use super::Filter;
use crate::prepare::PrepareError;
use crate::prepare::error::read_json;
use crate::store::MAX_PIXELS;

/// Longest side over shortest side that the family accepts.
const MAX_ASPECT: f64 = 200.0;

/// Image processor classes that do the same: names that the class has had.
const PROCESSORS: [&str; 3] = ["Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2_5_VLImageProcessor"];

/// Settings of an image processor, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct ProcessorConfig {
    /// Side of a patch in pixels.
    pub patch_size: u32,
    /// Frames per patch; a still image is repeated that often.
    pub temporal_patch_size: u32,
    /// Patches along one side of a merged cell (image token).
    pub merge_size: u32,
    /// Fewest pixels of a resized image.
    pub min_pixels: u64,
    /// Most pixels of a resized image.
    pub max_pixels: u64,
    /// Whether images are resized at all.
    pub do_resize: bool,
    /// How they are resampled.
    pub filter: Filter,
    /// Whether levels are multiplied by `rescale_factor`.
    pub do_rescale: bool,
    /// Usually 1/255.
    pub rescale_factor: f64,
    /// Whether mean and deviation are taken out.
    pub do_normalize: bool,
    /// Mean per channel, of rescaled levels.
    pub image_mean: [f64; 3],
    /// Standard deviation per channel, of rescaled levels.
    pub image_std: [f64; 3],
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

/// A key that may be absent (the default stands), null, or a value: in transformers null is a value of its own.
type Given<T> = Option<Option<T>>;

fn given<'de, D: Deserializer<'de>, T: Deserialize<'de>>(d: D) -> Result<Given<T>, D::Error> {
    Option::deserialize(d).map(Some)
}

#[derive(Deserialize)]
struct Raw {
    #[serde(default, deserialize_with = "given")]
    patch_size: Given<u32>,
    #[serde(default, deserialize_with = "given")]
    temporal_patch_size: Given<u32>,
    #[serde(default, deserialize_with = "given")]
    merge_size: Given<u32>,
    min_pixels: Option<u64>,
    max_pixels: Option<u64>,
    size: Option<RawSize>,
    image_processor_type: Option<String>,
    #[serde(default, deserialize_with = "given")]
    do_resize: Given<bool>,
    #[serde(default, deserialize_with = "given")]
    resample: Given<u32>,
    #[serde(default, deserialize_with = "given")]
    do_rescale: Given<bool>,
    #[serde(default, deserialize_with = "given")]
    rescale_factor: Given<f64>,
    #[serde(default, deserialize_with = "given")]
    do_normalize: Given<bool>,
    #[serde(default, deserialize_with = "given")]
    image_mean: Given<PerChannel>,
    #[serde(default, deserialize_with = "given")]
    image_std: Given<PerChannel>,
}

#[derive(Deserialize)]
struct Nested {
    image_processor: Option<Raw>,
}

impl ProcessorConfig {
    /// Reads `processor_config.json` if it holds an `image_processor`, else `preprocessor_config.json`, as transformers 5 does.
    pub fn load(dir: &Path) -> Result<Self, PrepareError> {
        let nested = dir.join("processor_config.json");
        if nested.is_file()
            && let Some(raw) = read_json::<Nested>(&nested)?.image_processor
        {
            return Self::check(raw, nested);
        }
        let path = dir.join("preprocessor_config.json");
        Self::check(read_json(&path)?, path)
    }

    fn check(raw: Raw, path: PathBuf) -> Result<Self, PrepareError> {
        let bad =
            |key: &'static str, what: &str| PrepareError::Config { path: path.clone(), key, what: what.to_owned() };
        let null = |key| bad(key, "is null, it must have a value");
        let side = |key: &'static str, value: Given<u32>, default: u32| match value.unwrap_or(Some(default)) {
            Some(v @ 1..=1024) => Ok(v),
            Some(v) => Err(bad(key, &format!("is {v}, it must be from 1 to 1024"))),
            None => Err(null(key)),
        };
        if let Some(other) = raw.image_processor_type.filter(|t| !PROCESSORS.contains(&t.as_str())) {
            return Err(bad("image_processor_type", &format!("is {other}, supported are {}", PROCESSORS.join(", "))));
        }
        let flag = |value: Given<bool>| value.unwrap_or(Some(true)).unwrap_or(false);
        let (shortest, longest) = raw.size.map_or((Some(56 * 56), Some(28 * 28 * 1280)), |s| {
            (s.shortest_edge.or(s.min_pixels), s.longest_edge.or(s.max_pixels))
        });
        let min_pixels = raw.min_pixels.or(shortest).filter(|v| *v > 0);
        let max_pixels = raw.max_pixels.or(longest).filter(|v| *v > 0);
        let do_normalize = flag(raw.do_normalize);
        let channels = |key, value: Given<PerChannel>, default: [f64; 3]| {
            let v = match value {
                Some(None) if do_normalize => return Err(null(key)),
                None | Some(None) => default,
                Some(Some(PerChannel::One(v))) => [v; 3],
                Some(Some(PerChannel::Each(v))) => v,
            };
            if v.iter().all(|x| x.is_finite()) { Ok(v) } else { Err(bad(key, "must be finite")) }
        };
        let out = Self {
            patch_size: side("patch_size", raw.patch_size, 14)?,
            temporal_patch_size: side("temporal_patch_size", raw.temporal_patch_size, 2)?,
            merge_size: side("merge_size", raw.merge_size, 2)?,
            min_pixels: min_pixels
                .ok_or_else(|| bad("size", "needs `shortest_edge` (the fewest pixels), at least 1"))?,
            max_pixels: max_pixels.ok_or_else(|| bad("size", "needs `longest_edge` (the most pixels), at least 1"))?,
            do_resize: flag(raw.do_resize),
            filter: match raw.resample.unwrap_or(Some(3)).ok_or_else(|| null("resample"))? {
                2 => Filter::Bilinear,
                3 => Filter::Bicubic,
                v => return Err(bad("resample", &format!("is {v}, supported are 2 (bilinear) and 3 (bicubic)"))),
            },
            do_rescale: flag(raw.do_rescale),
            rescale_factor: raw.rescale_factor.unwrap_or(Some(1.0 / 255.0)).ok_or_else(|| null("rescale_factor"))?,
            do_normalize,
            image_mean: channels("image_mean", raw.image_mean, [0.481_454_66, 0.457_827_5, 0.408_210_73])?,
            image_std: channels("image_std", raw.image_std, [0.268_629_54, 0.261_302_58, 0.275_777_11])?,
        };
        if !(out.rescale_factor.is_finite() && out.rescale_factor > 0.0) {
            return Err(bad("rescale_factor", "must be a positive number"));
        }
        if out.do_normalize && out.image_std.contains(&0.0) {
            return Err(bad("image_std", "must not be 0"));
        }
        Ok(out)
    }

    /// Side of a merged cell in resized pixels.
    pub fn factor(&self) -> u32 {
        self.patch_size * self.merge_size
    }

    /// Size `(width, height)` that an image of size `(width, height)` is resized to.
    pub fn resized_size(&self, (width, height): (u32, u32)) -> Result<(u32, u32), PrepareError> {
        let factor = self.factor();
        if self.do_resize {
            let (h, w) = smart_resize(height, width, factor, self.min_pixels, self.max_pixels)?;
            return Ok((w, h));
        }
        if width == 0 || height == 0 || !width.is_multiple_of(factor) || !height.is_multiple_of(factor) {
            let what = format!("is not a multiple of {factor} pixels on both sides, and `do_resize` is off");
            return Err(PrepareError::Size { width, height, what });
        }
        Ok((width, height))
    }
}

/// Size `(height, width)` near that of the image, multiples of `factor`, with `min_pixels` to `max_pixels` pixels where the
/// rounding allows it. Equal to transformers' function of the same name.
pub fn smart_resize(
    height: u32,
    width: u32,
    factor: u32,
    min_pixels: u64,
    max_pixels: u64,
) -> Result<(u32, u32), PrepareError> {
    if height == 0 || width == 0 {
        return Err(PrepareError::Size { width, height, what: "has no pixels".to_owned() });
    }
    let (h, w, f) = (f64::from(height), f64::from(width), f64::from(factor));
    let ratio = h.max(w) / h.min(w);
    if ratio > MAX_ASPECT {
        return Err(PrepareError::Aspect { width, height, ratio });
    }
    let (mut out_h, mut out_w) = ((h / f).round_ties_even() * f, (w / f).round_ties_even() * f);
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
            "would be resized to {out_w} x {out_h} pixels, over the limit of {MAX_PIXELS}: lower `min_pixels` or `max_pixels`"
        );
        return Err(PrepareError::Size { width, height, what });
    }
    Ok((out_h as u32, out_w as u32))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(name: &str, text: &str) -> Result<ProcessorConfig, PrepareError> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(name), text).unwrap();
        ProcessorConfig::load(dir.path())
    }

    #[test]
    fn defaults_and_both_spellings_of_the_limits() {
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
    fn faults_name_file_and_key() {
        let text = |r: Result<ProcessorConfig, PrepareError>| r.unwrap_err().to_string();
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
    fn sizes_by_hand() {
        assert_eq!(smart_resize(96, 96, 16, 9216, 12288).unwrap(), (96, 96));
        assert_eq!(smart_resize(480, 640, 16, 9216, 12288).unwrap(), (96, 128));
        assert_eq!(smart_resize(1, 1, 28, 3136, 1_003_520).unwrap(), (56, 56));
        assert!(matches!(smart_resize(1, 201, 28, 1, 100), Err(PrepareError::Aspect { .. })));
        assert!(matches!(smart_resize(0, 5, 28, 1, 100), Err(PrepareError::Size { .. })));
        assert!(matches!(smart_resize(10, 10, 28, u64::MAX, u64::MAX), Err(PrepareError::Size { .. })));
    }
}
