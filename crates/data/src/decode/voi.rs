//! Conversion of stored values of one DICOM channel to 8 bits: rescaling, window or lookup table, polarity (DICOM PS3.3 C.11.1, C.11.2,
//! C.7.6.3).

/// Conversion of stored values to brightness.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Display {
    /// Bits per stored value, 1 to 16.
    pub bits: u32,
    /// Whether stored values are in two's complement.
    pub signed: bool,
    /// Rescale slope and intercept.
    pub rescale: (f64, f64),
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
    Window(Window),
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

/// A window on rescaled values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Window {
    pub centre: f64,
    pub width: f64,
    pub function: Function,
}

/// Shape of a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Function {
    Linear,
    LinearExact,
    Sigmoid,
}

impl Window {
    /// Returns the brightness of a rescaled value, in `[0, 1]`.
    fn brightness(&self, x: f64) -> f64 {
        let c = self.centre;
        let w = self.width;
        match self.function {
            Function::Linear if w > 1.0 => ((x - (c - 0.5)) / (w - 1.0) + 0.5).clamp(0.0, 1.0),
            Function::Linear => f64::from(u8::from(x > c - 0.5)),
            Function::LinearExact => ((x - c) / w + 0.5).clamp(0.0, 1.0),
            Function::Sigmoid => 1.0 / (1.0 + (-4.0 * (x - c) / w).exp()),
        }
    }
}

impl Display {
    /// Converts raw values, whose bits above `bits` are ignored, to 8-bit levels.
    pub(super) fn levels(&self, raw: &[u16]) -> Vec<u8> {
        let last = u16::MAX >> (16 - self.bits.clamp(1, 16));
        let rescaled = |v: u16| self.stored(v) * self.rescale.0 + self.rescale.1;
        let range = || {
            let values = || raw.iter().map(|v| self.stored(*v & last));
            let low = values().fold(f64::MAX, f64::min);
            let high = values().fold(f64::MIN, f64::max);
            let ends = [low, high].map(|v| v * self.rescale.0 + self.rescale.1);
            (ends[0].min(ends[1]), ends[0].max(ends[1]))
        };
        let (low, high) = if self.mapping == ValueMapping::Range { range() } else { (0.0, 0.0) };
        let table: Vec<u8> = (0..=last)
            .map(|v| {
                let share = match &self.mapping {
                    ValueMapping::Window(window) => window.brightness(rescaled(v)),
                    ValueMapping::LookupTable(table) => table.brightness(rescaled(v)),
                    ValueMapping::Range if high > low => ((rescaled(v) - low) / (high - low)).clamp(0.0, 1.0),
                    ValueMapping::Range => 0.0,
                };
                let share = if self.inverted { 1.0 - share } else { share };
                (share * 255.0).round() as u8
            })
            .collect();
        raw.iter().map(|v| table[usize::from(*v & last)]).collect()
    }

    /// Returns the stored number that a raw value encodes.
    fn stored(&self, raw: u16) -> f64 {
        let sign = 1i32 << (self.bits.clamp(1, 16) - 1);
        let value = i32::from(raw);
        f64::from(if self.signed && value & sign != 0 { value - 2 * sign } else { value })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn display(mapping: ValueMapping) -> Display {
        Display { bits: 12, signed: true, rescale: (2.0, -10.0), mapping, inverted: false }
    }

    #[test]
    fn levels_by_hand() {
        let raw = [0, 1, 0xfff, 0x800, 0x7ff];
        assert_eq!(display(ValueMapping::Range).levels(&raw), [128, 128, 127, 0, 255]);
        let window = |function| ValueMapping::Window(Window { centre: -10.0, width: 11.0, function });
        // Rescaled: -10, -8, -12, very low, very high.
        assert_eq!(display(window(Function::Linear)).levels(&raw), [140, 191, 89, 0, 255]);
        assert_eq!(display(window(Function::LinearExact)).levels(&raw), [128, 174, 81, 0, 255]);
        assert_eq!(display(window(Function::Sigmoid)).levels(&raw), [128, 172, 83, 0, 255]);
        let inverted = Display { inverted: true, ..display(window(Function::Linear)) };
        assert_eq!(inverted.levels(&raw), [115, 64, 166, 255, 0]);
        // The values are -10, -8, -12 and the extremes; the table starts at -11.
        let table = |bits| ValueMapping::LookupTable(LookupTable { first: -11, bits, entries: vec![10, 20, 30, 255] });
        assert_eq!(display(table(8)).levels(&raw), [20, 255, 10, 10, 255]);
        assert_eq!(display(table(10)).levels(&raw), [5, 64, 2, 2, 64]);
        assert_eq!(Display { inverted: true, ..display(table(8)) }.levels(&raw), [235, 0, 245, 245, 0]);
    }

    #[test]
    fn negative_slope_inverts_and_flat_images_are_black() {
        let d =
            Display { bits: 16, signed: false, rescale: (-1.0, 0.0), mapping: ValueMapping::Range, inverted: false };
        assert_eq!(d.levels(&[0, 65535, 100]), [255, 0, 255]);
        assert_eq!(d.levels(&[7, 7]), [0, 0]);
        assert_eq!(d.levels(&[]), [0u8; 0]);
    }
}
