//! DICOM images with one frame, grey or colour, uncompressed or compressed by RLE, JPEG baseline, JPEG lossless or JPEG 2000.
//!
//! Grey values are mapped by rescale slope and intercept and then by the file's first window (linear, linear exact or sigmoid); without a
//! window of positive width, by its first VOI lookup table; without either, the range of occurring values spans black to white. MONOCHROME1
//! is inverted. A modality lookup table is refused.

use super::dataset::{DataSet, Pixels};
use super::voi::{Display, Function, LookupTable, ValueMapping, Window};
use super::{DecodeError, check_size, fail, j2k, jpeg, rle};
use crate::rgb_image::Image;
use dicom_dictionary_std::tags;

const RLE: &str = "1.2.840.10008.1.2.5";
/// Transfer syntaxes of JPEG: baseline, extended (8 bits), lossless, lossless with first-order prediction.
const JPEG: [&str; 4] =
    ["1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"];
/// Transfer syntaxes of JPEG 2000: lossless only, and lossless or lossy.
const JPEG_2000: [&str; 2] = ["1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"];

/// Returns width and height from the header.
pub(super) fn size(bytes: &[u8]) -> Result<(u32, u32), DecodeError> {
    let set = DataSet::read(bytes)?;
    Ok((require(&set, tags::COLUMNS, "Columns")?, require(&set, tags::ROWS, "Rows")?))
}

fn require(set: &DataSet, tag: dicom_core::Tag, name: &str) -> Result<u32, DecodeError> {
    set.number(tag, name)?.ok_or_else(|| DecodeError::Decode(format!("it has no {name}")))
}

/// Samples of a frame, pixel by pixel; colours are RGB.
struct Samples {
    values: Vec<u16>,
    /// Bits per sample, if the compressed stream declares them.
    bits: Option<u32>,
}

/// Layout of the pixels.
struct Layout {
    width: u32,
    height: u32,
    samples: usize,
    bytes_per_sample: usize,
    photometric: String,
    planar: bool,
}

impl Layout {
    fn pixels(&self) -> usize {
        self.width as usize * self.height as usize
    }

    /// Returns whether chroma has half the columns and is interleaved with the pixels to which it belongs.
    fn is_422(&self) -> bool {
        self.photometric == "YBR_FULL_422"
    }
}

/// Decodes the single frame of a file.
pub(super) fn decode(bytes: &[u8]) -> Result<Image, DecodeError> {
    let set = DataSet::read(bytes)?;
    let layout = layout(&set)?;
    let width = layout.width;
    let height = layout.height;
    let grey = layout.samples == 1;
    let display = if grey { Some(display(&set, &layout)?) } else { None };
    let Samples { values, bits } = samples(&set, &layout)?;
    let rgb = match display {
        Some((mut display, shift)) => {
            // A compressed stream declares its bits and has them at the low end.
            display.bits = display.bits.max(bits.unwrap_or(0));
            let shift = if bits.is_some() { 0 } else { shift };
            let values: Vec<u16> = values.into_iter().map(|v| v >> shift).collect();
            display.levels(&values).into_iter().flat_map(|v| [v; 3]).collect()
        }
        None => values.into_iter().map(|v| v as u8).collect(),
    };
    Image::from_rgb(width, height, rgb).ok_or_else(|| fail("it has fewer pixels than its header claims"))
}

