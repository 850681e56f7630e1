//! Submissions that are refused for what they hold, and groups that come back with a reason.

use unveil_experience::Event;
use unveil_proto::v1;
use unveil_proto::v1::submit_response::Verdict;

use super::{SOON, Served, answer, publish, serve};

#[test]
fn what_does_not_hold_together_is_refused() {
    let mut s = serve(&["a", "b"], 60.0);
    publish(&s.host, 0).unwrap();
    let got = s.lease("w", 100);
    let mut refuse = |change: &dyn Fn(&mut v1::SubmitRequest)| {
        let mut r = answer("w", &got.groups[0], 0);
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
        (&|r| (r.responses[0].tokens, r.responses[0].spans) = (vec![1; 5], vec![]), "more than it may"),
    ] {
        let (code, message) = refuse(change);
        assert!(code == invalid && message.contains(word), "{word}: {code:?} {message}");
    }
    assert_eq!(s.submit(answer("w", &got.groups[0], 0)).unwrap(), Verdict::Accepted);
}

/// A worker that computes wrongly spoils no update: what it sends goes back to the queue, everybody hears who it was, and after three
/// times it gets nothing more while the others go on.
#[test]
fn numbers_that_are_none_are_refused_at_the_door_and_name_their_worker() {
    let mut s = serve(&["a", "b", "c", "d"], 60.0);
    let page = s.host.serve_metrics("127.0.0.1:0", Default::default(), &Default::default()).unwrap().unwrap();
    publish(&s.host, 0).unwrap();
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
        let got = s.lease("bad", 1000);
        assert_eq!(got.groups.len(), 2, "what was refused is leased again");
        let mut r = answer("bad", &got.groups[0], 0);
        change(&mut r);
        let told = s.runtime.block_on(s.client.submit(r)).unwrap().into_inner();
        assert_eq!(told.verdict(), Verdict::Rejected);
        assert!(told.why.contains("`bad`") && told.why.contains(field), "{}", told.why);
        assert_eq!(told.why.contains("no more groups"), n == 2, "{}", told.why);
        let leases = vec![got.groups[1].lease.clone()];
        let release = v1::ReleaseRequest { worker: "bad".into(), leases, ..Default::default() };
        s.runtime.block_on(s.client.release(release)).unwrap();
    }
    let refused = s.ask("bad", 10, None).unwrap_err();
    assert_eq!(refused.code(), tonic::Code::PermissionDenied, "{refused}");
    assert!(refused.message().contains("`bad`") && refused.message().contains("attention.rows"), "{refused}");
    let life = v1::HeartbeatRequest { worker: "bad".into(), ..Default::default() };
    let refused = s.runtime.block_on(s.client.heartbeat(life)).unwrap_err();
    assert_eq!(refused.code(), tonic::Code::PermissionDenied, "{refused}");
    let got = s.lease("good", 1000);
    for g in &got.groups {
        assert_eq!(s.submit(answer("good", g, 0)).unwrap(), Verdict::Accepted);
    }
    let batch = s.host.next_batch(SOON).unwrap().unwrap();
    assert!(batch.len() == 2 && batch.iter().all(|g| g.worker == "good"));
    let events = s.host.drain_events();
    let by_it =
        |e: &&Event| matches!(e, Event::Rejected { worker, why, .. } if worker == "bad" && why.contains("no number"));
    assert_eq!(events.iter().filter(by_it).count(), 3);
    assert!(events.iter().any(|e| matches!(e, Event::Quarantined { worker, .. } if worker == "bad")));
    let told = unveil_testkit::MetricsPage::get(page);
    assert_eq!(told.of("rejected_submissions_total{worker=\"bad\"}"), 3.0);
    assert_eq!(told.of("lost_groups_total{reason=\"rejected\"}"), 3.0);
    assert_eq!(s.host.stats().dropped, 0);
    // Another process of its name begins anew.
    let ask = |session| v1::LeaseRequest { worker: "bad".into(), max_groups: 2, session, ..Default::default() };
    assert!(s.runtime.block_on(s.client.lease(ask(1))).is_err());
    s.runtime.block_on(s.client.lease(ask(2))).unwrap();
}

/// Groups that come back for want of a reward are counted, and never lost.
#[test]
fn groups_without_a_reward_come_back_and_are_counted() {
    let mut s = serve(&["a", "b"], 60.0);
    publish(&s.host, 0).unwrap();
    let give_back = |s: &mut Served, cause: v1::release_request::Cause, why: &str| {
        let got = s.lease("w", 1000);
        assert_eq!(got.groups.len(), 2);
        let leases = got.groups.iter().map(|g| g.lease.clone()).collect();
        let release = v1::ReleaseRequest { worker: "w".into(), leases, cause: cause.into(), why: why.into() };
        s.runtime.block_on(s.client.release(release)).unwrap();
    };
    for _ in 0..5 {
        give_back(&mut s, v1::release_request::Cause::Unscored, "the reward service\nis away");
    }
    assert_eq!((s.host.stats().unscored, s.host.stats().waiting), (10, 2));
    give_back(&mut s, v1::release_request::Cause::Failed, "the image is broken");
    assert_eq!((s.host.stats().failed, s.host.stats().waiting), (2, 2));
    let events = s.host.drain_events();
    let away = |e: &&Event| matches!(e, Event::Unscored { why, .. } if why == "the reward service is away");
    assert_eq!(events.iter().filter(away).count(), 10);
    assert_eq!(events.iter().filter(|e| matches!(e, Event::Failed { .. })).count(), 2);
}

#[test]
fn names_that_would_change_a_page_do_not_come_in() {
    let mut s = serve(&["a", "b"], 60.0);
    publish(&s.host, 0).unwrap();
    let got = s.lease("w", 100);
    let mut r = answer("w", &got.groups[0], 0);
    let part = r.breakdowns[0].components["toy"].clone();
    r.breakdowns[0].components.insert("<img src=x onerror=alert(1)>".into(), part);
    let e = s.submit(r).unwrap_err();
    assert!(e.code() == tonic::Code::InvalidArgument && e.message().contains("breakdowns[0].components"), "{e}");
    assert_eq!(s.ask("<b>", 10, None).unwrap_err().code(), tonic::Code::InvalidArgument);
    let mut r = answer("w", &got.groups[0], 0);
    r.breakdowns[0].components.get_mut("toy").unwrap().version = "a\u{1b}[31m".into();
    assert_eq!(s.submit(r).unwrap(), Verdict::Accepted, "what is only shown is cleaned");
}
