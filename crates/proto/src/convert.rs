//! Domain types to wire types and back. What comes from the wire is checked here.

use unveil_core::{Attention, BoxForm, Breakdown, Component, Finish, GroupId, LesionScore, MaskReason, Response};

use crate::v1;

/// The peer sent something that does not hold together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConvertError {
    /// A required message is absent.
    #[error("the message has no `{0}`")]
    Missing(&'static str),
    /// Lengths that must agree do not.
    #[error("`{field}` has {found} entries where {expected} are needed")]
    Length {
        /// Which field.
        field: &'static str,
        /// Entries found.
        found: usize,
        /// Entries needed.
        expected: usize,
    },
    /// A word that is not one of the known ones.
    #[error("`{field}` is `{found}`, which is not known")]
    Unknown {
        /// Which field.
        field: &'static str,
        /// What it said.
        found: String,
    },
}

/// Group id to the wire.
pub fn group_to_wire(g: &GroupId) -> v1::GroupKey {
    v1::GroupKey { pass: g.pass, position: g.position, record: g.record.clone() }
}

/// Group id from the wire.
pub fn group_from_wire(g: Option<v1::GroupKey>) -> Result<GroupId, ConvertError> {
    let g = g.ok_or(ConvertError::Missing("group"))?;
    Ok(GroupId { pass: g.pass, position: g.position, record: g.record })
}

/// Box form to the wire.
pub fn box_form_to_wire(form: BoxForm) -> v1::BoxForm {
    match form {
        BoxForm::Absolute => v1::BoxForm::Absolute,
        BoxForm::PerMille => v1::BoxForm::PerMille,
        BoxForm::Qwen2Vl => v1::BoxForm::Qwen2Vl,
        BoxForm::Llava => v1::BoxForm::Llava,
    }
}

/// Box form from the wire; a message without one speaks of absolute pixels.
pub fn box_form_from_wire(form: i32) -> Result<BoxForm, ConvertError> {
    match v1::BoxForm::try_from(form) {
        Ok(v1::BoxForm::Absolute) => Ok(BoxForm::Absolute),
        Ok(v1::BoxForm::PerMille) => Ok(BoxForm::PerMille),
        Ok(v1::BoxForm::Qwen2Vl) => Ok(BoxForm::Qwen2Vl),
        Ok(v1::BoxForm::Llava) => Ok(BoxForm::Llava),
        Err(_) => Err(ConvertError::Unknown { field: "box_form", found: form.to_string() }),
    }
}

/// A response to the wire; spans are byte ranges of `text`, one per token, or empty.
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

/// A response from the wire; log-probabilities and versions must match the tokens.
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

/// Attention rows to the wire.
pub fn attention_to_wire(a: &Attention) -> v1::Attention {
    v1::Attention {
        grid_rows: a.grid[0] as u32,
        grid_cols: a.grid[1] as u32,
        tokens: a.tokens.iter().map(|&t| t as u32).collect(),
        rows: a.rows.iter().flatten().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>().into(),
    }
}

/// Attention rows from the wire; the byte count must be tokens x cells x 4.
pub fn attention_from_wire(a: v1::Attention) -> Result<Attention, ConvertError> {
    let cells = (a.grid_rows as usize).saturating_mul(a.grid_cols as usize);
    let expected = a.tokens.len().saturating_mul(cells).saturating_mul(4);
    if a.rows.len() != expected || cells == 0 {
        return Err(ConvertError::Length { field: "attention.rows", found: a.rows.len(), expected });
    }
    let flat: Vec<f32> = a.rows.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    Ok(Attention {
        grid: [a.grid_rows as usize, a.grid_cols as usize],
        tokens: a.tokens.iter().map(|&t| t as usize).collect(),
        rows: flat.chunks_exact(cells).map(<[f32]>::to_vec).collect(),
    })
}

/// A breakdown to the wire.
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

/// A breakdown from the wire.
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
    fn attention_round_trip_and_bad_length() {
        let a = Attention { grid: [1, 2], tokens: vec![3, 5], rows: vec![vec![0.25, 0.75], vec![1.0, 0.0]] };
        let mut w = attention_to_wire(&a);
        assert_eq!(attention_from_wire(w.clone()).unwrap(), a);
        w.rows = w.rows.slice(..7);
        assert!(attention_from_wire(w).is_err());
    }

    #[test]
    fn breakdown_keeps_the_mask() {
        let mut b = Breakdown { id: "a".into(), index: 1, total: None, components: Default::default() };
        b.components.insert("x".into(), Component::masked(MaskReason::Failed("late".into())));
        let mut y = Component::value(0.5).with("lift", 2.0).by("y-1");
        y.lesions.push(LesionScore { truth: 0, predicted: Some(3), iou: 0.5, counted: 0.25 });
        y.lesions.push(LesionScore { truth: 1, predicted: None, iou: 0.0, counted: 0.0 });
        b.components.insert("y".into(), y);
        assert_eq!(breakdown_from_wire("a", breakdown_to_wire(&b)), b);
    }

    #[test]
    fn every_box_form_travels_and_none_is_absolute() {
        for form in BoxForm::ALL {
            assert_eq!(box_form_from_wire(box_form_to_wire(form).into()), Ok(form));
        }
        assert_eq!(box_form_from_wire(v1::ScoreRequest::default().box_form), Ok(BoxForm::Absolute));
        assert!(box_form_from_wire(99).unwrap_err().to_string().contains("box_form"));
    }

    #[test]
    fn lengths_are_checked() {
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
