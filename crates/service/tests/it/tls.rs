//! Certificates of roles and what they permit: serving, calling, and listening addresses. OpenSSL (in Python) verifies the certificates as
//! well.

use std::path::Path;
use std::time::Duration;

use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use unveil_config::{Config, Role};
use unveil_service::issue::{Existing, IssueError, IssueOptions, issue};
use unveil_service::{
    CancellationToken, Guard, Routes, RunningServer, ServeOptions, ServiceAccess, ServiceError, authorize,
    client_options, connect_with, serve_metrics, start,
};

const TIMEOUT: Duration = Duration::from_millis(800);
/// Longest wait for the end of a handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(60);
const TOKEN: &str = "the token of this run";

fn options(existing: Existing, hosts: &[&str]) -> IssueOptions {
    IssueOptions { hosts: hosts.iter().map(|h| (*h).to_owned()).collect(), days: 30, existing }
}

fn config(dir: &Path) -> Config {
    let mut c = Config::default();
    c.tls.dir = dir.display().to_string();
    c
}

/// Starts a service of `role` under a configuration.
async fn serve_at(listen: &str, c: &Config, role: Role) -> Result<(RunningServer, CancellationToken), ServiceError> {
    let access = ServiceAccess::of(c, role)?;
    let stop = CancellationToken::new();
    let guard = Guard::new(access.token.as_ref(), 4, None, &[]).with_callers(access.callers);
    let options = ServeOptions { tls: access.tls, guard, insecure: access.insecure, ..ServeOptions::default() };
    Ok((start(listen, Routes::default(), options, stop.clone()).await?, stop))
}

/// Calls a service as `role` of a configuration, through TLS and with the token.
async fn call(address: &str, c: &Config, role: Role) -> Result<(), String> {
    let options = client_options(c, role).map_err(|e| e.to_string())?;
    let begin = std::time::Instant::now();
    let channel = loop {
        match connect_with(address, &options, TIMEOUT).await {
            // The machine is busy: the handshake was neither accepted nor refused.
            Err(e) if e.to_string().contains("last: no answer") && begin.elapsed() < HANDSHAKE_TIMEOUT => {}
            done => break done.map_err(|e| e.to_string())?,
        }
    };
    HealthClient::new(channel.clone()).check(HealthCheckRequest::default()).await.map_err(|e| format!("{e:?}"))?;
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.map_err(|e| e.to_string())?;
    let codec = tonic_prost::ProstCodec::<(), ()>::default();
    let request = authorize(tonic::Request::new(()), options.token.as_ref()).unwrap();
    // There is no such service, so an admitted call is unimplemented.
    let status = grpc.unary(request, "/none.None/None".parse().unwrap(), codec).await.unwrap_err();
    if status.code() == tonic::Code::Unimplemented { Ok(()) } else { Err(format!("{status:?}")) }
}

#[test]
fn existing_certificates_need_renew_or_replace() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("tls");
    let read = |name: &str| std::fs::read_to_string(dir.join(name)).unwrap();
    let renewed = |e| issue(&dir, &options(e, &["learner.example", "10.1.2.3", "*.pods.cluster"]));
    let e = renewed(Existing::Renew).unwrap_err();
    assert!(matches!(&e, IssueError::Authority { file, .. } if file.ends_with("ca.key")), "{e}");
    let first = renewed(Existing::Refuse).unwrap();
    assert_eq!(
        first.roles["learner"].names,
        ["learner", "localhost", "127.0.0.1", "::1", "learner.example", "10.1.2.3", "*.pods.cluster"]
    );
    assert_eq!(first.roles["rollout"].names, Vec::<String>::new());
    assert!(first.roles["reward"].not_after < first.ca.not_after && first.ca.not_after.len() == 10);
    use std::os::unix::fs::PermissionsExt;
    for key in first.roles.values().chain([&first.ca]).map(|m| &m.key) {
        assert_eq!(std::fs::metadata(key).unwrap().permissions().mode() & 0o777, 0o600, "{}", key.display());
    }
    let ca = read("ca.crt");
    let leaf = read("learner/tls.crt");
    let key = read("learner/tls.key");
    assert!(matches!(renewed(Existing::Refuse).unwrap_err(), IssueError::Exists(_)));
    assert_eq!((read("ca.crt"), read("learner/tls.crt")), (ca.clone(), leaf.clone()), "a refusal changes nothing");
    let again = renewed(Existing::Renew).unwrap();
    assert_eq!((again.ca, read("ca.crt"), read("rollout/ca.crt")), (first.ca, ca.clone(), ca.clone()));
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

/// In-memory handshakes by OpenSSL, each printing "ok" or the error.
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
fn openssl_accepts_certificates_for_their_purpose() {
    let dir = tempfile::tempdir().unwrap();
    issue(dir.path(), &options(Existing::Refuse, &["10.1.2.3", "*.pods.cluster"])).unwrap();
    let python =
        std::process::Command::new(unveil_testkit::python()).args(["-c", OPENSSL]).arg(dir.path()).output().unwrap();
    let output = String::from_utf8_lossy(&python.stdout);
    let lines: Vec<&str> = output.lines().collect();
    assert_eq!(lines.len(), 5, "{output}{}", String::from_utf8_lossy(&python.stderr));
    assert_eq!(lines[..3], ["ok"; 3], "{output}");
    assert!(lines[3].contains("elsewhere") || lines[3].to_lowercase().contains("hostname mismatch"), "{output}");
    assert!(lines[4].to_lowercase().contains("purpose") || lines[4].to_lowercase().contains("mismatch"), "{output}");
}

