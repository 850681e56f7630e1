"""The chart: linted, rendered with every values file, held against Kubernetes' schemas, against the policies and against snapshots;
wrong values refused; what it sets accepted by the program. `UNVEIL` names the program, `--write-snapshots` writes the snapshots again."""
import copy
import difflib
import functools
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import tomllib
import unittest

import helm_python
import jsonschema
import kubernetes_validate
import yaml

from chart import CHART, HERE, NAMESPACE, RELEASE, ROOT, SHAPES, containers, environment, job, merged, named, pods, render, submit, values_of
import policy

VERSIONS = ("1.29", "1.30", "1.31", "1.32", "1.33", "1.34")
CUSTOM = {"Certificate": "certificate.json", "PodMonitor": "podmonitor.json"}
SNAPSHOTS = HERE / "snapshots"
WRITE = "--write-snapshots" in sys.argv
# Each of the schema files is read once, not once per object.
kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)
#: Everything that can be switched on, beside what the values files have.
EVERYTHING = {
    "podLabels": {"team": "imaging"},
    "podAnnotations": {"example.com/note": "a"},
    "set": {"learner.optimizer.lr": "1e-5", "rollout.stop": '["###"]'},
    "inputs": [{"name": "tables", "mountPath": "/inputs/tables", "roles": ["reward"], "volume": {"configMap": {"name": "tables"}}}],
    "networkPolicy": {"extraEgress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}]},
    "metrics": {"podMonitor": {"enabled": True, "labels": {"release": "prometheus"}}, "dashboard": {"enabled": True}},
    "rollout": {"autoscaling": {"enabled": True, "metric": {"matchLabels": {"run": "a"}}}, "runtimeClassName": "nvidia"},
    "reward": {
        "autoscaling": {"enabled": True},
        "affinity": {"nodeAffinity": {}},
        "extraEnv": [{"name": "JUDGE_KEY", "valueFrom": {"secretKeyRef": {"name": "judge", "key": "key"}}}],
        "extraVolumes": [{"name": "work", "emptyDir": {"sizeLimit": "1Gi"}}],
        "extraVolumeMounts": [{"name": "work", "mountPath": "/work"}],
    },
}


def cases():
    """(name, values): each shape, a shape together with another endpoint, everything at once, and without what can be left out."""
    out = [(name, values_of(name)) for name in SHAPES]
    out.append(("one-gpu+s3-endpoint", values_of("one-gpu", "s3-endpoint")))
    out.append(("everything", merged(values_of("cpu-demo", "s3-endpoint"), EVERYTHING)))
    bare = {"stage1": {"enabled": False}, "reward": {"enabled": False}, "networkPolicy": {"enabled": False}, "serviceAccount": {"create": False}}
    out.append(("bare", merged({"objectStore": {"url": "s3://b/p"}, "config": '[reward]\naddress = "http://scores:7071"\n'}, bare)))
    return out


def complaints(values):
    """Warnings (2) and errors (3) of `helm lint --strict`."""
    report = helm_python.lint(CHART, values=values, strict=True)
    return [m for m in report["messages"] if m["severity"] >= 2] + (report["errors"] or [])


class Rendering(unittest.TestCase):
    def test_lint_finds_nothing(self):
        for name, values in cases():
            with self.subTest(name):
                self.assertEqual(complaints(values), [])

    def test_lint_would_find_a_wrong_value(self):
        self.assertTrue(complaints(merged(GOOD, {"learner": {"ranks": 0}})))

    def test_kubernetes_accepts_every_object(self):
        for name, values in cases():
            documents = render(values)
            self.assertGreater(len(documents), 6, name)
            for d, version in itertools.product(documents, VERSIONS):
                with self.subTest(name, kind=d["kind"], version=version):
                    if d["kind"] in CUSTOM:
                        jsonschema.validate(d, json.loads((HERE / "schemas" / CUSTOM[d["kind"]]).read_text()))
                    else:
                        kubernetes_validate.validate(d, version, strict=True)

    def test_a_misspelt_key_would_be_found(self):
        documents = render(values_of("four-nodes"))
        broken = copy.deepcopy(job(documents, "learner"))
        broken["spec"]["podFailurePolicies"] = []
        with self.assertRaises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(broken, VERSIONS[0], strict=True)
        for kind, file in CUSTOM.items():
            broken = copy.deepcopy(next(d for d in documents if d["kind"] == kind))
            broken["spec"]["intervall"] = "1s"
            with self.assertRaises(jsonschema.ValidationError):
                jsonschema.validate(broken, json.loads((HERE / "schemas" / file).read_text()))

    def test_snapshots(self):
        texts = {name: snapshot(values_of(name)) for name in SHAPES}
        if WRITE:
            SNAPSHOTS.mkdir(exist_ok=True)
            for name, text in texts.items():
                (SNAPSHOTS / f"{name}.yaml").write_text(text)
        for name, text in texts.items():
            path = SNAPSHOTS / f"{name}.yaml"
            before = path.read_text() if path.exists() else ""
            diff = difflib.unified_diff(before.splitlines(), text.splitlines(), str(path), "rendered now", lineterm="", n=2)
            shown = "\n".join(itertools.islice(diff, 80))
            self.assertEqual(shown, "", f"\n{shown}\n\nIf this is meant: python {sys.argv[0]} --write-snapshots, and review the difference.")
        self.assertEqual({p.stem for p in SNAPSHOTS.glob("*.yaml")}, set(SHAPES), "snapshots without a values file, or the other way round")

    def test_another_specification_is_another_job(self):
        values = values_of("one-gpu")
        name = lambda v: job(render(v), "learner")["metadata"]["name"]
        self.assertEqual(name(values), name(copy.deepcopy(values)))
        self.assertEqual(name(values), name(merged(values, {"rollout": {"replicas": 7}, "reward": {"replicas": 5}})))
        for change in ({"learner": {"ranks": 2}}, {"set": {"learner.steps": "9"}}, {"image": {"tag": "0.1.1"}}):
            self.assertNotEqual(name(values), name(merged(values, change)), change)


def snapshot(values):
    """Every object, without what all have in common: labels are told by their component, the restricted security context of a
    container by its name, and of a pod's ranks the first two are shown."""
    documents = render(values)
    restricted = named(documents, "Deployment", "-rollout")["spec"]["template"]["spec"]["containers"][0]["securityContext"]

    def short(node):
        if isinstance(node, list):
            return [short(x) for x in node if not (isinstance(x, dict) and re.fullmatch(r"rank-([2-9]|\d\d)", str(x.get("name"))))]
        if not isinstance(node, dict):
            return node
        out = {}
        for key, below in node.items():
            same = isinstance(below, dict) and below.get("app.kubernetes.io/instance") == RELEASE
            if same and "app.kubernetes.io/component" in below:
                more = {k: v for k, v in below.items() if not re.match(r"(app\.kubernetes\.io|helm\.sh)/", k)}
                out[f"{key} of"] = below["app.kubernetes.io/component"]
                out |= {f"{key} besides": more} if more else {}
            elif key == "securityContext" and below == restricted:
                out[key] = "restricted"
            elif key in ("unveil.json", "config.toml"):
                out[key] = "a whole file"
            else:
                out[key] = short(below)
        return out

    return yaml.dump_all(short(documents), Dumper=Lines, sort_keys=False, width=140)


class Lines(yaml.SafeDumper):
    """Text of several lines as lines."""


Lines.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None))


