//! Reads and checks score requests: an inconsistent one is rejected with the name of the field.

use unveil_core::{Record, RecordFault};
use unveil_preprocess::codec::Sizes;
use unveil_proto::{ConvertError, attention_from_wire, box_form_from_wire, v1};

use crate::RewardError;
use crate::score::{GroupInput, ResponseInput};

/// Most true boxes of a record.
const BOX_LIMIT: usize = 1024;

/// Most responses of a group.
const RESPONSE_LIMIT: usize = 1024;

/// Most bytes of a record as JSON.
const RECORD_LIMIT: usize = 4 << 20;

/// Most bytes of a response's text, and most tokens of a response.
const TEXT_LIMIT: usize = 1 << 20;

/// Reads and checks a request.
///
/// Inconsistent attention is dropped, so that its component is masked and the others are still scored.
///
/// # Errors
/// Returns [`RewardError::Request`] with the name of the field and the problem with it.
pub fn group_from_request(request: v1::ScoreRequest) -> Result<GroupInput, RewardError> {
    check_limit("record_json", request.record_json.len(), RECORD_LIMIT, "bytes")?;
    let record: Record =
        serde_json::from_str(&request.record_json).map_err(|e| RewardError::request("record_json", e.to_string()))?;
    let original = (check_side("image_width", request.image_width)?, check_side("image_height", request.image_height)?);
    let resized =
        (check_side("resized_width", request.resized_width)?, check_side("resized_height", request.resized_height)?);
    let boxes = box_form_from_wire(request.box_form).map_err(|e| {
        let what = match e {
            ConvertError::Missing(_) => "is not set: name the notation of the boxes in the responses".to_owned(),
            _ => format!("is {}, which is unknown", request.box_form),
        };
        RewardError::request("box_form", what)
    })?;
    check_record(&record, original).map_err(|what| RewardError::request("record_json", what))?;
    if request.responses.is_empty() {
        return Err(RewardError::request("responses", "is empty: send the whole group"));
    }
    if request.responses.len() > RESPONSE_LIMIT {
        let what = format!("has {} entries; at most {RESPONSE_LIMIT} are scored together", request.responses.len());
        return Err(RewardError::request("responses", what));
    }
    let mut seen = std::collections::BTreeSet::new();
    let responses = request
        .responses
        .into_iter()
        .enumerate()
        .map(|(at, r)| {
            if !seen.insert(r.index) {
                return Err(RewardError::request(
                    format!("responses[{at}].index"),
                    format!("{} occurs twice", r.index),
                ));
            }
            response(at, r)
        })
        .collect::<Result<_, _>>()?;
    Ok(GroupInput { record, sizes: Sizes { original, resized }, boxes, responses })
}

/// Checks a record for problems that make its scores meaningless; `image` is its size in pixels.
pub(crate) fn check_record(record: &Record, image: (u32, u32)) -> Result<(), String> {
    if record.boxes.len() > BOX_LIMIT {
        return Err(format!("has {} boxes; at most {BOX_LIMIT} can be scored", record.boxes.len()));
    }
    let faults = record.faults(Some(image));
    match faults.iter().find(|f| matches!(f, RecordFault::NoId | RecordFault::Box { .. })) {
        Some(fault) => Err(format!("is not valid: {fault} (image {} x {})", image.0, image.1)),
        None => Ok(()),
    }
}

fn check_side(field: &str, value: u32) -> Result<u32, RewardError> {
    if value == 0 {
        return Err(RewardError::request(field, "is 0: give the size in pixels"));
    }
    Ok(value)
}

fn check_limit(field: &str, found: usize, most: usize, unit: &str) -> Result<(), RewardError> {
    let what = || RewardError::request(field, format!("has {found} {unit}; at most {most} are scored"));
    if found > most { Err(what()) } else { Ok(()) }
}

