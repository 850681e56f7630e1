//! Certificates of roles and what they open: who may serve, who may call, where a listener may be. OpenSSL (by Python) judges the
//! certificates too.

use std::path::Path;
use std::time::Duration;

use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use unveil_config::{Config, Role};
use unveil_service::issue::{Existing, IssueError, IssueOptions, issue};
use unveil_service::{
    Access, CancellationToken, Guard, Routes, Running, ServeOptions, ServiceError, authorised, client_options,
    connect_with, metrics_page, start,
};

const SOON: Duration = Duration::from_millis(800);
/// How long the end of a handshake is waited for.
const PATIENCE: Duration = Duration::from_secs(60);
const TOKEN: &str = "the token of this run";

fn options(existing: Existing, hosts: &[&str]) -> IssueOptions {
    IssueOptions { hosts: hosts.iter().map(|h| (*h).to_owned()).collect(), days: 30, existing }
}

fn config(dir: &Path) -> Config {
    let mut c = Config::default();
    c.tls.dir = dir.display().to_string();
    c
}

/// A service of `role` under a configuration.
async fn serve_at(listen: &str, c: &Config, role: Role) -> Result<(Running, CancellationToken), ServiceError> {
    let access = Access::of(c, role)?;
    let stop = CancellationToken::new();
    let guard = Guard::new(access.token.as_ref(), 4, None, &[]).admitting(access.callers);
    let options = ServeOptions { tls: access.tls, guard, insecure: access.insecure, ..ServeOptions::default() };
    Ok((start(listen, Routes::default(), options, stop.clone()).await?, stop))
}

/// Whether `role` of a configuration gets through to a service: TLS, and a call that needs the token.
async fn call(address: &str, c: &Config, role: Role) -> Result<(), String> {
    let options = client_options(c, role).map_err(|e| e.to_string())?;
    let begin = std::time::Instant::now();
    let channel = loop {
        match connect_with(address, &options, SOON).await {
            // A busy machine: the handshake was not answered either way.
            Err(e) if e.to_string().contains("last: no answer") && begin.elapsed() < PATIENCE => {}
            done => break done.map_err(|e| e.to_string())?,
        }
    };
    HealthClient::new(channel.clone()).check(HealthCheckRequest::default()).await.map_err(|e| format!("{e:?}"))?;
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.map_err(|e| e.to_string())?;
    let codec = tonic_prost::ProstCodec::<(), ()>::default();
    let request = authorised(tonic::Request::new(()), options.token.as_ref()).unwrap();
    // There is no such service: who is let in is told so.
    let status = grpc.unary(request, "/none.None/None".parse().unwrap(), codec).await.unwrap_err();
    if status.code() == tonic::Code::Unimplemented { Ok(()) } else { Err(format!("{status:?}")) }
}

#[test]
fn what_is_there_stays_unless_it_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("tls");
    let read = |name: &str| std::fs::read_to_string(dir.join(name)).unwrap();
    let renewed = |e| issue(&dir, &options(e, &["learner.example", "10.1.2.3", "*.pods.cluster"]));
    let e = renewed(Existing::Renew).unwrap_err();
    assert!(matches!(&e, IssueError::Authority { file, .. } if file.ends_with("ca.key")), "{e}");
    let made = renewed(Existing::Refuse).unwrap();
    assert_eq!(
        made.roles["learner"].names,
        ["learner", "localhost", "127.0.0.1", "::1", "learner.example", "10.1.2.3", "*.pods.cluster"]
    );
    assert_eq!(made.roles["rollout"].names, Vec::<String>::new());
    assert!(made.roles["reward"].not_after < made.ca.not_after && made.ca.not_after.len() == 10);
    use std::os::unix::fs::PermissionsExt;
    for key in made.roles.values().chain([&made.ca]).map(|m| &m.key) {
        assert_eq!(std::fs::metadata(key).unwrap().permissions().mode() & 0o777, 0o600, "{}", key.display());
    }
    let (ca, leaf, key) = (read("ca.crt"), read("learner/tls.crt"), read("learner/tls.key"));
    assert!(matches!(renewed(Existing::Refuse).unwrap_err(), IssueError::Exists(_)));
    assert_eq!((read("ca.crt"), read("learner/tls.crt")), (ca.clone(), leaf.clone()), "a refusal changes nothing");
    let again = renewed(Existing::Renew).unwrap();
    assert_eq!((again.ca, read("ca.crt"), read("rollout/ca.crt")), (made.ca, ca.clone(), ca.clone()));
    assert!(read("learner/tls.crt") != leaf && read("learner/tls.key") != key);
    renewed(Existing::Replace).unwrap();
    assert!(read("ca.crt") != ca);
    std::fs::write(dir.join("ca.key"), key).unwrap();
    let e = renewed(Existing::Renew).unwrap_err().to_string();
    assert!(e.contains("not the key of ca.crt"), "{e}");
    for bad in ["", "a b", "x/y", "http://x", "a..b"] {
        let e = issue(&dir, &options(Existing::Replace, &[bad])).unwrap_err();
        assert!(matches!(e, IssueError::Host(_)), "{bad}: {e}");
    }
    for days in [0, 1826] {
        let e = issue(&dir, &IssueOptions { days, ..options(Existing::Replace, &[]) }).unwrap_err();
        assert!(matches!(e, IssueError::Days { .. }), "{e}");
    }
}

