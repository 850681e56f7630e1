//! The parts of a DICOM file needed for its image: some elements of the main data set, its first VOI lookup table, and the location of the
//! pixels. Patient names and other personal data are never decoded.
//!
//! The dicom-rs parser is used lazily: lengths are checked against the file before a value is read, and nesting is checked before the parser
//! continues, because it trusts both.

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

use super::header::Header;
use super::{DecodeError, fail};

/// Maximum length of a value in bytes; those that images need are a few words.
const MAX_VALUE_BYTES: u32 = 4096;
/// Maximum length of a lookup table in bytes: 65,536 entries of 16 bits.
const MAX_TABLE_BYTES: u32 = 2 << 16;

/// Elements of the main data set that are read.
const IMAGE_TAGS: [Tag; 15] = [
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

/// A VOI lookup table as stored in the file.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct RawTable<'a> {
    pub descriptor: &'a [u8],
    pub entries: &'a [u8],
    /// Whether the descriptor is declared as signed (VR SS).
    pub signed: bool,
}

/// Encoded pixels of a data set.
#[derive(Debug, Default)]
pub(super) enum Pixels<'a> {
    /// The data set has no pixels.
    #[default]
    None,
    /// Uncompressed pixels.
    Native(&'a [u8]),
    /// Fragments of compressed pixels, without the offset table that precedes them.
    Fragments(Vec<&'a [u8]>),
}

/// The parts read from a file.
#[derive(Debug, Default)]
pub(super) struct DataSet<'a> {
    values: BTreeMap<Tag, PrimitiveValue>,
    /// Tags of the sequences in the main data set.
    sequences: Vec<Tag>,
    /// Table of the first item of the VOI LUT sequence.
    pub table: RawTable<'a>,
    /// Encoded pixels.
    pub pixels: Pixels<'a>,
    /// Whether pixel values are big-endian.
    pub big_endian: bool,
    /// Unique identifier of the transfer syntax.
    pub syntax: String,
}

impl<'a> DataSet<'a> {
    /// Reads a data set up to and including its pixels.
    pub(super) fn read(header: &'a Header<'_>) -> Result<Self, DecodeError> {
        // Pixels referenced by JPIP are on a server.
        let syntax = TransferSyntaxRegistry
            .get(header.syntax)
            .filter(|s| !s.name().starts_with("JPIP"))
            .ok_or_else(|| DecodeError::Decode(format!("its transfer syntax {} is not supported", header.syntax)))?;
        // The encoding of the data set may differ from the header; the first element shows it.
        let actual_syntax = match (header.explicit, syntax.endianness()) {
            (false, _) => &IMPLICIT_VR_LITTLE_ENDIAN.erased(),
            (true, Endianness::Big) => syntax,
            (true, _) => &EXPLICIT_VR_LITTLE_ENDIAN.erased(),
        };
        let mut out = Self::read_set(&header.rest, actual_syntax)?;
        out.big_endian = actual_syntax.endianness() == Endianness::Big;
        out.syntax = header.syntax.to_owned();
        Ok(out)
    }

