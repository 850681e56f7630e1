//! Limits of every field that rollout workers send, so that a message costs no more memory or log space than honest
//! work.

use tonic::Status;
use unveil_proto::v1;

/// Maximum bytes of a worker name.
const MAX_NAME: usize = 128;
/// Maximum bytes of a lease id.
const MAX_LEASE: usize = 64;
/// Maximum bytes of a record id.
const MAX_RECORD: usize = 1 << 16;
/// Maximum number of groups, leases or weight versions in a call.
const MAX_GROUPS: usize = 4096;
/// Maximum bytes of text per token of a response, plus the same once per response.
const MAX_TOKEN_TEXT: usize = 1024;
/// Maximum number of components of a breakdown and of details of a component.
const MAX_PARTS: usize = 256;
/// Maximum number of lesions of a component.
const MAX_LESIONS: usize = 1024;
/// Maximum bytes of the name of a component or detail.
const MAX_KEY: usize = 64;
/// Maximum bytes of a scorer version and of other short texts.
const MAX_WORD: usize = 4096;
/// Maximum bytes of a mask reason.
const MAX_REASON: usize = 1 << 16;

/// Result of a check.
type Checked = Result<(), Status>;

fn refuse(field: &str, what: impl std::fmt::Display) -> Checked {
    Err(Status::invalid_argument(format!("`{field}` {what}")))
}

fn at_most(field: &str, found: usize, limit: usize, unit: &str) -> Checked {
    if found > limit { refuse(field, format_args!("has {found} {unit}, at most {limit} are allowed")) } else { Ok(()) }
}

/// Checks a worker name, which is used in log lines and events.
fn worker(name: &str) -> Checked {
    if name.is_empty() {
        return refuse("worker", "is empty: give each worker its own name");
    }
    at_most("worker", name.len(), MAX_NAME, "bytes")?;
    plain("worker", name, "._#:@-")
}

/// Checks that a text has only letters, digits, `_` and the characters of `also`, which are safe in log lines, metrics,
/// pages and file names.
fn plain(field: &str, text: &str, also: &str) -> Checked {
    match text.chars().find(|c| !(c.is_ascii_alphanumeric() || *c == '_' || also.contains(*c))) {
        Some(c) => refuse(field, format_args!("contains {c:?}: use letters, digits, _ and {also}")),
        None => Ok(()),
    }
}

/// Checks the name of a component or of a detail.
fn key(field: &str, name: &str) -> Checked {
    at_most(field, name.len(), MAX_KEY, "bytes in a name")?;
    if name.is_empty() { refuse(field, "contains an empty name") } else { plain(field, name, ".-") }
}

/// Replaces control characters, which could alter log lines or a terminal.
pub(super) fn readable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

pub(super) fn lease(r: &v1::LeaseRequest) -> Checked {
    worker(&r.worker)?;
    if r.max_groups == 0 {
        return refuse("max_groups", "is 0: ask for at least 1 group");
    }
    at_most("max_groups", r.max_groups as usize, MAX_GROUPS, "groups")
}

pub(super) fn heartbeat(r: &v1::HeartbeatRequest) -> Checked {
    worker(&r.worker)?;
    at_most("in_hand", r.in_hand.len(), MAX_GROUPS, "entries")?;
    r.in_hand.iter().try_for_each(|h| at_most("in_hand", h.lease.len(), MAX_LEASE, "bytes in a lease"))
}

pub(super) fn image(r: &v1::ImageRequest) -> Checked {
    worker(&r.worker)?;
    at_most("lease", r.lease.len(), MAX_LEASE, "bytes")
}

pub(super) fn weights(r: &v1::WeightsRequest) -> Checked {
    worker(&r.worker)?;
    r.broadcast_capability.as_ref().map_or(Ok(()), |capability| {
        at_most("broadcast_capability.backend", capability.backend.len(), MAX_KEY, "bytes")?;
        plain("broadcast_capability.backend", &capability.backend, "")
    })
}

pub(super) fn subscribe(r: &v1::SubscribeRequest) -> Checked {
    worker(&r.worker)
}

pub(super) fn release(r: &v1::ReleaseRequest) -> Checked {
    worker(&r.worker)?;
    at_most("leases", r.leases.len(), MAX_GROUPS, "entries")?;
    at_most("why", r.why.len(), MAX_REASON, "bytes")?;
    r.leases.iter().try_for_each(|l| at_most("leases", l.len(), MAX_LEASE, "bytes in an entry"))
}

