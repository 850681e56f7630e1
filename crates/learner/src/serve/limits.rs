//! Bounds of what rollout workers may send, by field. A message that passes here costs no more memory or log than a worker's work
//! does. Must not know: the state of the run.

use tonic::Status;
use unveil_proto::v1;

/// Bytes of a worker's name.
const NAME: usize = 128;
/// Bytes of a lease's id.
const LEASE: usize = 64;
/// Bytes of a record's id.
const RECORD: usize = 1 << 16;
/// Groups that one call may ask for, leases that it may hand back, and versions that it may speak of.
const GROUPS: usize = 4096;
/// Bytes of text per token that a response may have, beyond as many for itself.
const TOKEN_TEXT: usize = 1024;
/// Components of a breakdown, and details of a component.
const PARTS: usize = 256;
/// Lesions of a component.
const LESIONS: usize = 1024;
/// Bytes of the name of a component or detail.
const KEY: usize = 64;
/// Bytes of a scorer's version, and of other words.
const WORD: usize = 4096;
/// Bytes of a mask's reason.
const REASON: usize = 1 << 16;

type Checked = Result<(), Status>;

fn refuse(field: &str, what: impl std::fmt::Display) -> Checked {
    Err(Status::invalid_argument(format!("`{field}` {what}")))
}

fn at_most(field: &str, found: usize, most: usize, unit: &str) -> Checked {
    if found > most { refuse(field, format_args!("has {found} {unit}, {most} are allowed")) } else { Ok(()) }
}

/// A name that goes into log lines and events.
fn worker(name: &str) -> Checked {
    if name.is_empty() {
        return refuse("worker", "is empty: give each worker a name of its own");
    }
    at_most("worker", name.len(), NAME, "bytes")?;
    plain("worker", name, "._#:@-")
}

/// Letters, digits, `_` and the characters of `also`: what can stand in a log line, a metric, a page, a file name.
fn plain(field: &str, text: &str, also: &str) -> Checked {
    match text.chars().find(|c| !(c.is_ascii_alphanumeric() || *c == '_' || also.contains(*c))) {
        Some(c) => refuse(field, format_args!("holds {c:?}: use letters, digits, _ and {also}")),
        None => Ok(()),
    }
}

/// The name of a component or of a detail.
fn key(field: &str, name: &str) -> Checked {
    at_most(field, name.len(), KEY, "bytes in a name")?;
    if name.is_empty() { refuse(field, "holds an empty name") } else { plain(field, name, ".-") }
}

/// Text that somebody may read, without what could change a line or a terminal.
pub(super) fn readable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

pub(super) fn lease(r: &v1::LeaseRequest) -> Checked {
    worker(&r.worker)?;
    if r.max_groups == 0 {
        return refuse("max_groups", "is 0: ask for at least 1 group");
    }
    at_most("max_groups", r.max_groups as usize, GROUPS, "groups")
}

pub(super) fn heartbeat(r: &v1::HeartbeatRequest) -> Checked {
    worker(&r.worker)?;
    at_most("in_hand", r.in_hand.len(), GROUPS, "entries")?;
    r.in_hand.iter().try_for_each(|h| at_most("in_hand", h.lease.len(), LEASE, "bytes in a lease"))
}

pub(super) fn image(r: &v1::ImageRequest) -> Checked {
    worker(&r.worker)?;
    at_most("lease", r.lease.len(), LEASE, "bytes")
}

pub(super) fn weights(r: &v1::WeightsRequest) -> Checked {
    worker(&r.worker)?;
    r.joins.as_ref().map_or(Ok(()), |j| {
        at_most("joins.backend", j.backend.len(), KEY, "bytes")?;
        plain("joins.backend", &j.backend, "")
    })
}

pub(super) fn follow(r: &v1::FollowRequest) -> Checked {
    worker(&r.worker)
}

pub(super) fn release(r: &v1::ReleaseRequest) -> Checked {
    worker(&r.worker)?;
    at_most("leases", r.leases.len(), GROUPS, "entries")?;
    at_most("why", r.why.len(), REASON, "bytes")?;
    r.leases.iter().try_for_each(|l| at_most("leases", l.len(), LEASE, "bytes in an entry"))
}

