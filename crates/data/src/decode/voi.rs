//! Conversion of stored values of one DICOM channel to 8 bits: rescaling, window or lookup table, polarity (DICOM PS3.3 C.11.1, C.11.2,
//! C.7.6.3).
//!
//! Rescaling, windows and the table by stored value are those of `dicom-pixeldata`. Its conversion to an image is not used, because it takes
//! the range of signed values from their bits, ignores the high bit, turns images with up to 8 of 16 bits black, panics if a lookup table has
//! more bits than the image, and rounds down.

use dicom_pixeldata::{Lut, Rescale, VoiLutFunction, WindowLevel, WindowLevelTransform};

use super::DecodeError;

/// Conversion of stored values to brightness.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Display {
    /// Bits per stored value, 1 to 16.
    pub bits: u32,
    /// Whether stored values are in two's complement.
    pub signed: bool,
    /// Rescale slope and intercept.
    pub rescale: Rescale,
    /// Mapping of rescaled values to brightness.
    pub mapping: ValueMapping,
    /// Whether the smallest value is white (MONOCHROME1).
    pub inverted: bool,
}

/// Mapping of rescaled values to brightness.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum ValueMapping {
    /// The smallest occurring value is black, the largest white.
    Range,
    /// Window of positive width.
    Window(VoiLutFunction, WindowLevel),
    LookupTable(LookupTable),
}

/// VOI lookup table: brightness by rescaled value.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct LookupTable {
    /// Value of the first entry, which lower values use as well; values beyond the table use the last entry.
    pub first: i32,
    /// Bits per entry, 8 to 16.
    pub bits: u32,
    pub entries: Vec<u16>,
}

impl LookupTable {
    /// Returns the brightness of a rescaled value, in `[0, 1]`.
    fn brightness(&self, x: f64) -> f64 {
        let last = self.entries.len().saturating_sub(1);
        // The cast maps negative values and NaN to 0.
        let entry = self.entries.get(((x - f64::from(self.first)) as usize).min(last)).copied().unwrap_or(0);
        (f64::from(entry) / f64::from((1u32 << self.bits) - 1)).min(1.0)
    }
}

impl Display {
    /// Converts raw values, whose bits above `bits` are ignored, to 8-bit levels.
    ///
    /// # Errors
    /// Returns [`DecodeError::Decode`] if the rescaled values exceed the range of numbers.
    pub(super) fn levels(&self, raw: &[u16]) -> Result<Vec<u8>, DecodeError> {
        let (low, high) = if self.mapping == ValueMapping::Range { self.range(raw)? } else { (0.0, 0.0) };
        let level = |stored| {
            let x = self.rescale.apply(stored);
            let share = match &self.mapping {
                ValueMapping::Window(function, window) => windowed(*function, *window, x),
                ValueMapping::LookupTable(table) => table.brightness(x),
                ValueMapping::Range if high > low => ((x - low) / (high - low)).clamp(0.0, 1.0),
                ValueMapping::Range => 0.0,
            };
            let share = if self.inverted { 1.0 - share } else { share };
            (share * 255.0).round()
        };
        let table = Lut::<u8>::new_with_fn(self.lut_bits(), self.signed, level).map_err(out_of_range)?;
        Ok(table.map_iter(raw.iter().copied()).collect())
    }

    /// Returns the smallest and the largest rescaled value.
    fn range(&self, raw: &[u16]) -> Result<(f64, f64), DecodeError> {
        let identity = Rescale::new(1.0, 0.0);
        let stored = Lut::<i32>::new_rescale(self.lut_bits(), self.signed, identity).map_err(out_of_range)?;
        let values = || raw.iter().map(|v| stored.get(*v));
        let ends = [values().min(), values().max()].map(|v| self.rescale.apply(f64::from(v.unwrap_or(0))));
        Ok((ends[0].min(ends[1]), ends[0].max(ends[1])))
    }

    /// Returns the bits by which a table is indexed; outside of this range its constructor panics.
    fn lut_bits(&self) -> u16 {
        self.bits.clamp(1, 16) as u16
    }
}

