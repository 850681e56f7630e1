"""Rendering of the chart with Helm's engine, and access to the rendered objects."""
import copy
import functools
import os
import pathlib
import subprocess

import helm_python
import yaml

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
CHART = ROOT / "cluster/helm/unveil"
VALUES = {path.stem: path for path in sorted((CHART / "values").glob("*.yaml"))}
#: Values files with a run configuration; the others are used on top of one of these.
SHAPES = [name for name, path in VALUES.items() if path.with_suffix(".toml").exists()]
RELEASE, NAMESPACE = "demo", "med"


class Strict(yaml.CSafeLoader):
    """Loader that refuses duplicate keys, which YAML libraries accept and Kubernetes does not. libyaml is ten times as fast as Python."""


def _mapping(loader, node):
    seen = [key.value for key, _ in node.value]
    twice = {key for key in seen if seen.count(key) > 1}
    if twice:
        raise yaml.YAMLError(f"keys given twice: {sorted(twice)}{node.start_mark}")
    return yaml.CSafeLoader.construct_mapping(loader, node, deep=True)


Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def submit(*arguments, folder="/"):
    """Runs `unveil submit kubernetes` without helm."""
    command = [os.environ["UNVEIL"], "submit", "kubernetes", *arguments]
    return subprocess.run(command, env=os.environ | {"PATH": "/nowhere"}, cwd=folder, capture_output=True, text=True)


@functools.cache
def _generated(path):
    done = submit("--dry-run", "--config", path)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def values_of(*names):
    """Returns the values that `submit` generates for the run of the first values file, overlaid with all given files."""
    run = VALUES[names[0]].with_suffix(".toml")
    out = _generated(run) if run.exists() else {}
    for name in names:
        out = merged(out, yaml.safe_load(VALUES[name].read_text()))
    return out


def merged(base, over):
    """Merges maps recursively; other values are replaced."""
    out = copy.deepcopy(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merged(out[key], value) if both else copy.deepcopy(value)
    return out


def files(values):
    """Returns the rendered text by template."""
    with helm_python.Chart.load(CHART) as chart:
        return chart.render(values=values, name=RELEASE, namespace=NAMESPACE)


def render(values):
    """Returns the rendered objects in the order of their templates, without the notes."""
    text = files(values)
    documents = (d for name in sorted(text) if name.endswith(".yaml") for d in yaml.load_all(text[name], Strict))
    return [d for d in documents if d]


def named(documents, kind, end=""):
    """Returns the single object of a kind whose name has the given ending."""
    found = [d for d in documents if d["kind"] == kind and d["metadata"]["name"].endswith(end)]
    assert len(found) == 1, f"{kind} …{end}: {[d['metadata']['name'] for d in found]}"
    return found[0]


def job(documents, role):
    """Returns the Job of a role."""
    found = [d for d in documents if d["kind"] == "Job" and d["metadata"]["labels"]["app.kubernetes.io/component"] == role]
    assert len(found) == 1, f"Jobs of {role}: {len(found)}"
    return found[0]


def pods(documents):
    """Returns (name, labels, pod specification) of all workloads."""
    out = []
    for d in documents:
        name = f"{d['kind']} {d['metadata']['name']}"
        if d["kind"] == "Pod":
            out.append((name, d["metadata"]["labels"], d["spec"]))
        elif d["kind"] in ("Job", "Deployment"):
            template = d["spec"]["template"]
            out.append((name, template["metadata"]["labels"], template["spec"]))
    return out


def containers(spec):
    """Returns (container, whether it is an init container)."""
    return [(c, True) for c in spec.get("initContainers", [])] + [(c, False) for c in spec["containers"]]


def environment(documents, container):
    """Returns the variables with plain values in the order of the kubelet: ConfigMaps first."""
    maps = {d["metadata"]["name"]: d["data"] for d in documents if d["kind"] == "ConfigMap"}
    out = {}
    for source in container.get("envFrom", []):
        out.update(maps[source["configMapRef"]["name"]] if "configMapRef" in source else {})
    out.update({e["name"]: e["value"] for e in container.get("env", []) if "value" in e})
    return out