/// Handshakes in memory by OpenSSL: `server client name` -> ok or the reason.
const OPENSSL: &str = r#"
import ssl, sys
def shake(root, server, client, name):
    s = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    s.load_cert_chain(f"{root}/{server}/tls.crt", f"{root}/{server}/tls.key")
    s.load_verify_locations(f"{root}/{server}/ca.crt"); s.verify_mode = ssl.CERT_REQUIRED
    c = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    c.load_verify_locations(f"{root}/{client}/ca.crt")
    c.load_cert_chain(f"{root}/{client}/tls.crt", f"{root}/{client}/tls.key")
    a, b, d, e = (ssl.MemoryBIO() for _ in range(4))
    ends = [c.wrap_bio(a, b, server_hostname=name), s.wrap_bio(b, a, server_side=True)]
    done = [False, False]
    for _ in range(10):
        for i, end in enumerate(ends):
            try:
                if not done[i]: end.do_handshake(); done[i] = True
            except ssl.SSLWantReadError: pass
            except ssl.SSLError as x: return str(x)
    return "ok" if all(done) else "no end"
root = sys.argv[1]
for server, client, name in [("learner", "rollout", "learner"), ("reward", "client", "10.1.2.3"), ("learner", "learner", "deep.pods.cluster"),
                             ("learner", "rollout", "elsewhere"), ("rollout", "rollout", "rollout")]:
    print(shake(root, server, client, name))
"#;

#[test]
fn openssl_takes_the_certificates_for_what_they_are() {
    let dir = tempfile::tempdir().unwrap();
    issue(dir.path(), &options(Existing::Refuse, &["10.1.2.3", "*.pods.cluster"])).unwrap();
    let python =
        std::process::Command::new(unveil_testkit::python()).args(["-c", OPENSSL]).arg(dir.path()).output().unwrap();
    let said = String::from_utf8_lossy(&python.stdout);
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines.len(), 5, "{said}{}", String::from_utf8_lossy(&python.stderr));
    assert_eq!(lines[..3], ["ok"; 3], "{said}");
    assert!(lines[3].contains("elsewhere") || lines[3].to_lowercase().contains("hostname mismatch"), "{said}");
    assert!(lines[4].to_lowercase().contains("purpose") || lines[4].to_lowercase().contains("mismatch"), "{said}");
}

#[tokio::test]
async fn roles_know_each_other_by_their_certificates() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
    for dir in [&ours, &theirs] {
        issue(dir, &options(Existing::Refuse, &[])).unwrap();
    }
    let c = config(&ours);
    let (running, stop) = serve_at("0.0.0.0:0", &c, Role::Learner).await.unwrap();
    let port = running.address.port();
    let (plain, named) = (format!("127.0.0.1:{port}"), format!("https://localhost:{port}"));
    for address in [&plain, &named] {
        call(address, &c, Role::Rollout).await.unwrap();
        for role in [Role::Client, Role::Reward, Role::Learner] {
            let e = call(address, &c, role).await.unwrap_err();
            let words = ["PermissionDenied", role.name(), "only rollout may call the learner", "tls.names"];
            assert!(words.iter().all(|w| e.contains(w)), "{e}");
        }
    }
    // A role's own folder, as a mounted secret is.
    call(&named, &config(&ours.join("rollout")), Role::Rollout).await.unwrap();
    call(&named, &config(&ours.join("client")), Role::Rollout).await.unwrap_err();
    let mut bare = c.clone();
    bare.tls.mutual = false;
    for (refused, why) in [(&bare, ""), (&config(&theirs), "UnknownIssuer"), (&Config::default(), "")] {
        let e = call(&named, refused, Role::Rollout).await.unwrap_err();
        assert!(e.contains(why), "{e}");
    }
    // Another address of this machine, which the certificate does not name.
    let e = call(&format!("https://127.0.0.2:{port}"), &c, Role::Rollout).await.unwrap_err();
    assert!(e.contains("not valid for name \"127.0.0.2\""), "{e}");
    // New certificates by the same authority open the same doors, those of a new authority do not.
    issue(&ours, &options(Existing::Renew, &[])).unwrap();
    call(&named, &c, Role::Rollout).await.unwrap();
    issue(&ours, &options(Existing::Replace, &[])).unwrap();
    call(&named, &c, Role::Rollout).await.unwrap_err();
    stop.cancel();

    // A rollout worker's key cannot stand in for a service, though the same authority signed it.
    let impostor = config(&ours.join("rollout"));
    let (running, stop) = serve_at("127.0.0.1:0", &impostor, Role::Learner).await.unwrap();
    let e = call(&format!("https://127.0.0.1:{}", running.address.port()), &c, Role::Rollout).await.unwrap_err();
    assert!(e.contains("invalid peer certificate") || e.contains("certificate"), "{e}");
    stop.cancel();
}