/// Returns the brightness of a rescaled value in a window, in `[0, 1]`.
fn windowed(function: VoiLutFunction, window: WindowLevel, x: f64) -> f64 {
    // The library widens a sigmoid window to 1, although narrower ones are valid; only ratios to the width matter in it.
    let unit = if function == VoiLutFunction::Sigmoid { window.width } else { 1.0 };
    let window = WindowLevel { width: window.width / unit, center: window.center / unit };
    WindowLevelTransform::new(function, window).apply(x / unit, 1.0).clamp(0.0, 1.0)
}

fn out_of_range<E>(_: E) -> DecodeError {
    DecodeError::Decode("its rescale slope or window exceeds the range of numbers".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn display(mapping: ValueMapping) -> Display {
        Display { bits: 12, signed: true, rescale: Rescale::new(2.0, -10.0), mapping, inverted: false }
    }

    fn window(function: VoiLutFunction, center: f64, width: f64) -> ValueMapping {
        ValueMapping::Window(function, WindowLevel { center, width })
    }

    #[test]
    fn levels_by_hand() {
        let raw = [0, 1, 0xfff, 0x800, 0x7ff];
        let levels = |display: Display| display.levels(&raw).unwrap();
        assert_eq!(levels(display(ValueMapping::Range)), [128, 128, 127, 0, 255]);
        let window = |function| window(function, -10.0, 11.0);
        // Rescaled: -10, -8, -12, very low, very high.
        assert_eq!(levels(display(window(VoiLutFunction::Linear))), [140, 191, 89, 0, 255]);
        assert_eq!(levels(display(window(VoiLutFunction::LinearExact))), [128, 174, 81, 0, 255]);
        assert_eq!(levels(display(window(VoiLutFunction::Sigmoid))), [128, 172, 83, 0, 255]);
        let inverted = Display { inverted: true, ..display(window(VoiLutFunction::Linear)) };
        assert_eq!(levels(inverted), [115, 64, 166, 255, 0]);
        // The values are -10, -8, -12 and the extremes; the table starts at -11.
        let table = |bits| ValueMapping::LookupTable(LookupTable { first: -11, bits, entries: vec![10, 20, 30, 255] });
        assert_eq!(levels(display(table(8))), [20, 255, 10, 10, 255]);
        assert_eq!(levels(display(table(10))), [5, 64, 2, 2, 64]);
        assert_eq!(levels(Display { inverted: true, ..display(table(8)) }), [235, 0, 245, 245, 0]);
    }

    #[test]
    fn negative_slope_inverts_and_flat_images_are_black() {
        let rescale = Rescale::new(-1.0, 0.0);
        let d = Display { bits: 16, signed: false, rescale, mapping: ValueMapping::Range, inverted: false };
        assert_eq!(d.levels(&[0, 65535, 100]).unwrap(), [255, 0, 255]);
        assert_eq!(d.levels(&[7, 7]).unwrap(), [0, 0]);
        assert_eq!(d.levels(&[]).unwrap(), [0u8; 0]);
    }

    /// A rescale slope may map all values to a range below 1, e.g. of uptake values.
    #[test]
    fn windows_may_be_narrower_than_one() {
        let levels = |function| {
            let rescale = Rescale::new(0.01, 0.0);
            let mapping = window(function, 0.4, 0.4);
            Display { bits: 8, signed: false, rescale, mapping, inverted: false }
                .levels(&[20, 30, 40, 60, 200])
                .unwrap()
        };
        assert_eq!(levels(VoiLutFunction::Linear), [0, 64, 128, 255, 255]);
        assert_eq!(levels(VoiLutFunction::LinearExact), [0, 64, 128, 255, 255]);
        assert_eq!(levels(VoiLutFunction::Sigmoid), [30, 69, 128, 225, 255]);
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        let rescale = Rescale::new(f64::MAX, -f64::MAX);
        let d = Display { bits: 8, signed: true, rescale, mapping: ValueMapping::Range, inverted: false };
        assert!(matches!(d.levels(&[0, 127, 128]), Err(DecodeError::Decode(e)) if e.contains("range of numbers")));
    }
}