/// Responses and breakdowns are counted, and tokens compared with the vocabulary, where the group is known.
pub(super) fn submit(r: &v1::SubmitRequest) -> Checked {
    worker(&r.worker)?;
    at_most("lease", r.lease.len(), LEASE, "bytes")?;
    plain("lease", &r.lease, "-")?;
    at_most("group.record", r.group.as_ref().map_or(0, |g| g.record.len()), RECORD, "bytes")?;
    at_most("weights", r.weights.len(), GROUPS, "entries")?;
    for (field, ms) in [("generate_ms", r.generate_ms), ("reward_ms", r.reward_ms)] {
        if !(ms.is_finite() && ms >= 0.0) {
            return refuse(field, format_args!("is {ms}: a duration is 0 or more"));
        }
    }
    r.responses.iter().enumerate().try_for_each(|(at, one)| response(&format!("responses[{at}]"), one))?;
    r.breakdowns.iter().enumerate().try_for_each(|(at, one)| breakdown(&format!("breakdowns[{at}]"), one))
}

fn response(field: &str, r: &v1::Response) -> Checked {
    at_most(&format!("{field}.text"), r.text.len(), TOKEN_TEXT * (r.tokens.len() + 1), "bytes")?;
    at_most(&format!("{field}.finish"), r.finish.len(), WORD, "bytes")?;
    let inside = |s: &v1::TokenSpan| s.begin <= s.end && s.end as usize <= r.text.len();
    if let Some(at) = r.spans.iter().position(|s| !inside(s)) {
        return refuse(
            &format!("{field}.spans[{at}]"),
            format_args!("is no range of the text's {} bytes", r.text.len()),
        );
    }
    let Some(a) = &r.attention else { return Ok(()) };
    at_most(&format!("{field}.attention.tokens"), a.tokens.len(), r.tokens.len(), "rows")?;
    match a.tokens.iter().position(|t| *t as usize >= r.tokens.len()) {
        Some(at) => refuse(&format!("{field}.attention.tokens[{at}]"), "names a token that the response does not have"),
        None => Ok(()),
    }
}

fn breakdown(field: &str, b: &v1::Breakdown) -> Checked {
    at_most(&format!("{field}.components"), b.components.len(), PARTS, "entries")?;
    for (name, c) in &b.components {
        key(&format!("{field}.components"), name)?;
        let field = format!("{field}.components[{name}]");
        at_most(&format!("{field}.reason"), c.reason.len(), REASON, "bytes")?;
        at_most(&format!("{field}.version"), c.version.len(), WORD, "bytes")?;
        at_most(&format!("{field}.detail"), c.detail.len(), PARTS, "entries")?;
        at_most(&format!("{field}.lesions"), c.lesions.len(), LESIONS, "entries")?;
        c.detail.keys().try_for_each(|detail| key(&format!("{field}.detail"), detail))?;
    }
    Ok(())
}

