//! The part of a DICOM file that images are made of: some elements of the main data set, its first table of interest, and where the
//! pixels lie. Names of patients and the like are never decoded.
//!
//! The parser of dicom-rs reads lazily here: a length is checked against the file before a value is read, and nesting is checked
//! before the parser goes on, because it trusts both.

use std::collections::BTreeMap;
use std::io::Cursor;

use dicom_core::{PrimitiveValue, Tag, VR};
use dicom_dictionary_std::tags;
use dicom_encoding::{Endianness, TransferSyntax, TransferSyntaxIndex};
use dicom_parser::StatefulDecode;
use dicom_parser::dataset::LazyDataToken;
use dicom_parser::dataset::lazy_read::LazyDataSetReader;
use dicom_transfer_syntax_registry::TransferSyntaxRegistry;
use dicom_transfer_syntax_registry::entries::{EXPLICIT_VR_LITTLE_ENDIAN, IMPLICIT_VR_LITTLE_ENDIAN};

use super::{Fault, fail, header};

/// Longest value that is read, in bytes; those that images need are a few words.
const VALUE_LIMIT: u32 = 4096;
/// Longest table that is read, in bytes: 65,536 entries of 16 bits.
const TABLE_LIMIT: u32 = 2 << 16;

const WANTED: [Tag; 15] = [
    tags::ROWS,
    tags::COLUMNS,
    tags::NUMBER_OF_FRAMES,
    tags::SAMPLES_PER_PIXEL,
    tags::PHOTOMETRIC_INTERPRETATION,
    tags::PLANAR_CONFIGURATION,
    tags::BITS_ALLOCATED,
    tags::BITS_STORED,
    tags::HIGH_BIT,
    tags::PIXEL_REPRESENTATION,
    tags::RESCALE_SLOPE,
    tags::RESCALE_INTERCEPT,
    tags::WINDOW_CENTER,
    tags::WINDOW_WIDTH,
    tags::VOILUT_FUNCTION,
];

/// The table of interest as it stands in the file: its descriptor and its entries.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct RawTable<'a> {
    pub descriptor: &'a [u8],
    pub entries: &'a [u8],
    /// The descriptor is said to hold a signed number (VR SS).
    pub signed: bool,
}

/// Where the pixels lie.
#[derive(Debug, Default)]
pub(super) enum Pixels<'a> {
    /// The data set has none.
    #[default]
    None,
    /// As they are.
    Native(&'a [u8]),
    /// Compressed: the fragments, the offset table (first) left out.
    Fragments(Vec<&'a [u8]>),
}

/// What was read of a file.
#[derive(Debug, Default)]
pub(super) struct DataSet<'a> {
    values: BTreeMap<Tag, PrimitiveValue>,
    /// Sequences of the main data set, by tag.
    sequences: Vec<Tag>,
    /// Of the first item of the VOI LUT sequence.
    pub table: RawTable<'a>,
    /// The pixels.
    pub pixels: Pixels<'a>,
    /// Values of pixels have their high byte first.
    pub big_endian: bool,
    /// Unique identifier of the transfer syntax.
    pub syntax: String,
}

impl<'a> DataSet<'a> {
    /// Reads a file up to its pixels.
    pub(super) fn read(bytes: &'a [u8]) -> Result<Self, Fault> {
        let header = header::read(bytes)?;
        let syntax = TransferSyntaxRegistry
            .get(header.syntax)
            .filter(|s| !s.name().contains("Deflate"))
            .ok_or_else(|| Fault::Decode(format!("its transfer syntax {} is not supported", header.syntax)))?;
        // What the data set is written in may differ from what the header says: the first element shows it.
        let written = match (header.explicit, syntax.endianness()) {
            (false, _) => &IMPLICIT_VR_LITTLE_ENDIAN.erased(),
            (true, Endianness::Big) => syntax,
            (true, _) => &EXPLICIT_VR_LITTLE_ENDIAN.erased(),
        };
        let mut out = Self::read_set(header.rest, written)?;
        out.big_endian = written.endianness() == Endianness::Big;
        out.syntax = header.syntax.to_owned();
        Ok(out)
    }

