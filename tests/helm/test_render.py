"""Lints and renders the chart, and compares it with the schemas of Kubernetes and with snapshots. `--write-snapshots` updates the
snapshots."""
import copy
import difflib
import functools
import itertools
import json
import re
import sys
import unittest

import helm_python
import jsonschema
import kubernetes_validate
import yaml

from cases import GOOD, cases
from chart import CHART, HERE, RELEASE, SHAPES, job, merged, named, render, values_of

VERSIONS = ("1.29", "1.30", "1.31", "1.32", "1.33", "1.34")
CUSTOM = {"Certificate": "certificate.json", "PodMonitor": "podmonitor.json"}
SNAPSHOTS = HERE / "snapshots"
WRITE = "--write-snapshots" in sys.argv
# Read each schema file once, not once per object.
kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)


def complaints(values):
    """Returns the warnings (2) and errors (3) of `helm lint --strict`."""
    report = helm_python.lint(CHART, values=values, strict=True)
    return [m for m in report["messages"] if m["severity"] >= 2] + (report["errors"] or [])


def snapshot(values):
    """Returns all objects as YAML, abbreviated: common labels are replaced by their component, the restricted security context of a container
    by its name, and only the first two ranks of a pod are included."""
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
    """Dumper that writes multi-line text as a block."""


Lines.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None))


class Rendering(unittest.TestCase):
    def test_openshift_assigns_users_itself(self):
        for name, values in cases():
            with self.subTest(name):
                plain, there = render(values), render(merged(values, {"openshift": True, "networkPolicy": {"enabled": True}}))
                for documents, user in ((plain, 10001), (there, None)):
                    security = job(documents, "learner")["spec"]["template"]["spec"]["securityContext"]
                    self.assertEqual([security.get(k) for k in ("runAsUser", "runAsGroup", "fsGroup")], [user] * 3)
                    self.assertTrue(security["runAsNonRoot"])
                for role in ("stage1", "learner", "rollout", "reward"):
                    policies = [d for d in there if d["kind"] == "NetworkPolicy" and d["metadata"]["name"].endswith("-" + role)]
                    for policy in policies:
                        ports = [p["port"] for e in policy["spec"]["egress"] if "to" not in e for p in e["ports"]]
                        self.assertEqual([p for p in ports if p in (53, 5353)], [53, 53, 5353, 5353])

    def test_lint_finds_nothing(self):
        for name, values in cases():
            with self.subTest(name):
                self.assertEqual(complaints(values), [])

    def test_lint_detects_invalid_values(self):
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

    def test_misspelt_keys_are_detected(self):
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
            self.assertEqual(shown, "", f"\n{shown}\n\nIf this is intended, run tests/helm/test_render.py --write-snapshots and review the difference.")
        self.assertEqual({p.stem for p in SNAPSHOTS.glob("*.yaml")}, set(SHAPES), "snapshots without a values file, or the other way round")

    def test_changed_specifications_are_new_jobs(self):
        values = values_of("one-gpu")
        name = lambda v: job(render(v), "learner")["metadata"]["name"]
        self.assertEqual(name(values), name(copy.deepcopy(values)))
        self.assertEqual(name(values), name(merged(values, {"rollout": {"replicas": 7}, "reward": {"replicas": 5}})))
        for change in ({"learner": {"ranks": 2}}, {"set": {"learner.steps": "9"}}, {"image": {"tag": "0.1.1"}}):
            self.assertNotEqual(name(values), name(merged(values, change)), change)


if __name__ == "__main__":
    unittest.main(argv=[a for a in sys.argv if a != "--write-snapshots"])
