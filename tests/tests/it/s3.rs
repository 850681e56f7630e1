//! Conditional writes on another S3 server (moto, on loopback), and the loss of the server. Tests on a real server are in `resume`.

use std::time::Duration;

use unveil_testkit::{Finished, Lineage, Process, Sandbox, binary, python, run_args};

const SOON: Duration = Duration::from_secs(120);
const URL: &str = "s3://bucket/runs/a";

/// Serves until it is killed; prints its address once the bucket exists.
const SERVER: &str = "
import time, urllib.request
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)
server.start()
address = 'http://%s:%d' % server.get_host_and_port()
urllib.request.urlopen(urllib.request.Request(address + '/bucket', method='PUT')).read()
print(address, flush=True)
time.sleep(600)
";

/// Programs that use the moto server.
struct S3<'a> {
    sandbox: &'a Sandbox,
    address: String,
}

impl S3<'_> {
    fn spawn(&self, args: &[&str]) -> Process {
        let mut command = self.sandbox.command(&binary("unveil"), args);
        command.env("AWS_ENDPOINT_URL", &self.address).env("AWS_ALLOW_HTTP", "true").env("AWS_REGION", "us-east-1");
        self.sandbox.start(command.env("AWS_ACCESS_KEY_ID", "key").env("AWS_SECRET_ACCESS_KEY", "very-secret"))
    }

    fn run(&self, args: &[&str]) -> Finished {
        self.spawn(args).wait(SOON)
    }
}

#[test]
fn runs_save_to_moto_and_notice_its_loss() {
    let s = Sandbox::new();
    let mut server = s.start(&mut s.command(&python(), &["-c", SERVER]));
    let address = server.first_line(SOON).trim().to_owned();
    let s3 = S3 { sandbox: &s, address };
    let config = s.micro_config();
    let run = s.path("run");
    let set = format!("checkpoint.url={URL}");
    let sets = [set.as_str(), "sft.steps=5", "learner.steps=2", "learner.checkpoint_every=1"];
    s3.run(&run_args("train", &config, &sets)).ok();
    Lineage::read(&run).assert_exactly_once(2, 2, 8);
    let list = s3.run(&["checkpoint", "list", URL]).ok().json();
    assert_eq!(list.iter().filter_map(|c| c["step"].as_u64()).collect::<Vec<_>>(), [1, 2]);
    let checks = s3.run(&["checkpoint", "verify", URL]).ok().json();
    assert!(!checks.is_empty() && checks.iter().all(|c| c["ok"] == true), "{checks:?}");

    server.kill();
    let lost = s3.run(&["checkpoint", "list", URL]);
    lost.fails_with(1, &["s3://bucket"]);
}
