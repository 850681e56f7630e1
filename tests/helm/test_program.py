"""Tests that the program accepts the settings of the chart, and that its submissions are valid charts. `UNVEIL` is the program."""
import functools
import itertools
import json
import os
import pathlib
import re
import subprocess
import tempfile
import tomllib
import unittest

import yaml

from cases import GOOD, cases
from chart import CHART, NAMESPACE, RELEASE, ROOT, containers, environment, job, merged, named, pods, render, submit, values_of
import policy


def flat(table, prefix=""):
    """Flattens a configuration to dotted keys."""
    out = {}
    for key, value in table.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


class Program(unittest.TestCase):
    """The program accepts the settings of the chart."""

    def check(self, toml, variables, *args):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "config.toml")
            path.write_text(toml)
            env = {k: v for k, v in os.environ.items() if not k.startswith("UNVEIL")} | variables
            return subprocess.run([os.environ["UNVEIL"], "config", "show", "--config", path, *args], env=env, capture_output=True, text=True)

    def test_the_rendered_configuration_is_accepted(self):
        for name, values in cases():
            documents, together = render(values), []
            toml = named(documents, "ConfigMap", "-config")["data"]["config.toml"]
            for c in (c for _, _, spec in pods(documents) for c, _ in containers(spec)):
                own = {k: v for k, v in environment(documents, c).items() if k.startswith("UNVEIL__") and "HEALTH" not in k}
                # Roles with compatible variables are checked together.
                fits = (known for known in together if all(known.get(k, v) == v for k, v in own.items()))
                known = next(fits, None)
                together.append(own) if known is None else known.update(own)
            for variables in filter(None, together):
                with self.subTest(name, variables=variables):
                    done = self.check(toml, variables)
                    self.assertEqual((done.returncode, done.stderr), (0, ""))
                    self.assertIn('dir = "/run/unveil"', done.stdout)
                    self.assertIn(f'url = "{values["objectStore"]["url"]}"', done.stdout)

    def test_unknown_keys_are_detected(self):
        documents = render(merged(GOOD, {"set": {"learner.stepps": "5"}}))
        spec = job(documents, "learner")["spec"]["template"]["spec"]
        done = self.check("", environment(documents, spec["containers"][0]))
        self.assertEqual(done.returncode, 2)
        self.assertIn("learner.stepps", done.stderr)

    def test_ranks_are_numbered_once_and_meet_at_the_first(self):
        with tempfile.TemporaryDirectory() as folder:
            program = pathlib.Path(folder, "unveil")
            program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
            program.chmod(0o755)
            for name, address in itertools.product(("four-nodes", "cpu-demo"), ("10.1.2.3", "fd00::1")):
                documents = render(values_of(name))
                spec = job(documents, "learner")["spec"]
                ranks, places = [], {}
                for pod in range(spec["completions"]):
                    for c in spec["template"]["spec"]["containers"]:
                        env = {"PATH": f"{folder}:/usr/bin:/bin", "JOB_COMPLETION_INDEX": str(pod), "JOB_NAME": "demo-learner-1", "POD_IP": address}
                        out = subprocess.run(c["command"], env=env, capture_output=True, text=True, check=True).stdout
                        self.assertIn("learner\n--config\n/etc/unveil/config.toml\n", out)
                        rank = int(re.search(r"rank=(\d+)", out)[1])
                        ranks.append(rank)
                        places[rank] = re.search(r"rendezvous=(\S+)", out)[1]
                self.assertEqual(ranks, list(range(values_of(name)["learner"]["ranks"])))
                self.assertEqual(places.pop(0), f"[{address}]:29500" if ":" in address else f"{address}:29500")
                self.assertEqual(set(places.values()), {f"demo-learner-1-0.demo-unveil-ranks.{NAMESPACE}.svc:29500"})
                self.assertEqual(spec["template"]["spec"]["subdomain"], named(documents, "Service", "-ranks")["metadata"]["name"])
                values = environment(documents, spec["template"]["spec"]["containers"][-1])
                last = ["--set", f"learner.parallel.rank={ranks[-1]}", "--set", f"learner.parallel.rendezvous={places[ranks[-1]]}"]
                done = self.check(named(documents, "ConfigMap", "-config")["data"]["config.toml"], values, *last)
                self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_submissions_follow_the_policies(self):
        config, url = ROOT / "configs/quickstart.toml", "s3://bucket/runs/a"
        sets = ["--set", f"checkpoint.url={url}", "--set", "learner.parallel.ranks=2", "--set", "rollout.workers=3"]
        with tempfile.TemporaryDirectory() as folder:
            run = functools.partial(submit, "--config", config, *sets, folder=folder)
            shown = run("--dry-run")
            self.assertEqual((shown.returncode, os.listdir(folder)), (0, []))
            self.assertIn("helm is not installed", shown.stderr)
            written = run("--release", RELEASE, "--namespace", NAMESPACE, "--chart", CHART)
            said = json.loads(written.stdout)
            self.assertEqual((said["installed"], pathlib.Path(folder, said["values"]).read_text()), (False, shown.stdout))
            self.assertIn(said["command"], written.stderr)
            refused = run("--set", "checkpoint.url=runs/a")
            self.assertEqual(refused.returncode, 2)
            self.assertIn("checkpoint.url is `runs/a`", refused.stderr)
        documents = render(merged(yaml.safe_load(shown.stdout), {"auth": GOOD["auth"]}))
        self.assertEqual(policy.faults(documents), [])
        self.assertEqual((job(documents, "learner")["spec"]["completions"], named(documents, "Deployment", "-rollout")["spec"]["replicas"]), (2, 3))
        container = job(documents, "learner")["spec"]["template"]["spec"]["containers"][0]
        toml = named(documents, "ConfigMap", "-config")["data"]["config.toml"]
        inside = tomllib.loads(self.check(toml, environment(documents, container)).stdout)
        before = tomllib.loads(self.check(config.read_text(), {}, *sets).stdout)
        changed = {k for k, v in flat(inside).items() if flat(before)[k] != v}
        own = {"run.dir", "run.device", "health.listen", "learner.listen", "learner.address", "learner.metrics_listen", "rollout.metrics_listen", "reward.listen",
               "reward.address", "reward.service.metrics_listen", "tls.insecure", "auth.token_env"}
        self.assertEqual(changed, own, "the chart changes only its own keys")

    def test_workers_and_probes_find_the_services(self):
        documents = render(values_of("four-nodes"))
        variables = environment(documents, named(documents, "Deployment", "-rollout")["spec"]["template"]["spec"]["containers"][0])
        for key, end in (("UNVEIL__LEARNER__ADDRESS", "-learner"), ("UNVEIL__REWARD__ADDRESS", "-reward")):
            scheme, host, port = re.fullmatch(r"(https?)://([^:]+):(\d+)", variables[key]).groups()
            service = named(documents, "Service", end)
            self.assertEqual(host, f"{service['metadata']['name']}.{NAMESPACE}.svc")
            self.assertIn(int(port), [p["port"] for p in service["spec"]["ports"]])
            names = named(documents, "Certificate", end)["spec"]["dnsNames"]
            self.assertIn(host, names)
        for c in named(documents, "Pod", "-ready")["spec"]["containers"]:
            host, port = c["command"][-1].split(":")
            self.assertIn((host, int(port)), [(f"{RELEASE}-unveil-{r}.{NAMESPACE}.svc", 8086) for r in ("learner", "reward")])


if __name__ == "__main__":
    unittest.main()