#[tokio::test]
async fn roles_are_authenticated_by_certificates() {
    let dir = tempfile::tempdir().unwrap();
    let ours = dir.path().join("ours");
    let theirs = dir.path().join("theirs");
    for dir in [&ours, &theirs] {
        issue(dir, &options(Existing::Refuse, &[])).unwrap();
    }
    let c = config(&ours);
    let (running, stop) = serve_at("0.0.0.0:0", &c, Role::Learner).await.unwrap();
    let port = running.address.port();
    let plain = format!("127.0.0.1:{port}");
    let named = format!("https://localhost:{port}");
    for address in [&plain, &named] {
        call(address, &c, Role::Rollout).await.unwrap();
        for role in [Role::Client, Role::Reward, Role::Learner] {
            let e = call(address, &c, role).await.unwrap_err();
            let words = ["PermissionDenied", role.name(), "only rollout may call the learner", "tls.names"];
            assert!(words.iter().all(|w| e.contains(w)), "{e}");
        }
    }
    // The folder of a single role, as in a mounted secret.
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
    // New certificates by the same authority are accepted, those of a new authority are not.
    issue(&ours, &options(Existing::Renew, &[])).unwrap();
    call(&named, &c, Role::Rollout).await.unwrap();
    issue(&ours, &options(Existing::Replace, &[])).unwrap();
    call(&named, &c, Role::Rollout).await.unwrap_err();
    stop.cancel();

    // A rollout worker's key cannot impersonate a service although the same authority signed it.
    let impostor = config(&ours.join("rollout"));
    let (running, stop) = serve_at("127.0.0.1:0", &impostor, Role::Learner).await.unwrap();
    let e = call(&format!("https://127.0.0.1:{}", running.address.port()), &c, Role::Rollout).await.unwrap_err();
    assert!(e.contains("invalid peer certificate") || e.contains("certificate"), "{e}");
    stop.cancel();
}

/// Which role may call which service, and what the configuration may change.
#[tokio::test]
async fn permitted_callers_by_service() {
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
        for (role, permitted) in callers {
            let called = call(&address, c, role).await;
            assert_eq!(called.is_ok(), permitted, "{} calls {}: {called:?}", role.name(), serving.name());
        }
        stop.cancel();
    }
}

#[tokio::test]
async fn non_loopback_listeners_need_tls_and_authentication() {
    let dir = tempfile::tempdir().unwrap();
    issue(dir.path(), &options(Existing::Refuse, &[])).unwrap();
    let token = dir.path().join("token");
    std::fs::write(&token, TOKEN).unwrap();
    let configured = |dir: &Path, mutual: bool, insecure: bool, token: &Path| {
        let mut c = Config::default();
        c.tls.mutual = mutual;
        c.tls.insecure = insecure;
        c.tls.dir = dir.display().to_string();
        c.auth.token_file = token.display().to_string();
        c
    };
    let no = Path::new("");
    let tls = dir.path();
    for (c, words) in [
        (configured(no, true, false, no), &["0.0.0.0", "loopback", "unveil tls init", "tls.insecure"][..]),
        (configured(no, true, false, &token), &["0.0.0.0", "loopback", "tls.dir"]),
        (configured(tls, false, false, no), &["auth.token_env", "tls.mutual"]),
        (configured(no, true, true, no), &["auth.token_env"]),
    ] {
        let e = serve_at("0.0.0.0:0", &c, Role::Reward).await.unwrap_err();
        assert!(e.is_permanent() && words.iter().all(|w| e.to_string().contains(w)), "{e}");
    }
    for c in
        [configured(tls, true, false, no), configured(tls, false, false, &token), configured(no, true, true, &token)]
    {
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
async fn metrics_page_uses_tls_like_its_role() {
    let dir = tempfile::tempdir().unwrap();
    issue(dir.path(), &options(Existing::Refuse, &[])).unwrap();
    let page = async |listen: &str, access: &ServiceAccess| {
        let stop = CancellationToken::new();
        serve_metrics(listen, Default::default(), || (), access, stop.clone()).await.map(|a| (a, stop))
    };
    let plain = ServiceAccess::default();
    let e = page("0.0.0.0:0", &plain).await.unwrap_err().to_string();
    assert!(e.contains("loopback") && e.contains("tls.dir"), "{e}");
    page("0.0.0.0:0", &ServiceAccess { insecure: true, ..plain.clone() }).await.unwrap();
    let secured = ServiceAccess::of(&config(dir.path()), Role::Reward).unwrap();
    let ca = reqwest::Certificate::from_pem(&std::fs::read(dir.path().join("ca.crt")).unwrap()).unwrap();
    let trusting = reqwest::Client::builder().no_proxy().tls_certs_only([ca]).build().unwrap();
    let strange = reqwest::Client::builder().no_proxy().build().unwrap();
    let (address, stop) = page("0.0.0.0:0", &secured).await.unwrap();
    let url = format!("https://localhost:{}/metrics", address.port());
    let answer = trusting.get(&url).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    assert!(answer.text().await.unwrap().contains("# EOF"));
    assert!(strange.get(&url).send().await.is_err());
    stop.cancel();
    let (address, stop) = page("127.0.0.1:0", &plain).await.unwrap();
    let answer = strange.get(format!("http://{address}/metrics")).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    stop.cancel();
}
