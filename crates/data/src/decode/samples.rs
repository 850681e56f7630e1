//! Layout of the pixels of a DICOM data set, and decoding of their samples by transfer syntax.
//!
//! The decoders are `jpeg-decoder` and `openjp2`, which `dicom-pixeldata` uses as well, and own code for RLE. They are called directly because
//! `dicom-pixeldata` trusts the file: its RLE decoder allocates as many offsets as a header claims and unpacks segments without a limit, its
//! JPEG and JPEG 2000 decoders leave pixels black or panic if the stream has another size than the data set, and all of them ignore the colour
//! space of the data set.

use dicom_core::Tag;
use dicom_dictionary_std::{tags, uids};

use super::dataset::{DataSet, Pixels};
use super::inflate::inflate;
use super::{DecodeError, check_size, fail, j2k, jpeg, rle};

/// Transfer syntaxes of JPEG: baseline, extended (8 bits), lossless, lossless with first-order prediction.
const JPEG: [&str; 4] =
    [uids::JPEG_BASELINE8_BIT, uids::JPEG_EXTENDED12_BIT, uids::JPEG_LOSSLESS, uids::JPEG_LOSSLESS_SV1];
/// Transfer syntaxes of JPEG 2000, with both of its block coders.
const JPEG_2000: [&str; 5] =
    [uids::JPEG2000_LOSSLESS, uids::JPEG2000, uids::HTJ2K_LOSSLESS, uids::HTJ2K_LOSSLESS_RPCL, uids::HTJ2K];

/// Layout of the pixels.
pub(super) struct Layout {
    pub width: u32,
    pub height: u32,
    /// Samples per pixel.
    pub samples: usize,
    pub bytes_per_sample: usize,
    pub photometric: String,
    planar: bool,
}

/// Samples of a frame, pixel by pixel; colours are RGB.
pub(super) struct Samples {
    pub values: Vec<u16>,
    /// Bits per sample, if the compressed stream declares them.
    pub bits: Option<u32>,
}

/// Returns an integer that every image has.
pub(super) fn require(set: &DataSet<'_>, tag: Tag, name: &str) -> Result<u32, DecodeError> {
    set.number(tag, name)?.ok_or_else(|| DecodeError::Decode(format!("it has no {name}")))
}

impl Layout {
    /// Reads the layout and checks that it is supported.
    pub(super) fn read(set: &DataSet<'_>) -> Result<Self, DecodeError> {
        let width = require(set, tags::COLUMNS, "Columns")?;
        let height = require(set, tags::ROWS, "Rows")?;
        check_size(width, height)?;
        if let Some(frames) = set.number(tags::NUMBER_OF_FRAMES, "NumberOfFrames")?.filter(|n| *n > 1) {
            return Err(DecodeError::Decode(format!(
                "it has {frames} frames: store the relevant one as a separate file"
            )));
        }
        let photometric = set.text(tags::PHOTOMETRIC_INTERPRETATION).unwrap_or_default();
        let samples = set.number(tags::SAMPLES_PER_PIXEL, "SamplesPerPixel")?.unwrap_or(1);
        let bits = require(set, tags::BITS_ALLOCATED, "BitsAllocated")?;
        let in_stream = JPEG_2000.contains(&set.syntax.as_str());
        match (photometric.as_str(), samples, bits) {
            ("MONOCHROME1" | "MONOCHROME2", 1, 8 | 16) | ("RGB" | "YBR_FULL" | "YBR_FULL_422", 3, 8) => {}
            ("YBR_RCT" | "YBR_ICT", 3, 8) if in_stream => {}
            _ => {
                return Err(DecodeError::Decode(format!(
                    "its pixels are {photometric:?} of {samples} x {bits} bits; supported are MONOCHROME1 and MONOCHROME2 of 8 or 16 bits, \
                     RGB, YBR_FULL and YBR_FULL_422 of 3 x 8 bits, YBR_RCT and YBR_ICT in JPEG 2000"
                )));
            }
        }
        let planar = set.number(tags::PLANAR_CONFIGURATION, "PlanarConfiguration")? == Some(1);
        let samples = samples as usize;
        let bytes_per_sample = bits as usize / 8;
        Ok(Self { width, height, samples, bytes_per_sample, photometric, planar })
    }

    fn pixels(&self) -> usize {
        self.width as usize * self.height as usize
    }

    /// Returns whether chroma has half the columns and is interleaved with the pixels to which it belongs.
    fn is_422(&self) -> bool {
        self.photometric == "YBR_FULL_422"
    }

    /// Returns the length in bytes of an uncompressed frame.
    fn frame_bytes(&self) -> usize {
        if self.is_422() { self.pixels() * 2 } else { self.pixels() * self.samples * self.bytes_per_sample }
    }

