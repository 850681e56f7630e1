//! Conversions between domain types and wire types; input from the wire is validated.

use unveil_core::{
    Attention, BoxForm, Breakdown, Component, Finish, GroupId, LesionScore, LogprobKind, MaskReason, Response, Sampling,
};

use crate::v1;

/// Error for an invalid message of a peer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConvertError {
    /// A required field is absent or unspecified.
    #[error("required field `{0}` is not set")]
    Missing(&'static str),
    /// A field has the wrong length.
    #[error("`{field}` has {found} entries, but {expected} are needed")]
    Length {
        /// Name of the field.
        field: &'static str,
        /// Number of entries found.
        found: usize,
        /// Number of entries needed.
        expected: usize,
    },
    /// A field has an unknown value.
    #[error("`{field}` is `{found}`, which is unknown")]
    Unknown {
        /// Name of the field.
        field: &'static str,
        /// The unknown value.
        found: String,
    },
}

/// Converts a group id to its wire type.
pub fn group_to_wire(g: &GroupId) -> v1::GroupKey {
    v1::GroupKey { pass: g.pass, position: g.position, record: g.record.clone() }
}

/// Converts a group id from its wire type.
///
/// # Errors
/// Returns [`ConvertError::Missing`] if there is none.
pub fn group_from_wire(g: Option<v1::GroupKey>) -> Result<GroupId, ConvertError> {
    let g = g.ok_or(ConvertError::Missing("group"))?;
    Ok(GroupId { pass: g.pass, position: g.position, record: g.record })
}

/// Converts a box form to its wire type.
pub fn box_form_to_wire(form: BoxForm) -> v1::BoxForm {
    match form {
        BoxForm::Absolute => v1::BoxForm::Absolute,
        BoxForm::PerMille => v1::BoxForm::PerMille,
        BoxForm::Qwen2Vl => v1::BoxForm::Qwen2Vl,
        BoxForm::Llava => v1::BoxForm::Llava,
    }
}

/// Converts a box form from its wire type.
///
/// # Errors
/// Returns [`ConvertError::Missing`] if the form is unspecified and [`ConvertError::Unknown`] if its number is unknown.
pub fn box_form_from_wire(form: i32) -> Result<BoxForm, ConvertError> {
    match v1::BoxForm::try_from(form) {
        Ok(v1::BoxForm::Unspecified) => Err(ConvertError::Missing("box_form")),
        Ok(v1::BoxForm::Absolute) => Ok(BoxForm::Absolute),
        Ok(v1::BoxForm::PerMille) => Ok(BoxForm::PerMille),
        Ok(v1::BoxForm::Qwen2Vl) => Ok(BoxForm::Qwen2Vl),
        Ok(v1::BoxForm::Llava) => Ok(BoxForm::Llava),
        Err(_) => Err(ConvertError::Unknown { field: "box_form", found: form.to_string() }),
    }
}

/// Converts sampling parameters to their wire type.
pub fn sampling_to_wire(s: &Sampling) -> v1::Sampling {
    v1::Sampling {
        n: s.n as u32,
        temperature: s.temperature,
        max_new_tokens: s.max_new_tokens as u32,
        seed: s.seed,
        top_k: s.top_k as u32,
        top_p: s.top_p,
        min_p: s.min_p,
        untempered: s.logprobs == LogprobKind::Untempered,
    }
}

/// Converts sampling parameters from their wire type; a `top_p` of 0 means 1, all tokens.
///
/// # Errors
/// Returns [`ConvertError::Missing`] if there are none.
pub fn sampling_from_wire(s: Option<v1::Sampling>) -> Result<Sampling, ConvertError> {
    let s = s.ok_or(ConvertError::Missing("sampling"))?;
    Ok(Sampling {
        n: s.n as usize,
        temperature: s.temperature,
        top_k: s.top_k as usize,
        top_p: if s.top_p > 0.0 { s.top_p } else { 1.0 },
        min_p: s.min_p,
        max_new_tokens: s.max_new_tokens as usize,
        seed: s.seed,
        logprobs: if s.untempered { LogprobKind::Untempered } else { LogprobKind::Tempered },
    })
}

/// Returns a verdict's name without the prefix of its enum, for logs and traces.
pub fn verdict_name(verdict: v1::submit_response::Verdict) -> &'static str {
    let name = verdict.as_str_name();
    name.strip_prefix("VERDICT_").unwrap_or(name)
}