/// Checks the sizes in a submission; counts of responses and token ids are checked once the group is known.
pub(super) fn submit(r: &v1::SubmitRequest) -> Checked {
    worker(&r.worker)?;
    at_most("lease", r.lease.len(), MAX_LEASE, "bytes")?;
    plain("lease", &r.lease, "-")?;
    at_most("group.record", r.group.as_ref().map_or(0, |g| g.record.len()), MAX_RECORD, "bytes")?;
    at_most("weights", r.weights.len(), MAX_GROUPS, "entries")?;
    for (field, ms) in [("generate_ms", r.generate_ms), ("reward_ms", r.reward_ms)] {
        if !(ms.is_finite() && ms >= 0.0) {
            return refuse(field, format_args!("is {ms}: durations must be at least 0"));
        }
    }
    r.responses.iter().enumerate().try_for_each(|(i, r)| response(&format!("responses[{i}]"), r))?;
    r.breakdowns.iter().enumerate().try_for_each(|(i, b)| breakdown(&format!("breakdowns[{i}]"), b))
}

fn response(field: &str, r: &v1::Response) -> Checked {
    at_most(&format!("{field}.text"), r.text.len(), MAX_TOKEN_TEXT * (r.tokens.len() + 1), "bytes")?;
    at_most(&format!("{field}.finish"), r.finish.len(), MAX_WORD, "bytes")?;
    let is_inside = |s: &v1::TokenSpan| s.begin <= s.end && s.end as usize <= r.text.len();
    if let Some(at) = r.spans.iter().position(|s| !is_inside(s)) {
        return refuse(
            &format!("{field}.spans[{at}]"),
            format_args!("is not a range within the {} bytes of the text", r.text.len()),
        );
    }
    let Some(a) = &r.attention else { return Ok(()) };
    at_most(&format!("{field}.attention.tokens"), a.tokens.len(), r.tokens.len(), "rows")?;
    match a.tokens.iter().position(|t| *t as usize >= r.tokens.len()) {
        Some(at) => refuse(&format!("{field}.attention.tokens[{at}]"), "is not the index of a token of the response"),
        None => Ok(()),
    }
}

fn breakdown(field: &str, b: &v1::Breakdown) -> Checked {
    at_most(&format!("{field}.components"), b.components.len(), MAX_PARTS, "entries")?;
    for (name, c) in &b.components {
        key(&format!("{field}.components"), name)?;
        let field = format!("{field}.components[{name}]");
        at_most(&format!("{field}.reason"), c.reason.len(), MAX_REASON, "bytes")?;
        at_most(&format!("{field}.version"), c.version.len(), MAX_WORD, "bytes")?;
        at_most(&format!("{field}.detail"), c.detail.len(), MAX_PARTS, "entries")?;
        at_most(&format!("{field}.lesions"), c.lesions.len(), MAX_LESIONS, "entries")?;
        c.detail.keys().try_for_each(|detail| key(&format!("{field}.detail"), detail))?;
    }
    Ok(())
}

