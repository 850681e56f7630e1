//! Parser of Pascal VOC annotation files (XML).

use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};
use serde::Deserialize;

/// A parsed annotation file.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(super) struct Annotation {
    pub(super) filename: String,
    size: Size,
    /// Objects in the order of the file; other elements may be between them.
    #[serde(rename = "object")]
    pub(super) objects: Vec<VocObject>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
struct Size {
    width: String,
    height: String,
}

/// An object: class and corners as text; either may be missing.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(super) struct VocObject {
    name: String,
    bndbox: Corners,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
struct Corners {
    xmin: String,
    ymin: String,
    xmax: String,
    ymax: String,
}

impl Annotation {
    /// Returns the stated width and height in pixels; `None` if one is missing.
    pub(super) fn size(&self) -> Option<(u32, u32)> {
        let side = |text: &str| text.trim().parse().ok();
        side(&self.size.width).zip(side(&self.size.height))
    }
}

impl VocObject {
    /// Returns the class; empty if it is missing.
    pub(super) fn class(&self) -> &str {
        self.name.trim()
    }

    /// Returns `[xmin, ymin, xmax, ymax]` as written.
    ///
    /// # Errors
    /// Returns the reason for leaving the object out.
    pub(super) fn corners(&self) -> Result<[f32; 4], &'static str> {
        let b = &self.bndbox;
        let mut out = [0.0; 4];
        for (side, text) in out.iter_mut().zip([&b.xmin, &b.ymin, &b.xmax, &b.ymax]) {
            *side = match text.trim() {
                "" => return Err("a side is missing in its <bndbox>"),
                number => number.parse().map_err(|_| "a side of its <bndbox> is not a number")?,
            };
        }
        Ok(out)
    }
}

/// Parses an annotation file.
///
/// # Errors
/// Returns a message that says what is wrong.
pub(super) fn parse(text: &str) -> Result<Annotation, String> {
    check_root(text)?;
    quick_xml::de::from_str(text).map_err(|e| format!("corrupt XML: {e}"))
}

/// Checks that the text consists of one `<annotation>`, which deserialisation does not check.
fn check_root(text: &str) -> Result<(), String> {
    let mut reader = Reader::from_str(text);
    let mut depth = 0_usize;
    let mut closed = false;
    loop {
        let offset = reader.buffer_position();
        let corrupt = |what: String| Err(format!("corrupt XML at byte {offset}: {what}"));
        let outside = |e: &BytesStart<'_>, closed: bool| closed || e.local_name().as_ref() != b"annotation";
        match reader.read_event() {
            Err(e) => return corrupt(e.to_string()),
            Ok(Event::Start(e) | Event::Empty(e)) if depth == 0 && outside(&e, closed) => {
                let name = String::from_utf8_lossy(e.local_name().as_ref()).into_owned();
                return corrupt(format!("expected one <annotation>, found <{name}>"));
            }
            Ok(Event::Start(_)) => depth += 1,
            Ok(Event::Empty(_)) => closed |= depth == 0,
            Ok(Event::End(_)) => {
                depth = depth.saturating_sub(1);
                closed |= depth == 0;
            }
            Ok(Event::Text(t)) if depth == 0 && !t.trim_ascii().is_empty() => {
                return corrupt("text outside of the annotation".to_owned());
            }
            Ok(Event::Eof) if closed && depth == 0 => return Ok(()),
            Ok(Event::Eof) => return corrupt("the file ends in the middle of the annotation".to_owned()),
            Ok(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_interleaved_objects_and_parts() {
        let a = parse(
            "<?xml version=\"1.0\"?><annotation verified=\"yes\"><filename>a.jpg</filename>\
             <object><name>A &amp; B</name><part><name>head</name><bndbox><xmin>9</xmin></bndbox></part>\
             <bndbox><ymax>4.5</ymax><xmin>1</xmin><ymin>2</ymin><xmax> 3 </xmax></bndbox></object>\
             <size><width>10</width><height>20</height></size>\
             <object><name><![CDATA[c]]></name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>1</xmax><ymax>4</ymax></bndbox></object></annotation>\n<!-- e -->",
        )
        .unwrap();
        assert_eq!((a.filename.as_str(), a.size()), ("a.jpg", Some((10, 20))));
        assert_eq!((a.objects[0].class(), a.objects[0].corners()), ("A & B", Ok([1.0, 2.0, 3.0, 4.5])));
        assert_eq!((a.objects[1].class(), a.objects.len()), ("c", 2));
    }

    #[test]
    fn empty_elements_are_missing_values() {
        let a = parse("<annotation><filename/><size/><object><name/><bndbox/></object></annotation>").unwrap();
        assert_eq!((a.filename.as_str(), a.size(), a.objects[0].class()), ("", None, ""));
        assert!(a.objects[0].corners().unwrap_err().contains("missing"));
        assert_eq!(parse("<annotation/>"), Ok(Annotation::default()));
        let a = parse("<annotation><object><bndbox><xmin>a</xmin></bndbox></object></annotation>").unwrap();
        assert!(a.objects[0].corners().unwrap_err().contains("not a number"));
    }

    #[test]
    fn corrupt_files_are_errors() {
        for (text, what) in [
            ("", "ends in the middle"),
            ("<annotation><object><name>x</name>", "ends in the middle"),
            ("<annotation><object></annotation>", "corrupt"),
            ("<html></html>", "expected one <annotation>"),
            ("<annotation/>x<annotation></annotation", "corrupt"),
            ("<annotation/><annotation/>", "corrupt"),
            ("<!DOCTYPE a [<!ENTITY a \"aaaa\">]><annotation><filename>&a;</filename></annotation>", "corrupt"),
        ] {
            let e = parse(text).unwrap_err();
            assert!(e.contains(what), "{text}: {e}");
        }
    }
}
