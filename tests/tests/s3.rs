//! Checkpoints at a URL: the run against an S3 server (moto, on loopback), killed and resumed, read back by the commands.

use std::time::Duration;

use unveil_testkit::{Finished, Lineage, Process, Sandbox, binary, python};

const SOON: Duration = Duration::from_secs(120);
const URL: &str = "s3://bucket/runs/a";

/// Serves until it is killed; prints its address once the bucket is there.
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
fn a_run_saves_to_s3_and_resumes_from_it() {
    let s = Sandbox::new();
    let mut server = s.start(&mut s.command(&python(), &["-c", SERVER]));
    let address = server.first_line(SOON).trim().to_owned();
    let s3 = S3 { sandbox: &s, address };
    let (config, run) = (s.micro_config(), s.path("run"));
    let set = format!("checkpoint.url={URL}");
    let args = ["train", "--config", &config.to_string_lossy(), "--set", &set];

    let mut train = s3.spawn(&args);
    let saved = || s3.run(&["checkpoint", "list", URL]).json().last().and_then(|c| c["step"].as_u64());
    train.until("a checkpoint in the bucket", SOON, || saved().filter(|step| *step >= 2));
    s.role("learner").expect("the learner runs").kill();
    train.wait(SOON).says(1, &["learner", "SIGKILL"]);
    let newest = saved().expect("a checkpoint in the bucket");

    s3.run(&args).ok();
    let lineage = Lineage::read(&run);
    assert_eq!(lineage.resumed, [newest], "it goes on from the newest checkpoint of the bucket");
    lineage.is_exactly_once(6, 2, 8);
    assert!(!run.join("checkpoints").exists(), "nothing is staged on the local disk");
    let checks = s3.run(&["checkpoint", "verify", URL]).ok().json();
    assert!(!checks.is_empty() && checks.iter().all(|c| c["ok"] == true), "{checks:?}");
    let out = s.path("exported");
    s3.run(&["checkpoint", "export", URL, "--out", &out.to_string_lossy()]).ok();
    s.unveil(&["model", "inspect", &out.to_string_lossy()]).ok();
    for file in ["config.toml", "events.jsonl", "report.html"] {
        let text = std::fs::read_to_string(run.join(file)).expect(file);
        assert!(!text.contains("very-secret"), "{file} holds a credential");
    }

    server.kill();
    let lost = s3.run(&["checkpoint", "list", URL]);
    lost.says(1, &["s3://bucket"]);
}
