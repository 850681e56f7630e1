//! Reads one Pascal VOC annotation. Knows the XML, not what is done with it.

use quick_xml::Reader;
use quick_xml::events::Event;

/// One annotation file.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Annotation {
    pub(super) filename: String,
    /// Width and height as stated, if both are.
    pub(super) size: Option<(u32, u32)>,
    pub(super) objects: Vec<Object>,
}

/// One object: class and `[xmin, ymin, xmax, ymax]` as written.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Object {
    pub(super) name: String,
    pub(super) coords: [f32; 4],
}

const SIDES: [&str; 4] = ["xmin", "ymin", "xmax", "ymax"];

/// Parses an annotation; the error says what is wrong, and where.
pub(super) fn parse(text: &str) -> Result<Annotation, String> {
    let mut reader = Reader::from_str(text);
    let mut out = Annotation::default();
    let mut path: Vec<String> = Vec::new();
    let mut value = String::new();
    let (mut size, mut sides) = ([None; 2], [None; 4]);
    let mut closed = false;
    loop {
        let at = reader.buffer_position();
        let bad = |what: String| format!("corrupt XML at byte {at}: {what}");
        match reader.read_event().map_err(|e| bad(e.to_string()))? {
            Event::Start(e) => {
                let name = String::from_utf8_lossy(e.local_name().as_ref()).into_owned();
                if path.is_empty() && (closed || name != "annotation") {
                    return Err(bad(format!("expected one <annotation>, found <{name}>")));
                }
                path.push(name);
                value.clear();
                if path.len() == 2 && path[1] == "object" {
                    out.objects.push(Object::default());
                    sides = [None; 4];
                }
            }
            Event::End(_) => {
                let at: Vec<&str> = path.iter().skip(1).map(String::as_str).collect();
                let text = value.trim();
                match at.as_slice() {
                    ["filename"] => out.filename = text.to_owned(),
                    ["size", "width"] => size[0] = text.parse().ok(),
                    ["size", "height"] => size[1] = text.parse().ok(),
                    ["object", "name"] => {
                        if let Some(o) = out.objects.last_mut() {
                            o.name = text.to_owned();
                        }
                    }
                    ["object", "bndbox", side] => {
                        if let Some(k) = SIDES.iter().position(|s| s == side) {
                            let number = text.parse::<f32>();
                            sides[k] = Some(number.map_err(|_| bad(format!("<{side}> is \"{text}\", not a number")))?);
                        }
                    }
                    ["object"] => {
                        let k = out.objects.len();
                        let Some(o) = out.objects.last_mut() else { return Err(bad("stray object".to_owned())) };
                        if o.name.is_empty() {
                            return Err(bad(format!("object {} has no <name>", k - 1)));
                        }
                        for (i, side) in SIDES.iter().enumerate() {
                            o.coords[i] = sides[i]
                                .ok_or_else(|| bad(format!("object {} has no <{side}> in its <bndbox>", k - 1)))?;
                        }
                    }
                    _ => {}
                }
                path.pop();
                value.clear();
                closed |= path.is_empty();
            }
            Event::Text(e) => value.push_str(&e.xml_content().map_err(|e| bad(e.to_string()))?),
            Event::CData(e) => value.push_str(&String::from_utf8_lossy(&e)),
            Event::GeneralRef(e) => value.push_str(&entity(&e).ok_or_else(|| bad("unknown entity".to_owned()))?),
            Event::Eof if closed => break,
            Event::Eof => return Err(bad("the file ends in the middle of the annotation".to_owned())),
            _ => {}
        }
    }
    out.size = size[0].zip(size[1]);
    Ok(out)
}

fn entity(e: &quick_xml::events::BytesRef<'_>) -> Option<String> {
    if let Ok(Some(c)) = e.resolve_char_ref() {
        return Some(c.to_string());
    }
    quick_xml::escape::resolve_xml_entity(&String::from_utf8_lossy(e)).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_interleaved_objects_and_parts() {
        let a = parse(
            "<?xml version=\"1.0\"?><annotation><filename>a.jpg</filename>\
             <object><name>A &amp; B</name><part><name>head</name><bndbox><xmin>9</xmin></bndbox></part>\
             <bndbox><ymax>4.5</ymax><xmin>1</xmin><ymin>2</ymin><xmax>3</xmax></bndbox></object>\
             <size><width>10</width><height>20</height></size>\
             <object><name>c</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>1</xmax><ymax>4</ymax></bndbox></object></annotation>",
        )
        .unwrap();
        assert_eq!((a.filename.as_str(), a.size), ("a.jpg", Some((10, 20))));
        assert_eq!(a.objects[0], Object { name: "A & B".into(), coords: [1.0, 2.0, 3.0, 4.5] });
        assert_eq!(a.objects[1].name, "c");
    }

    #[test]
    fn corrupt_files_are_errors() {
        for (text, what) in [
            ("", "ends in the middle"),
            ("<annotation><object><name>x</name>", "ends in the middle"),
            ("<annotation><object></annotation>", "corrupt"),
            ("<html></html>", "expected one <annotation>"),
            ("<annotation/>x<annotation></annotation", "corrupt"),
            ("<annotation><object><name>x</name></object></annotation>", "no <xmin>"),
            ("<annotation><object><bndbox><xmin>a</xmin></bndbox></object></annotation>", "not a number"),
            ("<annotation><object></object></annotation>", "no <name>"),
        ] {
            let e = parse(text).unwrap_err();
            assert!(e.contains(what), "{text}: {e}");
        }
    }
}