/// Whether every number of a submission is one. What is not comes from a machine that computes wrongly, or from a model that has come
/// apart; it is named, and the group is made again.
pub(super) fn numbers(r: &v1::SubmitRequest) -> Result<(), String> {
    let finite = |field: &dyn Fn() -> String, value: f64| {
        if value.is_finite() { Ok(()) } else { Err(format!("`{}` is {value}, which is no number", field())) }
    };
    for (at, one) in r.responses.iter().enumerate() {
        for (token, v) in one.logprobs.iter().enumerate() {
            finite(&|| format!("responses[{at}].logprobs[{token}]"), f64::from(*v))?;
        }
        let rows = one.attention.as_ref().map_or(&[][..], |a| &a.rows);
        for (i, b) in rows.chunks_exact(4).enumerate() {
            let value = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            finite(&|| format!("responses[{at}].attention.rows, value {i}"), f64::from(value))?;
        }
    }
    for (at, one) in r.breakdowns.iter().enumerate() {
        finite(&|| format!("breakdowns[{at}].total"), one.total.unwrap_or(0.0))?;
        for (name, c) in &one.components {
            let field = || format!("breakdowns[{at}].components[{name}]");
            finite(&|| format!("{}.value", field()), c.value.unwrap_or(0.0))?;
            for (detail, value) in &c.detail {
                finite(&|| format!("{}.detail[{detail}]", field()), *value)?;
            }
            for l in &c.lesions {
                finite(&|| format!("{}.lesions", field()), l.iou)?;
                finite(&|| format!("{}.lesions", field()), l.counted)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> v1::SubmitRequest {
        let component = v1::Component {
            value: Some(0.5),
            detail: [("lift".to_owned(), 2.0)].into(),
            lesions: vec![v1::LesionScore::default()],
            ..Default::default()
        };
        let response = v1::Response {
            tokens: vec![3, 4],
            text: "ab".into(),
            spans: vec![v1::TokenSpan { begin: 0, end: 1 }, v1::TokenSpan { begin: 1, end: 2 }],
            attention: Some(v1::Attention { grid_rows: 1, grid_cols: 1, tokens: vec![1], rows: vec![0; 4].into() }),
            ..Default::default()
        };
        v1::SubmitRequest {
            worker: "w#1".into(),
            lease: "1-1".into(),
            group: Some(v1::GroupKey { record: "r".into(), ..Default::default() }),
            responses: vec![response],
            breakdowns: vec![v1::Breakdown {
                total: Some(0.5),
                components: [("iou".to_owned(), component)].into(),
                index: 0,
            }],
            weights: vec![v1::HeldWeights::default()],
            ..Default::default()
        }
    }

    fn first(r: &mut v1::SubmitRequest) -> &mut v1::Component {
        r.breakdowns[0].components.get_mut("iou").unwrap()
    }

    #[test]
    fn every_number_is_one() {
        numbers(&good()).unwrap();
        let mut whole = good();
        whole.responses[0].logprobs = vec![-0.5, -1.0];
        numbers(&whole).unwrap();
        type Change = fn(&mut v1::SubmitRequest, f32);
        let cases: [(&str, Change); 7] = [
            ("responses[0].logprobs[1]", |r, v| r.responses[0].logprobs[1] = v),
            ("responses[0].attention.rows, value 0", |r, v| {
                r.responses[0].attention.as_mut().unwrap().rows = v.to_le_bytes().to_vec().into();
            }),
            ("breakdowns[0].total", |r, v| r.breakdowns[0].total = Some(v.into())),
            ("breakdowns[0].components[iou].value", |r, v| first(r).value = Some(v.into())),
            ("breakdowns[0].components[iou].detail[lift]", |r, v| {
                first(r).detail.insert("lift".into(), v.into());
            }),
            ("breakdowns[0].components[iou].lesions", |r, v| first(r).lesions[0].iou = v.into()),
            ("breakdowns[0].components[iou].lesions", |r, v| first(r).lesions[0].counted = v.into()),
        ];
        for (field, change) in cases {
            for v in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut r = whole.clone();
                change(&mut r, v);
                let why = numbers(&r).unwrap_err();
                assert!(why.starts_with(&format!("`{field}` is ")), "{field}: {why}");
                submit(&r).unwrap();
            }
        }
        assert_eq!(readable("a\nb\u{1b}[31mc"), "a b [31mc");
    }

    #[test]
    fn each_field_has_a_bound() {
        submit(&good()).unwrap();
        type Change = fn(&mut v1::SubmitRequest);
        let long = || "x".repeat(5000);
        let cases: [(&str, Change); 25] = [
            ("worker", |r| r.worker.clear()),
            ("worker", |r| r.worker = "x".repeat(NAME + 1)),
            ("worker", |r| r.worker = "a\nb".into()),
            ("lease", |r| r.lease = "x".repeat(LEASE + 1)),
            ("group.record", |r| r.group.as_mut().unwrap().record = "x".repeat(RECORD + 1)),
            ("weights", |r| r.weights = vec![v1::HeldWeights::default(); GROUPS + 1]),
            ("generate_ms", |r| r.generate_ms = f64::NAN),
            ("reward_ms", |r| r.reward_ms = -1.0),
            ("responses[0].text", |r| r.responses[0].text = "x".repeat(3 * TOKEN_TEXT + 1)),
            ("responses[0].finish", |r| r.responses[0].finish = "x".repeat(WORD + 1)),
            ("responses[0].spans[1]", |r| r.responses[0].spans[1].end = 3),
            ("responses[0].attention.tokens", |r| r.responses[0].attention.as_mut().unwrap().tokens = vec![0; 3]),
            ("responses[0].attention.tokens[0]", |r| r.responses[0].attention.as_mut().unwrap().tokens = vec![2]),
            ("breakdowns[0].components", |r| {
                let many = (0..=PARTS).map(|i| (i.to_string(), v1::Component::default()));
                r.breakdowns[0].components = many.collect();
            }),
            ("breakdowns[0].components[iou].reason", |r| first(r).reason = "x".repeat(REASON + 1)),
            ("breakdowns[0].components[iou].version", |r| first(r).version = "x".repeat(WORD + 1)),
            ("breakdowns[0].components[iou].detail", |r| {
                first(r).detail = (0..=PARTS).map(|i| (i.to_string(), 0.0)).collect();
            }),
            ("breakdowns[0].components[iou].detail", |r| {
                first(r).detail.insert("x".repeat(KEY + 1), 0.0);
            }),
            ("breakdowns[0].components[iou].detail", |r| {
                first(r).detail.insert("a b".into(), 0.0);
            }),
            ("breakdowns[0].components", |r| {
                r.breakdowns[0].components.insert("<img src=x onerror=alert(1)>".into(), v1::Component::default());
            }),
            ("breakdowns[0].components", |r| {
                r.breakdowns[0].components.insert("x".repeat(KEY + 1), v1::Component::default());
            }),
            ("breakdowns[0].components", |r| {
                r.breakdowns[0].components.insert(String::new(), v1::Component::default());
            }),
            ("worker", |r| r.worker = "a<b".into()),
            ("lease", |r| r.lease = "1 1".into()),
            ("breakdowns[0].components[iou].lesions", |r| {
                first(r).lesions = vec![v1::LesionScore::default(); LESIONS + 1];
            }),
        ];
        for (field, change) in cases {
            let mut r = good();
            change(&mut r);
            let e = submit(&r).unwrap_err();
            assert!(e.message().starts_with(&format!("`{field}` ")) && e.message().len() < 400, "{field}: {e}");
        }
        let mut r = v1::LeaseRequest { worker: "w".into(), max_groups: GROUPS as u32, ..Default::default() };
        lease(&r).unwrap();
        r.max_groups += 1;
        assert!(lease(&r).unwrap_err().message().contains("max_groups"));
        r.max_groups = 0;
        assert!(lease(&r).unwrap_err().message().contains("max_groups"));
        let in_hand = vec![v1::InHand { lease: "1-1".into(), progress: 3 }];
        let mut r = v1::HeartbeatRequest { worker: "w".into(), in_hand, ..Default::default() };
        heartbeat(&r).unwrap();
        r.in_hand[0].lease = long();
        assert!(heartbeat(&r).unwrap_err().message().contains("in_hand"));
        r.in_hand = vec![v1::InHand::default(); GROUPS + 1];
        assert!(heartbeat(&r).unwrap_err().message().contains("in_hand"));
        assert!(image(&v1::ImageRequest { worker: "w".into(), lease: "1-1".into() }).is_ok());
        assert!(image(&v1::ImageRequest { worker: "w".into(), lease: long() }).is_err());
        weights(&v1::WeightsRequest { worker: "w".into(), ..Default::default() }).unwrap();
        assert!(weights(&v1::WeightsRequest { worker: long(), ..Default::default() }).is_err());
        let mut r = v1::ReleaseRequest { worker: "w".into(), leases: vec!["1-1".into()], ..Default::default() };
        release(&r).unwrap();
        r.leases.push(long());
        assert!(release(&r).unwrap_err().message().contains("leases"));
        r.leases = vec![String::new(); GROUPS + 1];
        assert!(release(&r).unwrap_err().message().contains("leases"));
    }
}
