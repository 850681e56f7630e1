//! DICOM images: one frame, grey or colour, uncompressed, RLE, JPEG baseline, JPEG lossless or JPEG 2000.
//!
//! Grey goes through rescale slope and intercept and the file's first window (linear, linear exact or sigmoid); without a window of
//! positive width, through its first table of interest (VOI); without either, the values that occur span black to white. MONOCHROME1 is
//! inverted. A modality table is refused.

use super::dataset::{DataSet, Pixels};
use super::voi::{Display, Function, Shown, Table, Window};
use super::{Fault, check_size, fail, j2k, jpeg, rle};
use crate::store::Image;
use dicom_dictionary_std::tags;

const RLE: &str = "1.2.840.10008.1.2.5";
/// Baseline, extended (8 bits), lossless, lossless with first-order prediction.
const JPEG: [&str; 4] =
    ["1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"];
/// Lossless, and of either kind.
const JPEG_2000: [&str; 2] = ["1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"];

/// Width and height from the header.
pub(super) fn size(bytes: &[u8]) -> Result<(u32, u32), Fault> {
    let set = DataSet::read(bytes)?;
    Ok((need(&set, tags::COLUMNS, "Columns")?, need(&set, tags::ROWS, "Rows")?))
}

fn need(set: &DataSet, tag: dicom_core::Tag, name: &str) -> Result<u32, Fault> {
    set.number(tag, name)?.ok_or_else(|| Fault::Decode(format!("it has no {name}")))
}

/// All samples of a frame, pixel by pixel; colour as RGB.
struct Samples {
    values: Vec<u16>,
    /// Bits of a sample, where the coded stream says so.
    bits: Option<u32>,
}

/// How the pixels are laid out.
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

    /// Chroma has half the columns and lies between the pixels it belongs to.
    fn is_422(&self) -> bool {
        self.photometric == "YBR_FULL_422"
    }
}

/// Decodes the one frame of a file.
pub(super) fn decode(bytes: &[u8]) -> Result<Image, Fault> {
    let set = DataSet::read(bytes)?;
    let layout = layout(&set)?;
    let (width, height) = (layout.width, layout.height);
    let grey = layout.samples == 1;
    let display = if grey { Some(display(&set, &layout)?) } else { None };
    let Samples { values, bits } = samples(&set, &layout)?;
    let rgb = match display {
        Some((mut display, shift)) => {
            // A stream of its own knows its bits, and has them at the low end.
            display.bits = display.bits.max(bits.unwrap_or(0));
            let shift = if bits.is_some() { 0 } else { shift };
            let values: Vec<u16> = values.into_iter().map(|v| v >> shift).collect();
            display.levels(&values).into_iter().flat_map(|v| [v; 3]).collect()
        }
        None => values.into_iter().map(|v| v as u8).collect(),
    };
    Image::from_rgb(width, height, rgb).ok_or_else(|| fail("it does not hold as many pixels as its header says"))
}

fn layout(set: &DataSet) -> Result<Layout, Fault> {
    let (width, height) = (need(set, tags::COLUMNS, "Columns")?, need(set, tags::ROWS, "Rows")?);
    check_size(width, height)?;
    if let Some(frames) = set.number(tags::NUMBER_OF_FRAMES, "NumberOfFrames")?.filter(|n| *n > 1) {
        return Err(Fault::Decode(format!(
            "it holds {frames} frames: store the one that is meant as a file of its own"
        )));
    }
    if set.has_sequence(tags::MODALITY_LUT_SEQUENCE) {
        return Err(fail("its values go through a modality lookup table, which is not supported"));
    }
    let photometric = set.text(tags::PHOTOMETRIC_INTERPRETATION).unwrap_or_default();
    let samples = set.number(tags::SAMPLES_PER_PIXEL, "SamplesPerPixel")?.unwrap_or(1);
    let bits = need(set, tags::BITS_ALLOCATED, "BitsAllocated")?;
    let in_stream = JPEG_2000.contains(&set.syntax.as_str());
    match (photometric.as_str(), samples, bits) {
        ("MONOCHROME1" | "MONOCHROME2", 1, 8 | 16) | ("RGB" | "YBR_FULL" | "YBR_FULL_422", 3, 8) => {}
        ("YBR_RCT" | "YBR_ICT", 3, 8) if in_stream => {}
        _ => {
            return Err(Fault::Decode(format!(
                "its pixels are {photometric:?} of {samples} x {bits} bits; supported are MONOCHROME1 and MONOCHROME2 of 8 or 16 bits, \
                 RGB, YBR_FULL and YBR_FULL_422 of 3 x 8 bits, YBR_RCT and YBR_ICT in JPEG 2000"
            )));
        }
    }
    let planar = set.number(tags::PLANAR_CONFIGURATION, "PlanarConfiguration")? == Some(1);
    let (samples, bytes_per_sample) = (samples as usize, bits as usize / 8);
    Ok(Layout { width, height, samples, bytes_per_sample, photometric, planar })
}

