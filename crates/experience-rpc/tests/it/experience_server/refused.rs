//! Submissions with invalid content, and groups released with a cause.

use unveil_experience::Event;
use unveil_proto::v1;
use unveil_proto::v1::submit_response::Verdict;

use super::{SOON, TestServer, answer, publish, serve};

#[test]
fn inconsistent_submissions_are_refused() {
    let mut s = serve(&["a", "b"], 60.0);
    publish(&s.server, 0).unwrap();
    let leased = s.lease("w", 100);
    let mut refuse = |change: &dyn Fn(&mut v1::SubmitRequest)| {
        let mut r = answer("w", &leased.groups[0], 0);
        change(&mut r);
        s.submit(r).err().map(|e| (e.code(), e.message().to_owned())).unwrap_or((tonic::Code::Ok, String::new()))
    };
    let invalid = tonic::Code::InvalidArgument;
    for (change, word) in [
        (&(|r: &mut v1::SubmitRequest| r.group = None) as &dyn Fn(&mut v1::SubmitRequest), "group"),
        (&|r| r.responses.truncate(1), "1 responses"),
        (&|r| r.responses[0].logprobs.truncate(1), "logprobs"),
        (&|r| r.responses[1].tokens[0] = 50, "vocabulary of 50"),
        (&|r| r.responses[1].index = 0, "another index"),
        (&|r| r.responses[0].spans.truncate(1), "1 spans for 2 tokens"),
        (&|r| (r.responses[0].tokens, r.responses[0].spans) = (vec![1; 5], vec![]), "more than allowed"),
    ] {
        let (code, message) = refuse(change);
        assert!(code == invalid && message.contains(word), "{word}: {code:?} {message}");
    }
    assert_eq!(s.submit(answer("w", &leased.groups[0], 0)).unwrap(), Verdict::Accepted);
}

/// A faulty worker affects no update: its groups return to the queue, the events name it, and after three rejections it
/// is quarantined while others continue.
#[test]
fn non_finite_numbers_are_refused_and_quarantine() {
    let mut s = serve(&["a", "b", "c", "d"], 60.0);
    let page = s.server.serve_metrics("127.0.0.1:0", Default::default(), &Default::default()).unwrap().unwrap();
    publish(&s.server, 0).unwrap();
    type Change = fn(&mut v1::SubmitRequest);
    let changes: [(&str, Change); 3] = [
        ("responses[1].logprobs[0]", |r| r.responses[1].logprobs[0] = f32::NAN),
        ("breakdowns[0].total", |r| r.breakdowns[0].total = Some(f64::INFINITY)),
        ("responses[0].attention.rows", |r| {
            let rows = f32::NEG_INFINITY.to_le_bytes().to_vec().into();
            r.responses[0].attention = Some(v1::Attention { grid_rows: 1, grid_cols: 1, tokens: vec![0], rows });
        }),
    ];
    for (n, (field, change)) in changes.iter().enumerate() {
        let leased = s.lease("bad", 1000);
        assert_eq!(leased.groups.len(), 2, "rejected groups are leased again");
        let mut r = answer("bad", &leased.groups[0], 0);
        change(&mut r);
        let response = s.runtime.block_on(s.client.submit(r)).unwrap().into_inner();
        assert_eq!(response.verdict(), Verdict::Rejected);
        assert!(response.why.contains("`bad`") && response.why.contains(field), "{}", response.why);
        assert_eq!(response.why.contains("no more groups"), n == 2, "{}", response.why);
        let leases = vec![leased.groups[1].lease.clone()];
        let release = v1::ReleaseRequest { worker: "bad".into(), leases, ..Default::default() };
        s.runtime.block_on(s.client.release(release)).unwrap();
    }
    let refused = s.ask("bad", 10, None).unwrap_err();
    assert_eq!(refused.code(), tonic::Code::PermissionDenied, "{refused}");
    assert!(refused.message().contains("`bad`") && refused.message().contains("attention.rows"), "{refused}");
    let life = v1::HeartbeatRequest { worker: "bad".into(), ..Default::default() };
    let refused = s.runtime.block_on(s.client.heartbeat(life)).unwrap_err();
    assert_eq!(refused.code(), tonic::Code::PermissionDenied, "{refused}");
    let leased = s.lease("good", 1000);
    for g in &leased.groups {
        assert_eq!(s.submit(answer("good", g, 0)).unwrap(), Verdict::Accepted);
    }
    let batch = s.server.next_batch(SOON).unwrap().unwrap();
    assert!(batch.len() == 2 && batch.iter().all(|g| g.worker == "good"));
    let events = s.server.drain_events();
    let by_it =
        |e: &&Event| matches!(e, Event::Rejected { worker, why, .. } if worker == "bad" && why.contains("not finite"));
    assert_eq!(events.iter().filter(by_it).count(), 3);
    assert!(events.iter().any(|e| matches!(e, Event::Quarantined { worker, .. } if worker == "bad")));
    let response = unveil_testkit::MetricsPage::get(page);
    assert_eq!(response.expect_value("rejected_submissions_total{worker=\"bad\"}"), 3.0);
    assert_eq!(response.expect_value("lost_groups_total{reason=\"rejected\"}"), 3.0);
    assert_eq!(s.server.stats().dropped, 0);
    // A new process of the same name starts afresh.
    let ask = |session| v1::LeaseRequest { worker: "bad".into(), max_groups: 2, session, ..Default::default() };
    assert!(s.runtime.block_on(s.client.lease(ask(1))).is_err());
    s.runtime.block_on(s.client.lease(ask(2))).unwrap();
}

