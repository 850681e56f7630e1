//! DICOM images with one frame, grey or colour; `samples` lists the transfer syntaxes.
//!
//! Grey values are mapped by rescale slope and intercept and then by the file's first window (linear, linear exact or sigmoid); without a
//! window of positive width, by its first VOI lookup table; without either, the range of occurring values spans black to white. MONOCHROME1
//! is inverted. A modality lookup table is refused. So is a file with several frames, because boxes are on one image and no frame is the
//! obvious one.

use dicom_dictionary_std::tags;
use dicom_pixeldata::{Rescale, VoiLutFunction, WindowLevel};

use super::dataset::DataSet;
use super::samples::{Layout, Samples, require};
use super::voi::{Display, LookupTable, ValueMapping};
use super::{DecodeError, fail, header, samples};
use crate::rgb_image::Image;

/// Returns width and height from the header.
pub(super) fn size(bytes: &[u8]) -> Result<(u32, u32), DecodeError> {
    let header = header::read(bytes)?;
    let set = DataSet::read(&header)?;
    Ok((require(&set, tags::COLUMNS, "Columns")?, require(&set, tags::ROWS, "Rows")?))
}

/// Decodes the single frame of a file.
pub(super) fn decode(bytes: &[u8]) -> Result<Image, DecodeError> {
    let header = header::read(bytes)?;
    let set = DataSet::read(&header)?;
    let layout = Layout::read(&set)?;
    if set.has_sequence(tags::MODALITY_LUT_SEQUENCE) {
        return Err(fail("it uses a modality lookup table, which is not supported"));
    }
    let display = if layout.samples == 1 { Some(display(&set, &layout)?) } else { None };
    let Samples { values, bits } = samples::decode(&set, &layout)?;
    let rgb = match display {
        Some((mut display, shift)) => {
            // A compressed stream declares its bits and has them at the low end.
            display.bits = display.bits.max(bits.unwrap_or(0));
            let shift = if bits.is_some() { 0 } else { shift };
            let values: Vec<u16> = values.into_iter().map(|v| v >> shift).collect();
            display.levels(&values)?.into_iter().flat_map(|v| [v; 3]).collect()
        }
        None => values.into_iter().map(|v| v as u8).collect(),
    };
    Image::from_rgb(layout.width, layout.height, rgb).ok_or_else(|| fail("it has fewer pixels than its header claims"))
}

/// Returns how grey values are displayed and by how many bits raw values must be shifted right.
fn display(set: &DataSet<'_>, layout: &Layout) -> Result<(Display, u32), DecodeError> {
    let allocated = 8 * layout.bytes_per_sample as u32;
    let bits = set.number(tags::BITS_STORED, "BitsStored")?.unwrap_or(allocated);
    let high = set.number(tags::HIGH_BIT, "HighBit")?.unwrap_or(bits.saturating_sub(1));
    if bits == 0 || bits > allocated || high >= allocated || high + 1 < bits {
        return Err(DecodeError::Decode(format!("{bits} bits up to bit {high} do not fit in {allocated} bits")));
    }
    let function = set.text(tags::VOILUT_FUNCTION).unwrap_or_else(|| "LINEAR".to_owned());
    let function = VoiLutFunction::try_from(function.as_str())
        .map_err(|_| DecodeError::Decode(format!("its VOILUTFunction {function:?} is not supported")))?;
    let center = set.real(tags::WINDOW_CENTER, "WindowCenter")?;
    let width = set.real(tags::WINDOW_WIDTH, "WindowWidth")?;
    let window = center.zip(width).map(|(center, width)| WindowLevel { center, width });
    let signed = set.number(tags::PIXEL_REPRESENTATION, "PixelRepresentation")? == Some(1);
    let slope = set.real(tags::RESCALE_SLOPE, "RescaleSlope")?.unwrap_or(1.0);
    let intercept = set.real(tags::RESCALE_INTERCEPT, "RescaleIntercept")?.unwrap_or(0.0);
    if !(slope.is_finite() && intercept.is_finite()) {
        return Err(DecodeError::Decode(format!("its rescale slope {slope} or intercept {intercept} is not finite")));
    }
    let display = Display {
        bits,
        signed,
        rescale: Rescale::new(slope, intercept),
        mapping: match window.filter(|w| w.width > 0.0 && w.width.is_finite() && w.center.is_finite()) {
            Some(window) => ValueMapping::Window(function, window),
            None => lookup_table(set, signed)?.map_or(ValueMapping::Range, ValueMapping::LookupTable),
        },
        inverted: layout.photometric == "MONOCHROME1",
    };
    Ok((display, high + 1 - bits))
}

/// Returns the first VOI lookup table, if any.
fn lookup_table(set: &DataSet<'_>, signed: bool) -> Result<Option<LookupTable>, DecodeError> {
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