class Policies(unittest.TestCase):
    def test_every_chart_keeps_to_them(self):
        for name, values in cases():
            with self.subTest(name):
                self.assertEqual(policy.faults(render(values)), [])

    def test_each_rule_finds_what_it_is_for(self):
        def container(d):
            return d["spec"]["template"]["spec"]["containers"][0]

        breaks = {
            "may run as root": lambda d: d["spec"]["template"]["spec"]["securityContext"].update(runAsNonRoot=False),
            "gets the API's token": lambda d: d["spec"]["template"]["spec"].update(automountServiceAccountToken=True),
            "hostNetwork": lambda d: d["spec"]["template"]["spec"].update(hostNetwork=True),
            "no seccomp profile": lambda d: d["spec"]["template"]["spec"]["securityContext"].pop("seccompProfile"),
            "privileges": lambda d: container(d)["securityContext"].update(privileged=True),
            "writable root file system": lambda d: container(d)["securityContext"].pop("readOnlyRootFilesystem"),
            "capabilities": lambda d: container(d)["securityContext"]["capabilities"].update(add=["IPC_LOCK"]),
            "is not pinned": lambda d: container(d).update(image="registry.example.com/unveil:latest"),
            "no limits of ['memory']": lambda d: container(d)["resources"]["limits"].pop("memory"),
            "no livenessProbe": lambda d: container(d).pop("livenessProbe"),
            "asks for the wrong service": lambda d: container(d)["readinessProbe"]["grpc"].pop("service"),
            "could be written by several pods": lambda d: d["spec"]["template"]["spec"]["volumes"].append(
                {"name": "x", "persistentVolumeClaim": {"claimName": "c"}}),
            "has no limit": lambda d: d["spec"]["template"]["spec"]["volumes"].append({"name": "x", "emptyDir": {}}),
            "mounts config writable": lambda d: container(d)["volumeMounts"][0].pop("readOnly"),
            "MY_TOKEN holds a value": lambda d: container(d)["env"].append({"name": "MY_TOKEN", "value": "abc"}),
            "selects 0 kinds of pods": lambda d: d["spec"]["template"]["metadata"]["labels"].pop("app.kubernetes.io/name"),
            "nobody listens on 7070": lambda d: container(d)["ports"].pop(1),
            "0 network policies": lambda d: d["spec"]["template"]["metadata"]["labels"].update({"app.kubernetes.io/instance": "other"}),
        }
        documents = render(values_of("cpu-demo"))
        for words, damage in breaks.items():
            with self.subTest(words):
                broken = copy.deepcopy(documents)
                damage(job(broken, "learner"))
                found = policy.faults(broken)
                self.assertTrue(any(words in line for line in found), found)

    def test_a_certificate_that_nobody_makes_is_found(self):
        documents = render(values_of("four-nodes"))
        named(documents, "Certificate", "-reward")["spec"]["secretName"] = "other"
        found = policy.faults(documents)
        self.assertTrue(any("nobody makes the secret demo-unveil-reward-tls" in line for line in found), found)

    def test_only_who_needs_the_object_store_gets_its_keys(self):
        for name, _, spec in pods(render(values_of("cpu-demo"))):
            for c, init in containers(spec):
                has = any("secretRef" in s for s in c.get("envFrom", []))
                needs = init or any(word in name for word in ("Job", "stage1"))
                self.assertEqual(has, needs, f"{name}, {c['name']}")