/// Which role may call which service, and what a configuration may add.
#[tokio::test]
async fn the_matrix_of_roles_and_services() {
    let dir = tempfile::tempdir().unwrap();
    issue(dir.path(), &options(Existing::Refuse, &[])).unwrap();
    let c = config(dir.path());
    let mut named = c.clone();
    named.tls.names.insert("rollout".into(), vec!["cl*".into()]);
    let learner = [(Role::Rollout, true), (Role::Learner, false), (Role::Reward, false), (Role::Client, false)];
    let reward = [(Role::Rollout, true), (Role::Learner, true), (Role::Reward, false), (Role::Client, true)];
    let renamed = [(Role::Rollout, false), (Role::Learner, false), (Role::Reward, false), (Role::Client, true)];
    for (serving, c, callers) in
        [(Role::Learner, &c, learner), (Role::Reward, &c, reward), (Role::Learner, &named, renamed)]
    {
        let (running, stop) = serve_at("127.0.0.1:0", c, serving).await.unwrap();
        let address = format!("https://localhost:{}", running.address.port());
        for (role, may) in callers {
            let called = call(&address, c, role).await;
            assert_eq!(called.is_ok(), may, "{} calls {}: {called:?}", role.name(), serving.name());
        }
        stop.cancel();
    }
}

#[tokio::test]
async fn beyond_loopback_a_listener_needs_tls_and_a_way_to_know_callers() {
    let dir = tempfile::tempdir().unwrap();
    issue(dir.path(), &options(Existing::Refuse, &[])).unwrap();
    let token = dir.path().join("token");
    std::fs::write(&token, TOKEN).unwrap();
    let with = |dir: &Path, mutual: bool, insecure: bool, token: &Path| {
        let mut c = Config::default();
        (c.tls.mutual, c.tls.insecure) = (mutual, insecure);
        c.tls.dir = dir.display().to_string();
        c.auth.token_file = token.display().to_string();
        c
    };
    let (no, tls) = (Path::new(""), dir.path());
    for (c, words) in [
        (with(no, true, false, no), &["0.0.0.0", "loopback", "unveil tls init", "tls.insecure"][..]),
        (with(no, true, false, &token), &["0.0.0.0", "loopback", "tls.dir"]),
        (with(tls, false, false, no), &["auth.token_env", "tls.mutual"]),
        (with(no, true, true, no), &["auth.token_env"]),
    ] {
        let e = serve_at("0.0.0.0:0", &c, Role::Reward).await.unwrap_err();
        assert!(e.is_permanent() && words.iter().all(|w| e.to_string().contains(w)), "{e}");
    }
    for c in [with(tls, true, false, no), with(tls, false, false, &token), with(no, true, true, &token)] {
        let (running, stop) = serve_at("0.0.0.0:0", &c, Role::Reward).await.unwrap();
        let address = format!("{}://127.0.0.1:{}", c.scheme(), running.address.port());
        call(&address, &c, Role::Rollout).await.unwrap();
        let mut stranger = c.clone();
        stranger.auth.token_file.clear();
        if c.auth.token_file.is_empty() {
            stranger.tls.mutual = false;
        }
        call(&address, &stranger, Role::Rollout).await.unwrap_err();
        stop.cancel();
    }
    let (running, stop) = serve_at("127.0.0.1:0", &Config::default(), Role::Reward).await.unwrap();
    call(&running.address.to_string(), &Config::default(), Role::Rollout).await.unwrap();
    stop.cancel();
}

#[tokio::test]
async fn the_metrics_page_speaks_tls_where_its_role_does() {
    let dir = tempfile::tempdir().unwrap();
    issue(dir.path(), &options(Existing::Refuse, &[])).unwrap();
    let page = async |listen: &str, access: &Access| {
        let stop = CancellationToken::new();
        metrics_page(listen, Default::default(), || (), access, stop.clone()).await.map(|a| (a, stop))
    };
    let plain = Access::default();
    let e = page("0.0.0.0:0", &plain).await.unwrap_err().to_string();
    assert!(e.contains("loopback") && e.contains("tls.dir"), "{e}");
    page("0.0.0.0:0", &Access { insecure: true, ..plain.clone() }).await.unwrap();
    let secured = Access::of(&config(dir.path()), Role::Reward).unwrap();
    let ca = reqwest::Certificate::from_pem(&std::fs::read(dir.path().join("ca.crt")).unwrap()).unwrap();
    let trusting = reqwest::Client::builder().no_proxy().tls_certs_only([ca]).build().unwrap();
    let strange = reqwest::Client::builder().no_proxy().build().unwrap();
    let (at, stop) = page("0.0.0.0:0", &secured).await.unwrap();
    let url = format!("https://localhost:{}/metrics", at.port());
    let answer = trusting.get(&url).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    assert!(answer.text().await.unwrap().contains("# EOF"));
    assert!(strange.get(&url).send().await.is_err());
    stop.cancel();
    let (at, stop) = page("127.0.0.1:0", &plain).await.unwrap();
    let answer = strange.get(format!("http://{at}/metrics")).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    stop.cancel();
}
