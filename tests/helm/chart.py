"""The chart as Helm's own engine renders it, and the parts of what comes out. Must not know: what is right or wrong about them."""
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
#: Those with a run beside them; the others are laid over one of these.
SHAPES = [name for name, path in VALUES.items() if path.with_suffix(".toml").exists()]
RELEASE, NAMESPACE = "demo", "med"


class Strict(yaml.SafeLoader):
    """Refuses a key that is given twice, which YAML libraries let pass and Kubernetes does not."""


def _mapping(loader, node):
    seen = [key.value for key, _ in node.value]
    twice = {key for key in seen if seen.count(key) > 1}
    if twice:
        raise yaml.YAMLError(f"keys given twice: {sorted(twice)}{node.start_mark}")
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def submit(*arguments, folder="/"):
    """`unveil submit kubernetes`, where helm is not installed."""
    command = [os.environ["UNVEIL"], "submit", "kubernetes", *arguments]
    return subprocess.run(command, env=os.environ | {"PATH": "/nowhere"}, cwd=folder, capture_output=True, text=True)


@functools.cache
def _generated(path):
    done = submit("--dry-run", "--config", path)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def values_of(*names):
    """What `submit` makes of the run beside the first values file, and the files laid over it one after the other."""
    run = VALUES[names[0]].with_suffix(".toml")
    out = _generated(run) if run.exists() else {}
    for name in names:
        out = merged(out, yaml.safe_load(VALUES[name].read_text()))
    return out


def merged(base, over):
    """Maps are joined, everything else is replaced."""
    out = copy.deepcopy(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merged(out[key], value) if both else copy.deepcopy(value)
    return out


def files(values):
    """Rendered text by template."""
    with helm_python.Chart.load(CHART) as chart:
        return chart.render(values=values, name=RELEASE, namespace=NAMESPACE)


def render(values):
    """The objects, in the order of their templates; the notes are none."""
    text = files(values)
    documents = (d for name in sorted(text) if name.endswith(".yaml") for d in yaml.load_all(text[name], Strict))
    return [d for d in documents if d]


def named(documents, kind, end=""):
    """The one object of that kind whose name ends so."""
    found = [d for d in documents if d["kind"] == kind and d["metadata"]["name"].endswith(end)]
    assert len(found) == 1, f"{kind} …{end}: {[d['metadata']['name'] for d in found]}"
    return found[0]


def job(documents, role):
    """The Job of a role."""
    found = [d for d in documents if d["kind"] == "Job" and d["metadata"]["labels"]["app.kubernetes.io/component"] == role]
    assert len(found) == 1, f"Jobs of {role}: {len(found)}"
    return found[0]


def pods(documents):
    """(what it is called, labels, pod specification) of everything that runs."""
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
    """(container, whether it is an init container)."""
    return [(c, True) for c in spec.get("initContainers", [])] + [(c, False) for c in spec["containers"]]


def environment(documents, container):
    """Variables with plain values, those of ConfigMaps first, as the kubelet sets them."""
    maps = {d["metadata"]["name"]: d["data"] for d in documents if d["kind"] == "ConfigMap"}
    out = {}
    for source in container.get("envFrom", []):
        out.update(maps[source["configMapRef"]["name"]] if "configMapRef" in source else {})
    out.update({e["name"]: e["value"] for e in container.get("env", []) if "value" in e})
    return out