GOOD = {"objectStore": {"url": "s3://b/p"}}
#: (values that are wrong, words that the message must hold)
WRONG = [
    ({"objectStore": {"url": "runs/a"}}, ["/objectStore/url", "runs/a", "s3"]),
    ({"objectStore": {"url": ""}}, ["/objectStore/url"]),
    ({"objectStore": {"endpoint": "http://key:secret@minio:9000"}}, ["/objectStore/endpoint"]),
    ({"objectStore": {"endpoint": "http://minio:9000"}}, ["/objectStore/allowHttp", "true"]),
    ({"objectStore": {"accessKey": "AKIA"}}, ["/objectStore", "accessKey"]),
    ({"image": {"tag": "latest"}}, ["/image/tag", "latest"]),
    ({"rewardImage": {"tag": "main"}}, ["/rewardImage/tag", "main"]),
    ({"image": {"digest": "sha256:abc"}}, ["/image/digest"]),
    ({"image": {"repository": "unveil:latest"}}, ["/image/repository", "unveil:latest"]),
    ({"lerner": {"ranks": 2}}, ["lerner"]),
    ({"learner": {"rank": 2}}, ["/learner", "rank"]),
    ({"learner": {"ranks": "two"}}, ["/learner/ranks", "string", "integer"]),
    ({"learner": {"ranks": 0}}, ["/learner/ranks", "0"]),
    ({"learner": {"gpus": 8}}, ["/learner/gpus"]),
    ({"learner": {"resources": {"limits": {"memory": None}}}}, ["/learner/resources/limits", "memory"]),
    ({"learner": {"resources": {"limits": {"memory": "8 GB"}}}}, ["/learner/resources/limits/memory", "8 GB"]),
    ({"learner": {"terminationGracePeriodSeconds": 1}}, ["terminationGracePeriodSeconds", "5"]),
    ({"rollout": {"replicas": -1}}, ["/rollout/replicas"]),
    ({"rollout": {"autoscaling": {"metric": {"name": "a b"}}}}, ["/rollout/autoscaling/metric/name"]),
    ({"reward": {"autoscaling": {"cpuPercent": 0}}}, ["/reward/autoscaling/cpuPercent"]),
    ({"reward": {"disruptionBudget": {"maxUnavailable": 0}}}, ["/reward/disruptionBudget/maxUnavailable"]),
    ({"reward": {"extraEnv": [{"name": "JUDGE_KEY", "value": "sk-123"}]}}, ["/reward/extraEnv/0", "valueFrom"]),
    ({"reward": {"extraEnv": [{"name": "API_TOKEN", "value": "abc"}]}}, ["/reward/extraEnv/0", "valueFrom"]),
    ({"reward": {"extraVolumes": [{"name": "h", "hostPath": {"path": "/"}}]}}, ["/reward/extraVolumes/0", "hostPath"]),
    ({"reward": {"extraVolumes": [{"name": "c", "persistentVolumeClaim": {"claimName": "c"}}]}}, ["extraVolumes/0", "readOnly"]),
    ({"inputs": [{"name": "m", "mountPath": "m", "roles": ["learner"], "volume": {"configMap": {"name": "a"}}}]}, ["/inputs/0/mountPath"]),
    ({"inputs": [{"name": "m", "mountPath": "/m", "roles": ["lerner"], "volume": {"configMap": {"name": "a"}}}]}, ["/inputs/0/roles/0"]),
    ({"inputs": [{"name": "m", "mountPath": "/m", "roles": ["learner"], "fetch": {"image": "aws-cli:latest", "command": ["a"]}}]},
     ["/inputs/0/fetch/image", "latest"]),
    ({"inputs": [{"name": "m", "mountPath": "/m", "roles": ["learner"]}]}, ["inputs", "`m`", "`volume` or `fetch`"]),
    ({"inputs": [{"name": "tmp", "mountPath": "/m", "roles": ["learner"], "volume": {"configMap": {"name": "a"}}}]}, ["tmp", "taken"]),
    ({"tls": {"mode": "on"}}, ["/tls/mode", "certManager"]),
    ({"tls": {"mode": "certManager"}}, ["/tls/issuerRef/name"]),
    ({"tls": {"mode": "secret", "existingSecrets": {"learner": "a", "rollout": "b"}}}, ["/tls/existingSecrets/reward"]),
    ({"auth": {"token": "abc"}}, ["/auth", "token"]),
    ({"set": {"learner.steps": 500}}, ["/set/learner.steps", "number", "string"]),
    ({"set": {"steps": "500"}}, ["steps", "does not match pattern"]),
    ({"set": {"run.dir": "/data"}}, ["set names run.dir", "the chart itself"]),
    ({"set": {"learner.parallel.ranks": "4"}}, ["set names learner.parallel.ranks"]),
    ({"learner": {"ranks": 6, "ranksPerPod": 4}}, ["learner.ranks is 6", "4 ranks a pod"]),
    ({"rollout": {"autoscaling": {"enabled": True, "minReplicas": 9, "maxReplicas": 3}}}, ["rollout.autoscaling", "9", "3"]),
    ({"serviceAccount": {"create": False, "name": "a", "annotations": {"a": "b"}}}, ["serviceAccount.annotations", "create is false"]),
    ({"networkPolicy": {"egressPorts": [70000]}}, ["/networkPolicy/egressPorts/0"]),
    ({"metrics": {"podMonitor": {"interval": "often"}}}, ["/metrics/podMonitor/interval"]),
]