/// Checks that all numbers of a submission are finite. Others come from a faulty machine or a diverged model; the error
/// names the field, and the group is leased again.
pub(super) fn check_finite(r: &v1::SubmitRequest) -> Result<(), String> {
    let finite = |field: &dyn Fn() -> String, value: f64| {
        if value.is_finite() { Ok(()) } else { Err(format!("`{}` is {value}, which is not finite", field())) }
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
    fn numbers_must_be_finite() {
        check_finite(&good()).unwrap();
        let mut with_logprobs = good();
        with_logprobs.responses[0].logprobs = vec![-0.5, -1.0];
        check_finite(&with_logprobs).unwrap();
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
                let mut r = with_logprobs.clone();
                change(&mut r, v);
                let why = check_finite(&r).unwrap_err();
                assert!(why.starts_with(&format!("`{field}` is ")), "{field}: {why}");
                submit(&r).unwrap();
            }
        }
        assert_eq!(readable("a\nb\u{1b}[31mc"), "a b [31mc");
    }

    #[test]
    fn every_field_has_a_limit() {
        submit(&good()).unwrap();
        type Change = fn(&mut v1::SubmitRequest);
        let long = || "x".repeat(5000);
        let cases: [(&str, Change); 25] = [
            ("worker", |r| r.worker.clear()),
            ("worker", |r| r.worker = "x".repeat(MAX_NAME + 1)),
            ("worker", |r| r.worker = "a\nb".into()),
            ("lease", |r| r.lease = "x".repeat(MAX_LEASE + 1)),
            ("group.record", |r| r.group.as_mut().unwrap().record = "x".repeat(MAX_RECORD + 1)),
            ("weights", |r| r.weights = vec![v1::HeldWeights::default(); MAX_GROUPS + 1]),
            ("generate_ms", |r| r.generate_ms = f64::NAN),
            ("reward_ms", |r| r.reward_ms = -1.0),
            ("responses[0].text", |r| r.responses[0].text = "x".repeat(3 * MAX_TOKEN_TEXT + 1)),
            ("responses[0].finish", |r| r.responses[0].finish = "x".repeat(MAX_WORD + 1)),
            ("responses[0].spans[1]", |r| r.responses[0].spans[1].end = 3),
            ("responses[0].attention.tokens", |r| r.responses[0].attention.as_mut().unwrap().tokens = vec![0; 3]),
            ("responses[0].attention.tokens[0]", |r| r.responses[0].attention.as_mut().unwrap().tokens = vec![2]),
            ("breakdowns[0].components", |r| {
                let many = (0..=MAX_PARTS).map(|i| (i.to_string(), v1::Component::default()));
                r.breakdowns[0].components = many.collect();
            }),
            ("breakdowns[0].components[iou].reason", |r| first(r).reason = "x".repeat(MAX_REASON + 1)),
            ("breakdowns[0].components[iou].version", |r| first(r).version = "x".repeat(MAX_WORD + 1)),
            ("breakdowns[0].components[iou].detail", |r| {
                first(r).detail = (0..=MAX_PARTS).map(|i| (i.to_string(), 0.0)).collect();
            }),
            ("breakdowns[0].components[iou].detail", |r| {
                first(r).detail.insert("x".repeat(MAX_KEY + 1), 0.0);
            }),
            ("breakdowns[0].components[iou].detail", |r| {
                first(r).detail.insert("a b".into(), 0.0);
            }),
            ("breakdowns[0].components", |r| {
                r.breakdowns[0].components.insert("<img src=x onerror=alert(1)>".into(), v1::Component::default());
            }),
            ("breakdowns[0].components", |r| {
                r.breakdowns[0].components.insert("x".repeat(MAX_KEY + 1), v1::Component::default());
            }),
            ("breakdowns[0].components", |r| {
                r.breakdowns[0].components.insert(String::new(), v1::Component::default());
            }),
            ("worker", |r| r.worker = "a<b".into()),
            ("lease", |r| r.lease = "1 1".into()),
            ("breakdowns[0].components[iou].lesions", |r| {
                first(r).lesions = vec![v1::LesionScore::default(); MAX_LESIONS + 1];
            }),
        ];
        for (field, change) in cases {
            let mut r = good();
            change(&mut r);
            let e = submit(&r).unwrap_err();
            assert!(e.message().starts_with(&format!("`{field}` ")) && e.message().len() < 400, "{field}: {e}");
        }
        let mut r = v1::LeaseRequest { worker: "w".into(), max_groups: MAX_GROUPS as u32, ..Default::default() };
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
        r.in_hand = vec![v1::InHand::default(); MAX_GROUPS + 1];
        assert!(heartbeat(&r).unwrap_err().message().contains("in_hand"));
        assert!(image(&v1::ImageRequest { worker: "w".into(), lease: "1-1".into() }).is_ok());
        assert!(image(&v1::ImageRequest { worker: "w".into(), lease: long() }).is_err());
        weights(&v1::WeightsRequest { worker: "w".into(), ..Default::default() }).unwrap();
        assert!(weights(&v1::WeightsRequest { worker: long(), ..Default::default() }).is_err());
        let mut r = v1::ReleaseRequest { worker: "w".into(), leases: vec!["1-1".into()], ..Default::default() };
        release(&r).unwrap();
        r.leases.push(long());
        assert!(release(&r).unwrap_err().message().contains("leases"));
        r.leases = vec![String::new(); MAX_GROUPS + 1];
        assert!(release(&r).unwrap_err().message().contains("leases"));
    }
}
