"""Tests that every chart follows the policies, and that each policy detects its violation."""
import copy
import unittest

from cases import cases
from chart import containers, job, named, pods, render, values_of
import policy


class Policies(unittest.TestCase):
    def test_every_chart_follows_the_policies(self):
        for name, values in cases():
            with self.subTest(name):
                self.assertEqual(policy.faults(render(values)), [])

    def test_each_rule_detects_its_violation(self):
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
            "no container listens on 7070": lambda d: container(d)["ports"].pop(1),
            "0 network policies": lambda d: d["spec"]["template"]["metadata"]["labels"].update({"app.kubernetes.io/instance": "other"}),
        }
        documents = render(values_of("cpu-demo"))
        for words, damage in breaks.items():
            with self.subTest(words):
                broken = copy.deepcopy(documents)
                damage(job(broken, "learner"))
                found = policy.faults(broken)
                self.assertTrue(any(words in line for line in found), found)

    def test_missing_certificates_are_detected(self):
        documents = render(values_of("four-nodes"))
        named(documents, "Certificate", "-reward")["spec"]["secretName"] = "other"
        found = policy.faults(documents)
        self.assertTrue(any("no certificate creates the secret demo-unveil-reward-tls" in line for line in found), found)

    def test_unscraped_metrics_are_detected(self):
        documents = render(values_of("four-nodes"))
        monitor = named(documents, "PodMonitor", "")["spec"]
        monitor["podMetricsEndpoints"] = [e for e in monitor["podMetricsEndpoints"] if "rollout" not in str(e["relabelings"])]
        found = policy.faults(documents)
        self.assertTrue(any("rollout: its metrics are not scraped" in line for line in found), found)

    def test_only_users_of_the_object_store_get_its_keys(self):
        for name, _, spec in pods(render(values_of("cpu-demo"))):
            for c, init in containers(spec):
                has = any("secretRef" in s for s in c.get("envFrom", []))
                needs = init or any(word in name for word in ("Job", "stage1"))
                self.assertEqual(has, needs, f"{name}, {c['name']}")


if __name__ == "__main__":
    unittest.main()