class WrongValues(unittest.TestCase):
    def test_each_is_refused_with_the_place_and_the_reason(self):
        render(GOOD)
        for values, words in WRONG:
            with self.subTest(values=values):
                with self.assertRaises((helm_python.HelmValuesError, helm_python.HelmRenderError)) as caught:
                    render(merged(GOOD, values))
                message = str(caught.exception)
                for word in words:
                    self.assertIn(word, message)

    def test_every_default_is_in_the_schema_and_every_key_has_a_default(self):
        def keys(node, prefix=""):
            node = schema["definitions"][node["$ref"].rsplit("/", 1)[1]] if "$ref" in node else node
            for key, below in node.get("properties", {}).items():
                yield prefix + key
                yield from keys(below, f"{prefix}{key}.")

        def defaults(node, prefix=""):
            for key, below in node.items():
                yield prefix + key
                if isinstance(below, dict):
                    yield from defaults(below, f"{prefix}{key}.")

        with helm_python.Chart.load(CHART) as chart:
            schema, values = chart.schema, chart.values
        free = re.compile(r"\.(requests|limits|labels|matchLabels|annotations|nodeSelector)\.")
        known, given = set(keys(schema)), {k for k in defaults(values) if not free.search(k)}
        self.assertEqual(known - given - {"global"}, set(), "a key without a default")
        self.assertEqual(given - known, set(), "a default without a schema")


