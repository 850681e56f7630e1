"""Values with which the tests render the chart."""
from chart import SHAPES, merged, values_of

#: The required values.
GOOD = {"objectStore": {"url": "s3://b/p"}, "auth": {"existingSecret": "unveil-token"}}
#: All optional features that the values files do not use.
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
    """Returns (name, values): each shape, a shape with another endpoint, all features together, and the minimum."""
    out = [(name, values_of(name)) for name in SHAPES]
    out.append(("one-gpu+s3-endpoint", values_of("one-gpu", "s3-endpoint")))
    out.append(("everything", merged(values_of("cpu-demo", "s3-endpoint"), EVERYTHING)))
    bare = {"stage1": {"enabled": False}, "reward": {"enabled": False}, "networkPolicy": {"enabled": False}, "serviceAccount": {"create": False}}
    out.append(("bare", merged(merged(GOOD, {"config": '[reward]\naddress = "http://scores:7071"\n'}), bare)))
    return out