    fn read_set(bytes: &'a [u8], syntax: &TransferSyntax) -> Result<Self, Fault> {
        let mut out = Self::default();
        let mut reader = LazyDataSetReader::new_with_ts(Cursor::new(bytes), syntax).map_err(fail)?;
        // Open levels: true for an item, false for a sequence.
        let mut open: Vec<bool> = Vec::new();
        let mut fragments: Option<Vec<&[u8]>> = None;
        // Items of the VOI LUT sequence that were begun; none outside of it.
        let mut tables: Option<usize> = None;
        let inside = |start: u64, len: u32| {
            let start = usize::try_from(start).ok()?;
            bytes.get(start..start.checked_add(len as usize)?)
        };
        let cut = || fail("it ends within a value");
        let close = |open: &mut Vec<bool>, item| match open.pop() == Some(item) {
            true => Ok(()),
            false => Err(fail("something ends that was not begun")),
        };
        while let Some(token) = reader.advance() {
            match token.map_err(fail)? {
                LazyDataToken::SequenceStart { tag, .. } => {
                    if open.is_empty() {
                        out.sequences.push(tag);
                        tables = (tag == tags::VOILUT_SEQUENCE).then_some(0);
                    }
                    open.push(false);
                }
                LazyDataToken::PixelSequenceStart => {
                    if open.is_empty() {
                        fragments = Some(Vec::new());
                    }
                    open.push(false);
                }
                LazyDataToken::ItemStart { .. } => {
                    if open.last() != Some(&false) {
                        return Err(fail("an item lies outside of a sequence"));
                    }
                    open.push(true);
                    tables = tables.map(|n| n + usize::from(open.len() == 2));
                    if let Some(list) = fragments.as_mut().filter(|_| open.len() == 2) {
                        list.push(&[]);
                    }
                }
                LazyDataToken::ItemEnd => close(&mut open, true)?,
                LazyDataToken::SequenceEnd => {
                    close(&mut open, false)?;
                    if let Some(list) = fragments.take_if(|_| open.is_empty()) {
                        out.pixels = Pixels::Fragments(list.into_iter().skip(1).collect());
                        return Ok(out);
                    }
                }
                LazyDataToken::LazyItemValue { len, decoder } => {
                    let value = inside(decoder.position(), len).ok_or_else(cut)?;
                    if let Some(last) = fragments.as_mut().and_then(|f| f.last_mut()) {
                        *last = value;
                    }
                    decoder.skip_bytes(len).map_err(fail)?;
                }
                LazyDataToken::LazyValue { header, decoder } => {
                    let len = header.len.0;
                    let value = inside(decoder.position(), len).ok_or_else(cut)?;
                    if !open.is_empty() {
                        if tables == Some(1) && open.len() == 2 && len <= TABLE_LIMIT {
                            out.table.note(header.tag, header.vr, value);
                        }
                        decoder.skip_bytes(len).map_err(fail)?;
                    } else if header.tag == tags::PIXEL_DATA {
                        out.pixels = Pixels::Native(value);
                        return Ok(out);
                    } else if WANTED.contains(&header.tag) && len <= VALUE_LIMIT {
                        out.values.insert(header.tag, decoder.read_value_preserved(&header).map_err(fail)?);
                    } else {
                        decoder.skip_bytes(len).map_err(fail)?;
                    }
                }
                // A header alone: its value is the next token.
                _ => {}
            }
        }
        if fragments.is_some() {
            return Err(fail("it ends within its pixels"));
        }
        Ok(out)
    }

    /// A 16-bit word of the data set.
    pub(super) fn word(&self, bytes: [u8; 2]) -> u16 {
        if self.big_endian { u16::from_be_bytes(bytes) } else { u16::from_le_bytes(bytes) }
    }

    /// Whether the main data set has this sequence.
    pub(super) fn has_sequence(&self, tag: Tag) -> bool {
        self.sequences.contains(&tag)
    }

    /// A whole number; none when the element is absent or empty.
    ///
    /// # Errors
    /// It is there and no whole number.
    pub(super) fn number(&self, tag: Tag, name: &str) -> Result<Option<u32>, Fault> {
        self.convert(tag, name, |v| v.to_int::<u32>().map_err(fail))
    }

    /// The first of several real numbers; none when the element is absent or empty.
    ///
    /// # Errors
    /// It is there and no number.
    pub(super) fn real(&self, tag: Tag, name: &str) -> Result<Option<f64>, Fault> {
        let value = self.convert(tag, name, |v| v.to_multi_float64().map_err(fail))?;
        Ok(value.and_then(|v| v.first().copied()))
    }

    /// A text without its padding; none when the element is absent or empty.
    pub(super) fn text(&self, tag: Tag) -> Option<String> {
        let value = self.values.get(&tag)?.to_str();
        let text = value.trim_matches(|c: char| c.is_whitespace() || c == '\0');
        (!text.is_empty()).then(|| text.to_owned())
    }

    fn convert<T>(
        &self,
        tag: Tag,
        name: &str,
        read: impl FnOnce(&PrimitiveValue) -> Result<T, Fault>,
    ) -> Result<Option<T>, Fault> {
        if self.text(tag).is_none() {
            return Ok(None);
        }
        let value = self.values.get(&tag).map(read).transpose();
        value.map_err(|_| Fault::Decode(format!("its {name} is {:?}, no number", self.text(tag).unwrap_or_default())))
    }
}

impl<'a> RawTable<'a> {
    fn note(&mut self, tag: Tag, vr: VR, value: &'a [u8]) {
        match tag {
            tags::LUT_DESCRIPTOR => (self.descriptor, self.signed) = (value, vr == VR::SS),
            tags::LUT_DATA => self.entries = value,
            _ => {}
        }
    }
}