/// How grey is shown, and by how many bits raw values are to be moved down.
fn display(set: &DataSet, layout: &Layout) -> Result<(Display, u32), Fault> {
    let allocated = 8 * layout.bytes_per_sample as u32;
    let bits = set.number(tags::BITS_STORED, "BitsStored")?.unwrap_or(allocated);
    let high = set.number(tags::HIGH_BIT, "HighBit")?.unwrap_or(bits.saturating_sub(1));
    if bits == 0 || bits > allocated || high >= allocated || high + 1 < bits {
        return Err(Fault::Decode(format!("{bits} bits up to bit {high} do not fit in {allocated} bits")));
    }
    let function = match set.text(tags::VOILUT_FUNCTION).as_deref() {
        None | Some("LINEAR") => Function::Linear,
        Some("LINEAR_EXACT") => Function::LinearExact,
        Some("SIGMOID") => Function::Sigmoid,
        Some(other) => return Err(Fault::Decode(format!("its VOILUTFunction {other:?} is not known"))),
    };
    let centre = set.real(tags::WINDOW_CENTER, "WindowCenter")?;
    let width = set.real(tags::WINDOW_WIDTH, "WindowWidth")?;
    let window = centre.zip(width).map(|(centre, width)| Window { centre, width, function });
    let signed = set.number(tags::PIXEL_REPRESENTATION, "PixelRepresentation")? == Some(1);
    let slope = set.real(tags::RESCALE_SLOPE, "RescaleSlope")?.unwrap_or(1.0);
    let intercept = set.real(tags::RESCALE_INTERCEPT, "RescaleIntercept")?.unwrap_or(0.0);
    if !(slope.is_finite() && intercept.is_finite()) {
        return Err(Fault::Decode(format!("its rescale slope {slope} or intercept {intercept} is not finite")));
    }
    let display = Display {
        bits,
        signed,
        rescale: (slope, intercept),
        shown: match window.filter(|w| w.width > 0.0 && w.width.is_finite() && w.centre.is_finite()) {
            Some(window) => Shown::Window(window),
            None => table(set, signed)?.map_or(Shown::Range, Shown::Table),
        },
        inverted: layout.photometric == "MONOCHROME1",
    };
    Ok((display, high + 1 - bits))
}

/// The first table of interest; none where there is none.
fn table(set: &DataSet, signed: bool) -> Result<Option<Table>, Fault> {
    if !set.has_sequence(tags::VOILUT_SEQUENCE) || set.table.descriptor.is_empty() && set.table.entries.is_empty() {
        return Ok(None);
    }
    let words = |bytes: &[u8]| bytes.chunks_exact(2).map(|b| set.word([b[0], b[1]])).collect::<Vec<u16>>();
    let (count, first, bits) = match words(set.table.descriptor)[..] {
        [count, first, bits @ 8..=16] => (if count == 0 { 1 << 16 } else { usize::from(count) }, first, bits),
        _ => {
            return Err(fail(
                "the descriptor of its table of interest (VOI LUT) is not three numbers, the last 8 to 16",
            ));
        }
    };
    let mut entries = words(set.table.entries);
    if entries.len() < count && bits == 8 {
        // Two entries in a word, the first in its low byte.
        entries = entries.iter().flat_map(|w| w.to_le_bytes()).map(u16::from).collect();
    }
    if entries.len() < count {
        let n = entries.len();
        return Err(Fault::Decode(format!(
            "its table of interest (VOI LUT) has {n} entries, its descriptor says {count}"
        )));
    }
    entries.truncate(count);
    let first = if signed || set.table.signed { i32::from(first as i16) } else { i32::from(first) };
    Ok(Some(Table { first, bits: u32::from(bits), entries }))
}