fn response(at: usize, r: v1::Response) -> Result<ResponseInput, RewardError> {
    check_limit(&format!("responses[{at}].text"), r.text.len(), TEXT_LIMIT, "bytes")?;
    check_limit(&format!("responses[{at}].tokens"), r.tokens.len(), TEXT_LIMIT, "entries")?;
    check_limit(&format!("responses[{at}].spans"), r.spans.len(), TEXT_LIMIT, "entries")?;
    if !r.spans.is_empty() && !r.tokens.is_empty() && r.spans.len() != r.tokens.len() {
        let what = format!("has {} entries for {} tokens: one per token, or none", r.spans.len(), r.tokens.len());
        return Err(RewardError::request(format!("responses[{at}].spans"), what));
    }
    let spans: Vec<(usize, usize)> = r.spans.iter().map(|s| (s.begin as usize, s.end as usize)).collect();
    if let Some(i) = spans.iter().position(|&(b, e)| b > e || e > r.text.len()) {
        let what = format!("is {:?}, not a byte range of the text ({} bytes)", spans[i], r.text.len());
        return Err(RewardError::request(format!("responses[{at}].spans[{i}]"), what));
    }
    let attention = r.attention.and_then(|a| {
        attention_from_wire(a).inspect_err(|e| tracing::warn!(response = r.index, "attention dropped: {e}")).ok()
    });
    let version = r.versions.iter().copied().max().unwrap_or(0);
    let tokens = Some(r.tokens.len().max(spans.len())).filter(|tokens| *tokens > 0);
    Ok(ResponseInput { index: r.index as usize, text: r.text, spans, attention, version, tokens })
}

#[cfg(test)]
mod tests {
    use unveil_core::BoxForm;

    use super::*;

    fn request() -> v1::ScoreRequest {
        v1::ScoreRequest {
            record_json: r#"{"id":"a","category":"nodule","boxes":[[1,2,3,4]]}"#.into(),
            image_width: 10,
            image_height: 10,
            resized_width: 10,
            resized_height: 10,
            responses: vec![v1::Response { text: "x".into(), tokens: vec![1], ..Default::default() }],
            box_form: v1::BoxForm::Absolute.into(),
        }
    }

    #[test]
    fn bad_requests_name_the_field() {
        assert!(group_from_request(request()).is_ok());
        let mut longest = request();
        longest.responses[0].text = "x".repeat(TEXT_LIMIT);
        assert!(group_from_request(longest).is_ok());
        type Change = fn(&mut v1::ScoreRequest);
        let cases: [(&str, Change); 16] = [
            ("record_json", |r| r.record_json = " ".repeat(RECORD_LIMIT + 1)),
            ("responses[0].text", |r| r.responses[0].text = "x".repeat(TEXT_LIMIT + 1)),
            ("responses[0].tokens", |r| r.responses[0].tokens = vec![0; TEXT_LIMIT + 1]),
            ("responses", |r| r.responses = vec![v1::Response::default(); RESPONSE_LIMIT + 1]),
            ("responses", |r| r.responses = vec![v1::Response::default(); RESPONSE_LIMIT + 1]),
            ("record_json", |r| r.record_json = "{".into()),
            ("record_json", |r| r.record_json = r#"{"id":"a","boxes":[[3,3,1,1]]}"#.into()),
            ("record_json", |r| r.record_json = r#"{"id":"a","boxes":[[3,3,100,4]]}"#.into()),
            ("image_width", |r| r.image_width = 0),
            ("resized_height", |r| r.resized_height = 0),
            ("box_form", |r| r.box_form = 9),
            ("box_form", |r| r.box_form = v1::BoxForm::Unspecified.into()),
            ("responses", |r| r.responses.clear()),
            ("responses[1].index", |r| r.responses.push(r.responses[0].clone())),
            ("responses[0].spans", |r| r.responses[0].spans = vec![v1::TokenSpan::default(); 2]),
            ("responses[0].spans[0]", |r| r.responses[0].spans = vec![v1::TokenSpan { begin: 0, end: 9 }]),
        ];
        for (field, change) in cases {
            let mut r = request();
            change(&mut r);
            let e = group_from_request(r).unwrap_err().to_string();
            assert!(e.starts_with(&format!("`{field}` ")), "{e}");
        }
    }

    #[test]
    fn box_form_is_read() {
        let llava = v1::ScoreRequest { box_form: v1::BoxForm::Llava.into(), ..request() };
        assert_eq!(group_from_request(llava).unwrap().boxes, BoxForm::Llava);
        assert_eq!(group_from_request(request()).unwrap().boxes, BoxForm::Absolute);
    }

    #[test]
    fn an_unspecified_box_form_is_refused() {
        let unspecified = v1::ScoreRequest { box_form: v1::BoxForm::Unspecified.into(), ..request() };
        let error = group_from_request(unspecified).unwrap_err().to_string();
        assert!(error.contains("`box_form` is not set"), "{error}");
    }

    #[test]
    fn inconsistent_attention_is_dropped() {
        let mut r = request();
        let rows = vec![0_u8; 3].into();
        r.responses[0].attention =
            Some(v1::Attention { grid_rows: u32::MAX, grid_cols: u32::MAX, tokens: vec![0; 9], rows });
        assert_eq!(group_from_request(r).unwrap().responses[0].attention, None);
    }
}