    fn read_set(bytes: &'a [u8], syntax: &TransferSyntax) -> Result<Self, DecodeError> {
        let mut out = Self::default();
        let mut reader = LazyDataSetReader::new_with_ts(Cursor::new(bytes), syntax).map_err(fail)?;
        // Open levels: true for an item, false for a sequence.
        let mut open: Vec<bool> = Vec::new();
        let mut fragments: Option<Vec<&[u8]>> = None;
        // Number of items started in the VOI LUT sequence; `None` outside of it.
        let mut tables: Option<usize> = None;
        let value_at = |start: u64, len: u32| {
            let start = usize::try_from(start).ok()?;
            bytes.get(start..start.checked_add(len as usize)?)
        };
        let truncated = || fail("it ends within a value");
        let close = |open: &mut Vec<bool>, item| match open.pop() == Some(item) {
            true => Ok(()),
            false => Err(fail("an item or sequence ends that was not started")),
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
                        return Err(fail("an item is outside of a sequence"));
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
                    let value = value_at(decoder.position(), len).ok_or_else(truncated)?;
                    if let Some(last) = fragments.as_mut().and_then(|f| f.last_mut()) {
                        *last = value;
                    }
                    decoder.skip_bytes(len).map_err(fail)?;
                }
                LazyDataToken::LazyValue { header, decoder } => {
                    let len = header.len.0;
                    let value = value_at(decoder.position(), len).ok_or_else(truncated)?;
                    if !open.is_empty() {
                        if tables == Some(1) && open.len() == 2 && len <= MAX_TABLE_BYTES {
                            out.table.record(header.tag, header.vr, value);
                        }
                        decoder.skip_bytes(len).map_err(fail)?;
                    } else if header.tag == tags::PIXEL_DATA {
                        out.pixels = Pixels::Native(value);
                        return Ok(out);
                    } else if IMAGE_TAGS.contains(&header.tag) && len <= MAX_VALUE_BYTES {
                        out.values.insert(header.tag, decoder.read_value_preserved(&header).map_err(fail)?);
                    } else {
                        decoder.skip_bytes(len).map_err(fail)?;
                    }
                }
                // A header whose value is the next token.
                _ => {}
            }
        }
        if fragments.is_some() {
            return Err(fail("it ends within its pixels"));
        }
        Ok(out)
    }

    /// Decodes a 16-bit word in the byte order of the data set.
    pub(super) fn word(&self, bytes: [u8; 2]) -> u16 {
        if self.big_endian { u16::from_be_bytes(bytes) } else { u16::from_le_bytes(bytes) }
    }

    /// Returns whether the main data set has this sequence.
    pub(super) fn has_sequence(&self, tag: Tag) -> bool {
        self.sequences.contains(&tag)
    }

    /// Returns an integer, or `None` if the element is absent or empty.
    ///
    /// # Errors
    /// Returns [`DecodeError::Decode`] if the element is not an integer.
    pub(super) fn number(&self, tag: Tag, name: &str) -> Result<Option<u32>, DecodeError> {
        self.convert(tag, name, |v| v.to_int::<u32>().map_err(fail))
    }

    /// Returns the first of several real numbers, or `None` if the element is absent or empty.
    ///
    /// # Errors
    /// Returns [`DecodeError::Decode`] if the element is not a number.
    pub(super) fn real(&self, tag: Tag, name: &str) -> Result<Option<f64>, DecodeError> {
        let value = self.convert(tag, name, |v| v.to_multi_float64().map_err(fail))?;
        Ok(value.and_then(|v| v.first().copied()))
    }

    /// Returns a text without its padding, or `None` if the element is absent or empty.
    pub(super) fn text(&self, tag: Tag) -> Option<String> {
        let value = self.values.get(&tag)?.to_str();
        let text = value.trim_matches(|c: char| c.is_whitespace() || c == '\0');
        (!text.is_empty()).then(|| text.to_owned())
    }

    fn convert<T>(
        &self,
        tag: Tag,
        name: &str,
        read: impl FnOnce(&PrimitiveValue) -> Result<T, DecodeError>,
    ) -> Result<Option<T>, DecodeError> {
        if self.text(tag).is_none() {
            return Ok(None);
        }
        let value = self.values.get(&tag).map(read).transpose();
        value.map_err(|_| {
            DecodeError::Decode(format!(
                "its {name} is {:?}, which is not a number",
                self.text(tag).unwrap_or_default()
            ))
        })
    }
}

impl<'a> RawTable<'a> {
    fn record(&mut self, tag: Tag, vr: VR, value: &'a [u8]) {
        match tag {
            tags::LUT_DESCRIPTOR => (self.descriptor, self.signed) = (value, vr == VR::SS),
            tags::LUT_DATA => self.entries = value,
            _ => {}
        }
    }
}
