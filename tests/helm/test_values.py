"""Tests of the messages for invalid values, and of equal keys in schema and defaults."""
import re
import unittest

import helm_python

from cases import GOOD
from chart import CHART, merged, render

#: (invalid values, parts of the expected message)
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
    ({"inputs": [{"name": "tmp", "mountPath": "/m", "roles": ["learner"], "volume": {"configMap": {"name": "a"}}}]}, ["tmp", "already used"]),
    ({"tls": {"mode": "on"}}, ["/tls/mode", "certManager"]),
    ({"tls": {"mode": "certManager"}}, ["/tls/issuerRef/name"]),
    ({"tls": {"mode": "secret", "existingSecrets": {"learner": "a", "rollout": "b"}}}, ["/tls/existingSecrets/reward"]),
    ({"auth": {"token": "abc"}}, ["/auth", "token"]),
    ({"auth": {"existingSecret": ""}}, ["auth.existingSecret is empty", "unveil-token"]),
    ({"auth": {"existingSecret": ""}, "tls": {"mode": "certManager", "issuerRef": {"name": "ca"}}}, ["auth.existingSecret is empty"]),
    ({"set": {"learner.steps": 500}}, ["/set/learner.steps", "number", "string"]),
    ({"set": {"steps": "500"}}, ["steps", "does not match pattern"]),
    ({"set": {"run.dir": "/data"}}, ["set contains run.dir", "the chart sets itself"]),
    ({"set": {"learner.parallel.ranks": "4"}}, ["set contains learner.parallel.ranks"]),
    ({"learner": {"ranks": 6, "ranksPerPod": 4}}, ["learner.ranks is 6", "4 ranks per pod"]),
    ({"rollout": {"autoscaling": {"enabled": True, "minReplicas": 9, "maxReplicas": 3}}}, ["rollout.autoscaling", "9", "3"]),
    ({"serviceAccount": {"create": False, "name": "a", "annotations": {"a": "b"}}}, ["serviceAccount.annotations", "create is false"]),
    ({"networkPolicy": {"egressPorts": [70000]}}, ["/networkPolicy/egressPorts/0"]),
    ({"metrics": {"podMonitor": {"interval": "often"}}}, ["/metrics/podMonitor/interval"]),
]


class WrongValues(unittest.TestCase):
    def test_invalid_values_are_refused_with_path_and_reason(self):
        render(GOOD)
        for values, words in WRONG:
            with self.subTest(values=values):
                with self.assertRaises((helm_python.HelmValuesError, helm_python.HelmRenderError)) as caught:
                    render(merged(GOOD, values))
                message = str(caught.exception)
                for word in words:
                    self.assertIn(word, message)

    def test_schema_and_defaults_have_the_same_keys(self):
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


if __name__ == "__main__":
    unittest.main()