/// Converts a response to its wire type. `spans` are byte ranges of `text`, one per token, or empty.
pub fn response_to_wire(r: &Response, spans: &[(usize, usize)], attention: Option<&Attention>) -> v1::Response {
    let finish = match r.finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
        Finish::Cancelled => "cancelled",
    };
    v1::Response {
        index: r.index as u32,
        tokens: r.tokens.clone(),
        text: r.text.clone(),
        logprobs: r.logprobs.clone(),
        versions: r.versions.clone(),
        finish: finish.to_owned(),
        spans: spans.iter().map(|&(b, e)| v1::TokenSpan { begin: b as u32, end: e as u32 }).collect(),
        attention: attention.map(attention_to_wire),
    }
}

/// Converts a response from its wire type.
///
/// # Errors
/// Returns [`ConvertError::Length`] unless there is one log-probability and version per token, and
/// [`ConvertError::Unknown`] for an unknown finish reason.
pub fn response_from_wire(r: v1::Response) -> Result<Response, ConvertError> {
    let expected = r.tokens.len();
    for (field, found) in [("logprobs", r.logprobs.len()), ("versions", r.versions.len())] {
        if found != expected {
            return Err(ConvertError::Length { field, found, expected });
        }
    }
    let finish = match r.finish.as_str() {
        "stop" => Finish::Stop,
        "length" => Finish::Length,
        "cancelled" => Finish::Cancelled,
        _ => return Err(ConvertError::Unknown { field: "finish", found: r.finish }),
    };
    Ok(Response {
        index: r.index as usize,
        tokens: r.tokens,
        text: r.text,
        logprobs: r.logprobs,
        versions: r.versions,
        finish,
    })
}

/// Converts attention rows to their wire type.
pub fn attention_to_wire(a: &Attention) -> v1::Attention {
    v1::Attention {
        grid_rows: a.grid[0] as u32,
        grid_cols: a.grid[1] as u32,
        tokens: a.tokens.iter().map(|&t| t as u32).collect(),
        rows: a.rows.iter().flatten().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>().into(),
    }
}

/// Converts attention rows from their wire type.
///
/// # Errors
/// Returns [`ConvertError::Length`] if the byte count is not tokens x cells x 4, or there are no cells.
pub fn attention_from_wire(a: v1::Attention) -> Result<Attention, ConvertError> {
    let cells = (a.grid_rows as usize).saturating_mul(a.grid_cols as usize);
    let expected = a.tokens.len().saturating_mul(cells).saturating_mul(4);
    if a.rows.len() != expected || cells == 0 {
        return Err(ConvertError::Length { field: "attention.rows", found: a.rows.len(), expected });
    }
    let row = |bytes: &[u8]| bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    Ok(Attention {
        grid: [a.grid_rows as usize, a.grid_cols as usize],
        tokens: a.tokens.iter().map(|&t| t as usize).collect(),
        rows: a.rows.chunks_exact(cells.saturating_mul(4)).map(row).collect(),
    })
}

/// Converts a breakdown to its wire type.
pub fn breakdown_to_wire(b: &Breakdown) -> v1::Breakdown {
    let component = |c: &Component| v1::Component {
        value: c.value,
        masked: c.masked,
        reason: c.reason.as_ref().and_then(|r| serde_json::to_string(r).ok()).unwrap_or_default(),
        detail: c.detail.clone().into_iter().collect(),
        lesions: c.lesions.iter().map(lesion_to_wire).collect(),
        version: c.version.clone().into_owned(),
    };
    v1::Breakdown {
        index: b.index as u32,
        total: b.total,
        components: b.components.iter().map(|(k, c)| (k.clone(), component(c))).collect(),
    }
}

fn lesion_to_wire(l: &LesionScore) -> v1::LesionScore {
    let predicted = l.predicted.map(|p| p as u32);
    v1::LesionScore { truth: l.truth as u32, predicted, iou: l.iou, counted: l.counted }
}

fn lesion_from_wire(l: &v1::LesionScore) -> LesionScore {
    let predicted = l.predicted.map(|p| p as usize);
    LesionScore { truth: l.truth as usize, predicted, iou: l.iou, counted: l.counted }
}