    /// Converts interleaved colours to RGB.
    fn rgb(&self, interleaved: Vec<u8>) -> Vec<u16> {
        match self.photometric.as_str() {
            "YBR_FULL" | "YBR_FULL_422" => {
                interleaved.chunks_exact(3).flat_map(|p| ybr_to_rgb(p[0], p[1], p[2])).map(u16::from).collect()
            }
            _ => interleaved.into_iter().map(u16::from).collect(),
        }
    }
}

/// Decodes the samples of a data set's frame.
pub(super) fn decode(set: &DataSet<'_>, layout: &Layout) -> Result<Samples, DecodeError> {
    let frame = match &set.pixels {
        Pixels::None => return Err(fail("it has no pixels")),
        Pixels::Native(bytes) => return uncompressed(set, layout, bytes),
        Pixels::Fragments(fragments) => fragments.concat(),
    };
    let size = (layout.width, layout.height);
    match set.syntax.as_str() {
        uids::ENCAPSULATED_UNCOMPRESSED_EXPLICIT_VR_LITTLE_ENDIAN => uncompressed(set, layout, &frame),
        uids::DEFLATED_IMAGE_FRAME_COMPRESSION => {
            uncompressed(set, layout, &inflate(&frame, layout.frame_bytes() as u64)?)
        }
        uids::RLE_LOSSLESS => {
            let planes = rle::planes(&frame, layout.samples * layout.bytes_per_sample, layout.pixels())?;
            let planes: Vec<&[u8]> = planes.iter().map(Vec::as_slice).collect();
            let values = match planes[..] {
                [only] => only.iter().map(|v| u16::from(*v)).collect(),
                [high, low] => high.iter().zip(low).map(|(h, l)| u16::from_be_bytes([*h, *l])).collect(),
                _ => layout.rgb(interleave(&planes)),
            };
            Ok(Samples { values, bits: None })
        }
        syntax if JPEG.contains(&syntax) => {
            let values = jpeg::decode(&frame, size, layout.samples, &layout.photometric)?;
            Ok(Samples { values, bits: None })
        }
        syntax if JPEG_2000.contains(&syntax) => {
            let decoded = j2k::decode(&frame, size, layout.samples, 8 * layout.bytes_per_sample as u32)?;
            // The decoder undoes the transforms of the stream, so only the colour space of the data set remains.
            let values = match layout.samples {
                1 => decoded.values,
                _ => layout.rgb(decoded.values.into_iter().map(|v| v as u8).collect()),
            };
            Ok(Samples { values, bits: Some(decoded.bits) })
        }
        other => Err(DecodeError::Decode(format!(
            "its transfer syntax {other} is not supported; supported are uncompressed, deflated, RLE, JPEG baseline, JPEG lossless and \
             JPEG 2000"
        ))),
    }
}

fn uncompressed(set: &DataSet<'_>, layout: &Layout, bytes: &[u8]) -> Result<Samples, DecodeError> {
    let width = layout.width;
    if layout.is_422() && !width.is_multiple_of(2) {
        return Err(DecodeError::Decode(format!(
            "its pixels are YBR_FULL_422, in which two pixels of a row share a chroma value, but it has {width} columns, which is odd"
        )));
    }
    let expected = layout.frame_bytes();
    let bytes = bytes.get(..expected).ok_or_else(|| {
        let height = layout.height;
        DecodeError::Decode(format!("{width} x {height} pixels need {expected} bytes, but it has {}", bytes.len()))
    })?;
    let n = layout.pixels();
    let values = match (layout.samples, layout.bytes_per_sample) {
        (1, 1) => bytes.iter().map(|v| u16::from(*v)).collect(),
        (1, _) => bytes.chunks_exact(2).map(|b| set.word([b[0], b[1]])).collect(),
        _ if layout.is_422() => {
            layout.rgb(bytes.chunks_exact(4).flat_map(|p| [p[0], p[2], p[3], p[1], p[2], p[3]]).collect())
        }
        _ if layout.planar => layout.rgb(interleave(&[&bytes[..n], &bytes[n..2 * n], &bytes[2 * n..]])),
        _ => layout.rgb(bytes.to_vec()),
    };
    Ok(Samples { values, bits: None })
}

fn interleave(planes: &[&[u8]]) -> Vec<u8> {
    (0..planes[0].len()).flat_map(|i| planes.iter().map(move |p| p[i])).collect()
}

fn ybr_to_rgb(y: u8, cb: u8, cr: u8) -> [u8; 3] {
    let y = f32::from(y);
    let cb = f32::from(cb) - 128.0;
    let cr = f32::from(cr) - 128.0;
    [y + 1.402 * cr, y - 0.344_136 * cb - 0.714_136 * cr, y + 1.772 * cb].map(|v| v.round().clamp(0.0, 255.0) as u8)
}
