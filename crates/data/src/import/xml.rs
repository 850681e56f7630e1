//! Reads one Pascal VOC annotation. Knows the XML, not what is done with it.

use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};
use serde::Deserialize;

/// One annotation file.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(super) struct Annotation {
    pub(super) filename: String,
    size: Size,
    /// In the file's order, whatever stands between them.
    #[serde(rename = "object")]
    pub(super) objects: Vec<Object>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
struct Size {
    width: String,
    height: String,
}

/// One object: class and corners as written; either may be missing.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(super) struct Object {
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
    /// Width and height as stated, if both are.
    pub(super) fn size(&self) -> Option<(u32, u32)> {
        let side = |text: &str| text.trim().parse().ok();
        side(&self.size.width).zip(side(&self.size.height))
    }
}

impl Object {
    /// The class; empty where it is missing.
    pub(super) fn class(&self) -> &str {
        self.name.trim()
    }

    /// `[xmin, ymin, xmax, ymax]`.
    ///
    /// # Errors
    /// The rule by which the object is left out.
    pub(super) fn corners(&self) -> Result<[f32; 4], &'static str> {
        let b = &self.bndbox;
        let mut out = [0.0; 4];
        for (side, text) in out.iter_mut().zip([&b.xmin, &b.ymin, &b.xmax, &b.ymax]) {
            *side = match text.trim() {
                "" => return Err("a side is missing in its <bndbox>"),
                number => number.parse().map_err(|_| "a side of its <bndbox> is no number")?,
            };
        }
        Ok(out)
    }
}

/// Parses an annotation; the error says what is wrong, and where.
pub(super) fn parse(text: &str) -> Result<Annotation, String> {
    check_root(text)?;
    quick_xml::de::from_str(text).map_err(|e| format!("corrupt XML: {e}"))
}

/// Checks that the text is one `<annotation>` and nothing beside, for which deserialising does not look.
fn check_root(text: &str) -> Result<(), String> {
    let mut reader = Reader::from_str(text);
    let (mut depth, mut closed) = (0_usize, false);
    loop {
        let at = reader.buffer_position();
        let bad = |what: String| Err(format!("corrupt XML at byte {at}: {what}"));
        let outside = |e: &BytesStart<'_>, closed: bool| closed || e.local_name().as_ref() != b"annotation";
        match reader.read_event() {
            Err(e) => return bad(e.to_string()),
            Ok(Event::Start(e) | Event::Empty(e)) if depth == 0 && outside(&e, closed) => {
                let name = String::from_utf8_lossy(e.local_name().as_ref()).into_owned();
                return bad(format!("expected one <annotation>, found <{name}>"));
            }
            Ok(Event::Start(_)) => depth += 1,
            Ok(Event::Empty(_)) => closed |= depth == 0,
            Ok(Event::End(_)) => {
                depth = depth.saturating_sub(1);
                closed |= depth == 0;
            }
            Ok(Event::Text(t)) if depth == 0 && !t.trim_ascii().is_empty() => {
                return bad("text outside of the annotation".to_owned());
            }
            Ok(Event::Eof) if closed && depth == 0 => return Ok(()),
            Ok(Event::Eof) => return bad("the file ends in the middle of the annotation".to_owned()),
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
    fn empty_elements_say_nothing() {
        let a = parse("<annotation><filename/><size/><object><name/><bndbox/></object></annotation>").unwrap();
        assert_eq!((a.filename.as_str(), a.size(), a.objects[0].class()), ("", None, ""));
        assert!(a.objects[0].corners().unwrap_err().contains("missing"));
        assert_eq!(parse("<annotation/>"), Ok(Annotation::default()));
        let a = parse("<annotation><object><bndbox><xmin>a</xmin></bndbox></object></annotation>").unwrap();
        assert!(a.objects[0].corners().unwrap_err().contains("no number"));
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