/// Converts a breakdown of record `id` from its wire type.
pub fn breakdown_from_wire(id: &str, b: v1::Breakdown) -> Breakdown {
    let reason = |s: &str| match s {
        "" => None,
        s => Some(serde_json::from_str(s).unwrap_or_else(|_| MaskReason::Failed(s.to_owned()))),
    };
    let component = |c: v1::Component| Component {
        value: c.value,
        masked: c.masked,
        reason: reason(&c.reason),
        detail: c.detail.into_iter().collect(),
        lesions: c.lesions.iter().map(lesion_from_wire).collect(),
        version: c.version.into(),
    };
    Breakdown {
        id: id.to_owned(),
        index: b.index as usize,
        total: b.total,
        components: b.components.into_iter().map(|(k, c)| (k, component(c))).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attention_round_trips_and_lengths_are_checked() {
        let a = Attention { grid: [1, 2], tokens: vec![3, 5], rows: vec![vec![0.25, 0.75], vec![1.0, 0.0]] };
        let mut w = attention_to_wire(&a);
        assert_eq!(attention_from_wire(w.clone()).unwrap(), a);
        w.rows = w.rows.slice(..7);
        assert!(attention_from_wire(w).is_err());
        let huge = v1::Attention { grid_rows: u32::MAX, grid_cols: u32::MAX, ..Default::default() };
        assert_eq!(attention_from_wire(huge).map(|a| a.rows.len()), Ok(0));
    }

    #[test]
    fn breakdowns_round_trip_with_masks() {
        let mut b = Breakdown { id: "a".into(), index: 1, total: None, components: Default::default() };
        b.components.insert("x".into(), Component::masked(MaskReason::Failed("late".into())));
        let mut y = Component::value(0.5).with_detail("lift", 2.0).with_version("y-1");
        y.lesions.push(LesionScore { truth: 0, predicted: Some(3), iou: 0.5, counted: 0.25 });
        y.lesions.push(LesionScore { truth: 1, predicted: None, iou: 0.0, counted: 0.0 });
        b.components.insert("y".into(), y);
        assert_eq!(breakdown_from_wire("a", breakdown_to_wire(&b)), b);
    }

    #[test]
    fn box_forms_round_trip_and_unspecified_is_refused() {
        for form in BoxForm::ALL {
            assert_eq!(box_form_from_wire(box_form_to_wire(form).into()), Ok(form));
        }
        let unspecified = box_form_from_wire(v1::ScoreRequest::default().box_form);
        assert_eq!(unspecified, Err(ConvertError::Missing("box_form")));
        assert_eq!(unspecified.unwrap_err().to_string(), "required field `box_form` is not set");
        assert!(box_form_from_wire(99).unwrap_err().to_string().contains("box_form"));
    }

    #[test]
    fn sampling_round_trips_and_is_required() {
        let sampling = Sampling {
            n: 3,
            temperature: 0.7,
            top_k: 20,
            top_p: 0.9,
            min_p: 0.05,
            max_new_tokens: 12,
            seed: u64::MAX,
            logprobs: LogprobKind::Untempered,
        };
        for s in [sampling, Sampling::default()] {
            assert_eq!(sampling_from_wire(Some(sampling_to_wire(&s))), Ok(s));
        }
        assert_eq!(sampling_from_wire(Some(v1::Sampling::default())).map(|s| s.top_p), Ok(1.0));
        let absent = sampling_from_wire(v1::LeasedGroup::default().sampling);
        assert_eq!(absent, Err(ConvertError::Missing("sampling")));
        assert_eq!(absent.unwrap_err().to_string(), "required field `sampling` is not set");
    }

    #[test]
    fn verdict_names_have_no_prefix() {
        assert_eq!(verdict_name(v1::submit_response::Verdict::Accepted), "ACCEPTED");
        assert_eq!(verdict_name(v1::submit_response::Verdict::Unspecified), "UNSPECIFIED");
    }

    #[test]
    fn response_lengths_are_checked() {
        let r = Response {
            index: 0,
            tokens: vec![1, 2],
            text: "x".into(),
            logprobs: vec![-0.1, -0.2],
            versions: vec![0, 0],
            finish: Finish::Stop,
        };
        let mut w = response_to_wire(&r, &[(0, 1), (1, 1)], None);
        assert_eq!(response_from_wire(w.clone()).unwrap(), r);
        w.logprobs.pop();
        assert!(response_from_wire(w).is_err());
    }
}
