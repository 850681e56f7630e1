//! From stored values of one DICOM channel to 8 bits: rescale, window or table, polarity (DICOM PS3.3 C.11.1, C.11.2, C.7.6.3).

/// How stored values are shown.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Display {
    /// Bits of a stored value, 1 to 16.
    pub bits: u32,
    /// Stored values are in two's complement.
    pub signed: bool,
    /// Rescale slope and intercept.
    pub rescale: (f64, f64),
    /// What spans black to white.
    pub shown: Shown,
    /// The smallest value is white (MONOCHROME1).
    pub inverted: bool,
}

/// What of the rescaled values is shown.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Shown {
    /// The values that occur, smallest to largest.
    Range,
    Window(Window),
    Table(Table),
}

/// A table of interest: brightness by rescaled value.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Table {
    /// The value that the first entry is for; lower ones have it too, and values beyond the table its last.
    pub first: i32,
    /// Bits of an entry, 8 to 16.
    pub bits: u32,
    pub entries: Vec<u16>,
}

impl Table {
    /// Share of full brightness, `[0, 1]`.
    fn at(&self, x: f64) -> f64 {
        let last = self.entries.len().saturating_sub(1);
        // As a cast does: what is negative or no number becomes 0.
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
    /// Share of full brightness, `[0, 1]`.
    fn at(&self, x: f64) -> f64 {
        let (c, w) = (self.centre, self.width);
        match self.function {
            Function::Linear if w > 1.0 => ((x - (c - 0.5)) / (w - 1.0) + 0.5).clamp(0.0, 1.0),
            Function::Linear => f64::from(u8::from(x > c - 0.5)),
            Function::LinearExact => ((x - c) / w + 0.5).clamp(0.0, 1.0),
            Function::Sigmoid => 1.0 / (1.0 + (-4.0 * (x - c) / w).exp()),
        }
    }
}

impl Display {
    /// Levels of raw values, whose bits above `bits` are 0.
    pub(super) fn levels(&self, raw: &[u16]) -> Vec<u8> {
        let last = u16::MAX >> (16 - self.bits.clamp(1, 16));
        let rescaled = |v: u16| self.stored(v) * self.rescale.0 + self.rescale.1;
        let range = || {
            let values = || raw.iter().map(|v| self.stored(*v & last));
            let (low, high) = (values().fold(f64::MAX, f64::min), values().fold(f64::MIN, f64::max));
            let ends = [low, high].map(|v| v * self.rescale.0 + self.rescale.1);
            (ends[0].min(ends[1]), ends[0].max(ends[1]))
        };
        let (low, high) = if self.shown == Shown::Range { range() } else { (0.0, 0.0) };
        let table: Vec<u8> = (0..=last)
            .map(|v| {
                let share = match &self.shown {
                    Shown::Window(window) => window.at(rescaled(v)),
                    Shown::Table(table) => table.at(rescaled(v)),
                    Shown::Range if high > low => ((rescaled(v) - low) / (high - low)).clamp(0.0, 1.0),
                    Shown::Range => 0.0,
                };
                let share = if self.inverted { 1.0 - share } else { share };
                (share * 255.0).round() as u8
            })
            .collect();
        raw.iter().map(|v| table[usize::from(*v & last)]).collect()
    }

    /// The number that a raw value stands for.
    fn stored(&self, raw: u16) -> f64 {
        let sign = 1i32 << (self.bits.clamp(1, 16) - 1);
        let value = i32::from(raw);
        f64::from(if self.signed && value & sign != 0 { value - 2 * sign } else { value })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn display(shown: Shown) -> Display {
        Display { bits: 12, signed: true, rescale: (2.0, -10.0), shown, inverted: false }
    }

    #[test]
    fn by_hand() {
        let raw = [0, 1, 0xfff, 0x800, 0x7ff];
        assert_eq!(display(Shown::Range).levels(&raw), [128, 128, 127, 0, 255]);
        let window = |function| Shown::Window(Window { centre: -10.0, width: 11.0, function });
        // Rescaled: -10, -8, -12, very low, very high.
        assert_eq!(display(window(Function::Linear)).levels(&raw), [140, 191, 89, 0, 255]);
        assert_eq!(display(window(Function::LinearExact)).levels(&raw), [128, 174, 81, 0, 255]);
        assert_eq!(display(window(Function::Sigmoid)).levels(&raw), [128, 172, 83, 0, 255]);
        let inverted = Display { inverted: true, ..display(window(Function::Linear)) };
        assert_eq!(inverted.levels(&raw), [115, 64, 166, 255, 0]);
        // Of the values -10, -8, -12 and the ends; the table begins at -11.
        let table = |bits| Shown::Table(Table { first: -11, bits, entries: vec![10, 20, 30, 255] });
        assert_eq!(display(table(8)).levels(&raw), [20, 255, 10, 10, 255]);
        assert_eq!(display(table(10)).levels(&raw), [5, 64, 2, 2, 64]);
        assert_eq!(Display { inverted: true, ..display(table(8)) }.levels(&raw), [235, 0, 245, 245, 0]);
    }

    #[test]
    fn a_negative_slope_turns_and_a_flat_image_is_black() {
        let d = Display { bits: 16, signed: false, rescale: (-1.0, 0.0), shown: Shown::Range, inverted: false };
        assert_eq!(d.levels(&[0, 65535, 100]), [255, 0, 255]);
        assert_eq!(d.levels(&[7, 7]), [0, 0]);
        assert_eq!(d.levels(&[]), [0u8; 0]);
    }
}