fn samples(set: &DataSet, layout: &Layout) -> Result<Samples, Fault> {
    let plain = |values| Ok(Samples { values, bits: None });
    let colour = |interleaved: Vec<u8>| match layout.photometric.as_str() {
        "RGB" => interleaved.into_iter().map(u16::from).collect(),
        _ => interleaved.chunks_exact(3).flat_map(|p| ybr(p[0], p[1], p[2])).map(u16::from).collect(),
    };
    match &set.pixels {
        Pixels::None => Err(fail("it has no pixels")),
        Pixels::Native(bytes) => {
            let n = layout.pixels();
            if layout.is_422() && !layout.width.is_multiple_of(2) {
                let width = layout.width;
                return Err(Fault::Decode(format!(
                    "its pixels are YBR_FULL_422, two of a row to a chroma, but it has {width} columns, which is odd"
                )));
            }
            let expected = if layout.is_422() { n * 2 } else { n * layout.samples * layout.bytes_per_sample };
            let bytes = bytes.get(..expected).ok_or_else(|| {
                let (w, h) = (layout.width, layout.height);
                Fault::Decode(format!("{w} x {h} pixels need {expected} bytes, it holds {}", bytes.len()))
            })?;
            plain(match (layout.samples, layout.bytes_per_sample) {
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
            plain(match planes[..] {
                [only] => only.iter().map(|v| u16::from(*v)).collect(),
                [high, low] => high.iter().zip(low).map(|(h, l)| u16::from_be_bytes([*h, *l])).collect(),
                _ => colour(interleave(&planes)),
            })
        }
        Pixels::Fragments(fragments) if JPEG.contains(&set.syntax.as_str()) => {
            let size = (layout.width, layout.height);
            plain(jpeg::decode(&fragments.concat(), size, layout.samples, &layout.photometric)?)
        }
        Pixels::Fragments(fragments) if JPEG_2000.contains(&set.syntax.as_str()) => {
            let (size, most) = ((layout.width, layout.height), 8 * layout.bytes_per_sample as u32);
            let frame = j2k::decode(&fragments.concat(), size, layout.samples, most)?;
            // The decoder undoes the transforms of the stream: what is left is what was put in.
            let values = match layout.photometric.as_str() {
                "YBR_FULL" | "YBR_FULL_422" => colour(frame.values.into_iter().map(|v| v as u8).collect()),
                _ => frame.values,
            };
            Ok(Samples { values, bits: Some(frame.bits) })
        }
        Pixels::Fragments(_) => Err(Fault::Decode(format!(
            "its transfer syntax {} is not supported; uncompressed, RLE, JPEG baseline, JPEG lossless and JPEG 2000 are",
            set.syntax
        ))),
    }
}

fn interleave(planes: &[&[u8]]) -> Vec<u8> {
    (0..planes[0].len()).flat_map(|i| planes.iter().map(move |p| p[i])).collect()
}

fn ybr(y: u8, cb: u8, cr: u8) -> [u8; 3] {
    let (y, cb, cr) = (f32::from(y), f32::from(cb) - 128.0, f32::from(cr) - 128.0);
    [y + 1.402 * cr, y - 0.344_136 * cb - 0.714_136 * cr, y + 1.772 * cb].map(|v| v.round().clamp(0.0, 255.0) as u8)
}