fn layout(set: &DataSet) -> Result<Layout, DecodeError> {
    let width = require(set, tags::COLUMNS, "Columns")?;
    let height = require(set, tags::ROWS, "Rows")?;
    check_size(width, height)?;
    if let Some(frames) = set.number(tags::NUMBER_OF_FRAMES, "NumberOfFrames")?.filter(|n| *n > 1) {
        return Err(DecodeError::Decode(format!("it has {frames} frames: store the relevant one as a separate file")));
    }
    if set.has_sequence(tags::MODALITY_LUT_SEQUENCE) {
        return Err(fail("it uses a modality lookup table, which is not supported"));
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
    Ok(Layout { width, height, samples, bytes_per_sample, photometric, planar })
}

/// Returns how grey values are displayed and by how many bits raw values must be shifted right.
fn display(set: &DataSet, layout: &Layout) -> Result<(Display, u32), DecodeError> {
    let allocated = 8 * layout.bytes_per_sample as u32;
    let bits = set.number(tags::BITS_STORED, "BitsStored")?.unwrap_or(allocated);
    let high = set.number(tags::HIGH_BIT, "HighBit")?.unwrap_or(bits.saturating_sub(1));
    if bits == 0 || bits > allocated || high >= allocated || high + 1 < bits {
        return Err(DecodeError::Decode(format!("{bits} bits up to bit {high} do not fit in {allocated} bits")));
    }
    let function = match set.text(tags::VOILUT_FUNCTION).as_deref() {
        None | Some("LINEAR") => Function::Linear,
        Some("LINEAR_EXACT") => Function::LinearExact,
        Some("SIGMOID") => Function::Sigmoid,
        Some(other) => return Err(DecodeError::Decode(format!("its VOILUTFunction {other:?} is not supported"))),
    };
    let centre = set.real(tags::WINDOW_CENTER, "WindowCenter")?;
    let width = set.real(tags::WINDOW_WIDTH, "WindowWidth")?;
    let window = centre.zip(width).map(|(centre, width)| Window { centre, width, function });
    let signed = set.number(tags::PIXEL_REPRESENTATION, "PixelRepresentation")? == Some(1);
    let slope = set.real(tags::RESCALE_SLOPE, "RescaleSlope")?.unwrap_or(1.0);
    let intercept = set.real(tags::RESCALE_INTERCEPT, "RescaleIntercept")?.unwrap_or(0.0);
    if !(slope.is_finite() && intercept.is_finite()) {
        return Err(DecodeError::Decode(format!("its rescale slope {slope} or intercept {intercept} is not finite")));
    }
    let display = Display {
        bits,
        signed,
        rescale: (slope, intercept),
        mapping: match window.filter(|w| w.width > 0.0 && w.width.is_finite() && w.centre.is_finite()) {
            Some(window) => ValueMapping::Window(window),
            None => lookup_table(set, signed)?.map_or(ValueMapping::Range, ValueMapping::LookupTable),
        },
        inverted: layout.photometric == "MONOCHROME1",
    };
    Ok((display, high + 1 - bits))
}

/// Returns the first VOI lookup table, if any.
fn lookup_table(set: &DataSet, signed: bool) -> Result<Option<LookupTable>, DecodeError> {
    if !set.has_sequence(tags::VOILUT_SEQUENCE) || set.table.descriptor.is_empty() && set.table.entries.is_empty() {
        return Ok(None);
    }
    let words = |bytes: &[u8]| bytes.chunks_exact(2).map(|b| set.word([b[0], b[1]])).collect::<Vec<u16>>();
    let (count, first, bits) = match words(set.table.descriptor)[..] {
        [count, first, bits @ 8..=16] => (if count == 0 { 1 << 16 } else { usize::from(count) }, first, bits),
        _ => {
            return Err(fail("the descriptor of its VOI lookup table must be three numbers, the last from 8 to 16"));
        }
    };
    let mut entries = words(set.table.entries);
    if entries.len() < count && bits == 8 {
        // Two entries per word, the first in the low byte.
        entries = entries.iter().flat_map(|w| w.to_le_bytes()).map(u16::from).collect();
    }
    if entries.len() < count {
        let n = entries.len();
        return Err(DecodeError::Decode(format!(
            "its VOI lookup table has {n} entries, but its descriptor says {count}"
        )));
    }
    entries.truncate(count);
    let first = if signed || set.table.signed { i32::from(first as i16) } else { i32::from(first) };
    Ok(Some(LookupTable { first, bits: u32::from(bits), entries }))
}

fn samples(set: &DataSet, layout: &Layout) -> Result<Samples, DecodeError> {
    let uncoded = |values| Ok(Samples { values, bits: None });
    let colour = |interleaved: Vec<u8>| match layout.photometric.as_str() {
        "RGB" => interleaved.into_iter().map(u16::from).collect(),
        _ => interleaved.chunks_exact(3).flat_map(|p| ybr_to_rgb(p[0], p[1], p[2])).map(u16::from).collect(),
    };
    match &set.pixels {
        Pixels::None => Err(fail("it has no pixels")),
        Pixels::Native(bytes) => {
            let n = layout.pixels();
            if layout.is_422() && !layout.width.is_multiple_of(2) {
                let width = layout.width;
                return Err(DecodeError::Decode(format!(
                    "its pixels are YBR_FULL_422, in which two pixels of a row share a chroma value, but it has {width} columns, which is odd"
                )));
            }
            let expected = if layout.is_422() { n * 2 } else { n * layout.samples * layout.bytes_per_sample };
            let bytes = bytes.get(..expected).ok_or_else(|| {
                let w = layout.width;
                let h = layout.height;
                DecodeError::Decode(format!("{w} x {h} pixels need {expected} bytes, but it has {}", bytes.len()))
            })?;
            uncoded(match (layout.samples, layout.bytes_per_sample) {
                (1, 1) => bytes.iter().map(|v| u16::from(*v)).collect(),
                (1, _) => bytes.chunks_exact(2).map(|b| set.word([b[0], b[1]])).collect(),
                _ if layout.is_422() => {
                    colour(bytes.chunks_exact(4).flat_map(|p| [p[0], p[2], p[3], p[1], p[2], p[3]]).collect())
                }
                _ if layout.planar => colour(interleave(&[&bytes[..n], &bytes[n..2 * n], &bytes[2 * n..]])),
                _ => colour(bytes.to_vec()),
            })
        }
        Pixels::Fragments(fragments) if set.syntax == RLE => {
            let planes = rle::planes(&fragments.concat(), layout.samples * layout.bytes_per_sample, layout.pixels())?;
            let planes: Vec<&[u8]> = planes.iter().map(Vec::as_slice).collect();
            uncoded(match planes[..] {
                [only] => only.iter().map(|v| u16::from(*v)).collect(),
                [high, low] => high.iter().zip(low).map(|(h, l)| u16::from_be_bytes([*h, *l])).collect(),
                _ => colour(interleave(&planes)),
            })
        }
        Pixels::Fragments(fragments) if JPEG.contains(&set.syntax.as_str()) => {
            let size = (layout.width, layout.height);
            uncoded(jpeg::decode(&fragments.concat(), size, layout.samples, &layout.photometric)?)
        }
        Pixels::Fragments(fragments) if JPEG_2000.contains(&set.syntax.as_str()) => {
            let size = (layout.width, layout.height);
            let max_bits = 8 * layout.bytes_per_sample as u32;
            let frame = j2k::decode(&fragments.concat(), size, layout.samples, max_bits)?;
            // The decoder undoes the transforms of the stream, so only the colour space of the data set remains.
            let values = match layout.photometric.as_str() {
                "YBR_FULL" | "YBR_FULL_422" => colour(frame.values.into_iter().map(|v| v as u8).collect()),
                _ => frame.values,
            };
            Ok(Samples { values, bits: Some(frame.bits) })
        }
        Pixels::Fragments(_) => Err(DecodeError::Decode(format!(
            "its transfer syntax {} is not supported; uncompressed, RLE, JPEG baseline, JPEG lossless and JPEG 2000 are",
            set.syntax
        ))),
    }
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