def flat(table, prefix=""):
    """A configuration key by key."""
    out = {}
    for key, value in table.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


class Program(unittest.TestCase):
    """What the chart sets is what the program takes."""

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
                # Roles whose variables do not contradict each other are asked about at once.
                fits = (known for known in together if all(known.get(k, v) == v for k, v in own.items()))
                known = next(fits, None)
                together.append(own) if known is None else known.update(own)
            for variables in filter(None, together):
                with self.subTest(name, variables=variables):
                    done = self.check(toml, variables)
                    self.assertEqual((done.returncode, done.stderr), (0, ""))
                    self.assertIn('dir = "/run/unveil"', done.stdout)
                    self.assertIn(f'url = "{values["objectStore"]["url"]}"', done.stdout)

    def test_an_unknown_key_would_be_found(self):
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

    def test_what_submit_makes_is_a_chart_that_keeps_to_the_policies(self):
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
        documents = render(yaml.safe_load(shown.stdout))
        self.assertEqual(policy.faults(documents), [])
        self.assertEqual((job(documents, "learner")["spec"]["completions"], named(documents, "Deployment", "-rollout")["spec"]["replicas"]), (2, 3))
        container = job(documents, "learner")["spec"]["template"]["spec"]["containers"][0]
        toml = named(documents, "ConfigMap", "-config")["data"]["config.toml"]
        inside = tomllib.loads(self.check(toml, environment(documents, container)).stdout)
        before = tomllib.loads(self.check(config.read_text(), {}, *sets).stdout)
        changed = {k for k, v in flat(inside).items() if flat(before)[k] != v}
        own = {"run.dir", "run.device", "health.listen", "learner.listen", "learner.address", "learner.metrics_listen", "reward.listen",
               "reward.address", "reward.service.metrics_listen"}
        self.assertEqual(changed, own, "the chart changes its own keys and no other")

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
    unittest.main(argv=[a for a in sys.argv if a != "--write-snapshots"])
