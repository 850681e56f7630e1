//! DICOM images: one frame, grey or colour, uncompressed, RLE, JPEG baseline or JPEG lossless.
//!
//! Grey goes through rescale slope and intercept and the file's first window (linear, linear exact or sigmoid); without a window of
//! positive width, the values that occur span black to white. MONOCHROME1 is inverted. Lookup tables are not applied: a modality
//! table is refused, a table of interest (VOI) stands behind the window.

use dicom_dictionary_std::tags;
use jpeg_decoder::{ColorTransform, PixelFormat};

use super::dataset::{DataSet, Pixels};
use super::voi::{Display, Function, Window};
use super::{Fault, check_size, fail};
use crate::store::Image;

const RLE: &str = "1.2.840.10008.1.2.5";
/// Baseline, extended (8 bits), lossless, lossless with first-order prediction.
const JPEG: [&str; 4] =
    ["1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"];

/// Width and height from the header.
pub(super) fn size(bytes: &[u8]) -> Result<(u32, u32), Fault> {
    let set = DataSet::read(bytes)?;
    Ok((need(&set, tags::COLUMNS, "Columns")?, need(&set, tags::ROWS, "Rows")?))
}

fn need(set: &DataSet, tag: dicom_core::Tag, name: &str) -> Result<u32, Fault> {
    set.number(tag, name)?.ok_or_else(|| Fault::Decode(format!("it has no {name}")))
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
    let raw = samples(&set, &layout)?;
    let rgb = match display {
        Some((display, shift)) => {
            let raw: Vec<u16> = raw.into_iter().map(|v| v >> shift).collect();
            display.levels(&raw).into_iter().flat_map(|v| [v; 3]).collect()
        }
        None => raw.into_iter().map(|v| v as u8).collect(),
    };
    Ok(Image { width, height, rgb })
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
    match (photometric.as_str(), samples, bits) {
        ("MONOCHROME1" | "MONOCHROME2", 1, 8 | 16) | ("RGB" | "YBR_FULL" | "YBR_FULL_422", 3, 8) => {}
        _ => {
            return Err(Fault::Decode(format!(
                "its pixels are {photometric:?} of {samples} x {bits} bits; supported are MONOCHROME1 and MONOCHROME2 of 8 or 16 bits, \
                 RGB, YBR_FULL and YBR_FULL_422 of 3 x 8 bits"
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
    let slope = set.real(tags::RESCALE_SLOPE, "RescaleSlope")?.unwrap_or(1.0);
    let intercept = set.real(tags::RESCALE_INTERCEPT, "RescaleIntercept")?.unwrap_or(0.0);
    if !(slope.is_finite() && intercept.is_finite()) {
        return Err(Fault::Decode(format!("its rescale slope {slope} or intercept {intercept} is not finite")));
    }
    let display = Display {
        bits,
        signed: set.number(tags::PIXEL_REPRESENTATION, "PixelRepresentation")? == Some(1),
        rescale: (slope, intercept),
        window: window.filter(|w| w.width > 0.0 && w.width.is_finite() && w.centre.is_finite()),
        inverted: layout.photometric == "MONOCHROME1",
    };
    Ok((display, high + 1 - bits))
}

/// All samples, pixel by pixel; colour as RGB.
fn samples(set: &DataSet, layout: &Layout) -> Result<Vec<u16>, Fault> {
    let colour = |interleaved: Vec<u8>| match layout.photometric.as_str() {
        "RGB" => interleaved.into_iter().map(u16::from).collect(),
        _ => interleaved.chunks_exact(3).flat_map(|p| ybr(p[0], p[1], p[2])).map(u16::from).collect(),
    };
    match &set.pixels {
        Pixels::None => Err(fail("it has no pixels")),
        Pixels::Native(bytes) => {
            let n = layout.pixels();
            let expected = if layout.is_422() { n * 2 } else { n * layout.samples * layout.bytes_per_sample };
            let bytes = bytes.get(..expected).ok_or_else(|| {
                let (w, h) = (layout.width, layout.height);
                Fault::Decode(format!("{w} x {h} pixels need {expected} bytes, it holds {}", bytes.len()))
            })?;
            Ok(match (layout.samples, layout.bytes_per_sample) {
                (1, 1) => bytes.iter().map(|v| u16::from(*v)).collect(),
                (1, _) if set.big_endian => bytes.chunks_exact(2).map(|b| u16::from_be_bytes([b[0], b[1]])).collect(),
                (1, _) => bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect(),
                _ if layout.is_422() => {
                    colour(bytes.chunks_exact(4).flat_map(|p| [p[0], p[2], p[3], p[1], p[2], p[3]]).collect())
                }
                _ if layout.planar => colour(interleave(&[&bytes[..n], &bytes[n..2 * n], &bytes[2 * n..]])),
                _ => colour(bytes.to_vec()),
            })
        }
        Pixels::Fragments(fragments) if set.syntax == RLE => {
            let planes = rle(&fragments.concat(), layout)?;
            let planes: Vec<&[u8]> = planes.iter().map(Vec::as_slice).collect();
            Ok(match planes[..] {
                [only] => only.iter().map(|v| u16::from(*v)).collect(),
                [high, low] => high.iter().zip(low).map(|(h, l)| u16::from_be_bytes([*h, *l])).collect(),
                _ => colour(interleave(&planes)),
            })
        }
        Pixels::Fragments(fragments) if JPEG.contains(&set.syntax.as_str()) => jpeg(&fragments.concat(), layout),
        Pixels::Fragments(_) => Err(Fault::Decode(format!(
            "its transfer syntax {} is not supported; uncompressed, RLE, JPEG baseline and JPEG lossless are",
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

/// Byte planes of a run-length coded frame (DICOM PS3.5 annex G): samples in order, of each the high byte first.
fn rle(frame: &[u8], layout: &Layout) -> Result<Vec<Vec<u8>>, Fault> {
    let bad = || fail("its RLE segments do not fit");
    let word = |i: usize| {
        let bytes = frame.get(i * 4..i * 4 + 4).ok_or_else(bad)?;
        Ok::<usize, Fault>(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize)
    };
    let (planes, n) = (layout.samples * layout.bytes_per_sample, layout.pixels());
    // Two bytes make 128 at most: what cannot be filled is not allocated.
    if word(0)? != planes || frame.len().saturating_mul(64) < planes * n {
        return Err(bad());
    }
    let plane = |i: usize| {
        let end = if i + 1 < planes { word(i + 2)? } else { frame.len() };
        let mut rest = frame.get(word(i + 1)?..end).ok_or_else(bad)?;
        let mut out = Vec::with_capacity(n);
        while out.len() < n {
            let (count, tail) = rest.split_first().ok_or_else(bad)?;
            rest = match *count as i8 {
                -128 => tail,
                run @ ..0 => {
                    let (value, tail) = tail.split_first().ok_or_else(bad)?;
                    out.resize(out.len() + 1 + usize::from(run.unsigned_abs()), *value);
                    tail
                }
                literal => {
                    let (values, tail) = tail.split_at_checked(literal as usize + 1).ok_or_else(bad)?;
                    out.extend_from_slice(values);
                    tail
                }
            };
        }
        out.truncate(n);
        Ok(out)
    };
    (0..planes).map(plane).collect()
}

/// A JPEG stream of the size that the header claims.
fn jpeg(stream: &[u8], layout: &Layout) -> Result<Vec<u16>, Fault> {
    let mut decoder = jpeg_decoder::Decoder::new(stream);
    decoder.read_info().map_err(fail)?;
    let info = decoder.info().ok_or_else(|| fail("its JPEG stream has no header"))?;
    let size = (u32::from(info.width), u32::from(info.height));
    if size != (layout.width, layout.height) {
        let (w, h) = (layout.width, layout.height);
        return Err(Fault::Decode(format!(
            "its JPEG stream is of {} x {} pixels, its header says {w} x {h}",
            size.0, size.1
        )));
    }
    match (info.pixel_format, layout.samples) {
        (PixelFormat::L8 | PixelFormat::L16, 1) => {}
        (PixelFormat::RGB24, 3) => decoder.set_color_transform(match layout.photometric.as_str() {
            "RGB" => ColorTransform::RGB,
            _ => ColorTransform::YCbCr,
        }),
        (other, n) => {
            return Err(Fault::Decode(format!("its JPEG stream is {other:?}, its header says {n} samples a pixel")));
        }
    }
    let bytes = decoder.decode().map_err(fail)?;
    Ok(match info.pixel_format {
        PixelFormat::L16 => bytes.chunks_exact(2).map(|b| u16::from_ne_bytes([b[0], b[1]])).collect(),
        _ => bytes.into_iter().map(u16::from).collect(),
    })
}