/// Groups released without a reward are counted and never lost.
#[test]
fn groups_without_reward_return_and_are_counted() {
    let mut s = serve(&["a", "b"], 60.0);
    publish(&s.server, 0).unwrap();
    let release = |s: &mut TestServer, cause: v1::release_request::Cause, why: &str| {
        let leased = s.lease("w", 1000);
        assert_eq!(leased.groups.len(), 2);
        let leases = leased.groups.iter().map(|g| g.lease.clone()).collect();
        let request = v1::ReleaseRequest { worker: "w".into(), leases, cause: cause.into(), why: why.into() };
        s.runtime.block_on(s.client.release(request)).unwrap();
    };
    for _ in 0..5 {
        release(&mut s, v1::release_request::Cause::Unscored, "the reward service\nis away");
    }
    assert_eq!((s.server.stats().unscored, s.server.stats().waiting), (10, 2));
    release(&mut s, v1::release_request::Cause::Failed, "the image is broken");
    assert_eq!((s.server.stats().failed, s.server.stats().waiting), (2, 2));
    let events = s.server.drain_events();
    let away = |e: &&Event| matches!(e, Event::Unscored { why, .. } if why == "the reward service is away");
    assert_eq!(events.iter().filter(away).count(), 10);
    assert_eq!(events.iter().filter(|e| matches!(e, Event::Failed { .. })).count(), 2);
}

#[test]
fn unsafe_names_are_refused() {
    let mut s = serve(&["a", "b"], 60.0);
    publish(&s.server, 0).unwrap();
    let leased = s.lease("w", 100);
    let mut r = answer("w", &leased.groups[0], 0);
    let part = r.breakdowns[0].components["toy"].clone();
    r.breakdowns[0].components.insert("<img src=x onerror=alert(1)>".into(), part);
    let e = s.submit(r).unwrap_err();
    assert!(e.code() == tonic::Code::InvalidArgument && e.message().contains("breakdowns[0].components"), "{e}");
    assert_eq!(s.ask("<b>", 10, None).unwrap_err().code(), tonic::Code::InvalidArgument);
    let mut r = answer("w", &leased.groups[0], 0);
    r.breakdowns[0].components.get_mut("toy").unwrap().version = "a\u{1b}[31m".into();
    assert_eq!(s.submit(r).unwrap(), Verdict::Accepted, "display texts are cleaned instead");
}
