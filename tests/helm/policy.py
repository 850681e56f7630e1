"""Rules for every rendered chart. Each rule yields its violations as lines."""
import re

from chart import containers, pods

PINNED = re.compile(r"^[a-z0-9][a-z0-9._:/-]*(:v?\d+\.\d+\.\d+[0-9A-Za-z.+-]*|:[0-9a-f]{7,40}|@sha256:[0-9a-f]{64})$")
SECRETIVE = re.compile(r"(secret|token|passw|credential|(^|_)key$)", re.I)
WRITABLE = {"emptyDir"}
READ_ONLY = {"configMap", "secret", "projected", "downwardAPI", "image"}


def faults(documents):
    """Returns the violations of all rules."""
    return [line for rule in (security, images, resources, probes, volumes, secrets, references, networks, monitors) for line in rule(documents)]


def security(documents):
    """The restricted profile of the pod security standards, and a read-only root file system."""
    for name, _, spec in pods(documents):
        pod = spec.get("securityContext", {})
        for key in ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"):
            if spec.get(key):
                yield f"{name}: {key}"
        if pod.get("runAsNonRoot") is not True or not pod.get("runAsUser") or not pod.get("runAsGroup"):
            yield f"{name}: may run as root"
        if pod.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{name}: no seccomp profile"
        if spec.get("automountServiceAccountToken") is not False:
            yield f"{name}: gets the API's token"
        for c, _ in containers(spec):
            own, at = c.get("securityContext", {}), f"{name}, {c['name']}"
            if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
                yield f"{at}: privileges"
            if own.get("readOnlyRootFilesystem") is not True:
                yield f"{at}: writable root file system"
            if own.get("capabilities") != {"drop": ["ALL"]}:
                yield f"{at}: capabilities"
            if own.get("runAsUser") == 0 or own.get("runAsNonRoot") is False:
                yield f"{at}: root"


def images(documents):
    """No mutable image tags."""
    for name, _, spec in pods(documents):
        for c, _ in containers(spec):
            if not PINNED.match(c["image"]):
                yield f"{name}, {c['name']}: image {c['image']} is not pinned"


def resources(documents):
    """Requests and limits of CPU and memory; extended resources (GPUs) have an equal limit or none."""
    for name, _, spec in pods(documents):
        for c, _ in containers(spec):
            for side in ("requests", "limits"):
                missing = {"cpu", "memory"} - set(c.get("resources", {}).get(side, {}))
                if missing:
                    yield f"{name}, {c['name']}: no {side} of {sorted(missing)}"


def probes(documents):
    """gRPC start-up, liveness and readiness probes at a declared port for all workloads except test pods, which end by themselves."""
    for name, labels, spec in pods(documents):
        if labels["app.kubernetes.io/component"] == "test":
            continue
        for c, init in containers(spec):
            ports = {p["containerPort"] for p in c.get("ports", [])}
            for probe in () if init else ("startupProbe", "livenessProbe", "readinessProbe"):
                found = c.get(probe, {}).get("grpc", {})
                if found.get("port") not in ports:
                    yield f"{name}, {c['name']}: no {probe} at one of its ports"
                if (found.get("service") == "ready") != (probe == "readinessProbe"):
                    yield f"{name}, {c['name']}: {probe} asks for the wrong service"
        taken = [p["containerPort"] for c in spec["containers"] for p in c.get("ports", [])]
        if len(taken) != len(set(taken)):
            yield f"{name}: containers of one pod share its ports: {taken}"


def volumes(documents):
    """Writable volumes belong to one pod and have a size limit; all others are mounted read-only."""
    for name, _, spec in pods(documents):
        kinds = {}
        for v in spec.get("volumes", []):
            kind, source = next((k, s) for k, s in v.items() if k != "name")
            kinds[v["name"]] = kind
            shared = kind in ("persistentVolumeClaim", "csi") and source.get("readOnly") is not True
            if shared or kind not in WRITABLE | READ_ONLY | {"persistentVolumeClaim", "csi"}:
                yield f"{name}: volume {v['name']} ({kind}) could be written by several pods"
            if kind == "emptyDir" and not source.get("sizeLimit"):
                yield f"{name}: volume {v['name']} has no limit"
        for c, _ in containers(spec):
            for m in c.get("volumeMounts", []):
                if m["name"] not in kinds:
                    yield f"{name}, {c['name']}: mounts {m['name']}, which does not exist"
                elif kinds[m["name"]] not in WRITABLE and m.get("readOnly") is not True:
                    yield f"{name}, {c['name']}: mounts {m['name']} writable"
            paths = [m["mountPath"] for m in c.get("volumeMounts", [])]
            if len(paths) != len(set(paths)):
                yield f"{name}, {c['name']}: a path is mounted twice: {paths}"


def secrets(documents):
    """Secrets are referenced, never contained."""
    for d in documents:
        if d["kind"] == "Secret":
            yield f"Secret {d['metadata']['name']}: the chart must not create secrets"
        for key, value in (d.get("data") or {}).items() if d["kind"] == "ConfigMap" else ():
            if SECRETIVE.search(key) and value and not key.endswith("_ENV"):
                yield f"ConfigMap {d['metadata']['name']}: {key} holds a value"
    for name, _, spec in pods(documents):
        for c, _ in containers(spec):
            for e in c.get("env", []):
                path = str(e.get("value", "")).startswith("/")
                if SECRETIVE.search(e["name"]) and "value" in e and not path:
                    yield f"{name}, {c['name']}: {e['name']} holds a value"


def references(documents):
    """References between objects resolve: accounts, ConfigMaps, ports, targets, labels."""
    names = {(d["kind"], d["metadata"]["name"]) for d in documents}
    everywhere = pods(documents)
    for d in documents:
        if not d["metadata"].get("labels", {}).get("app.kubernetes.io/instance"):
            yield f"{d['kind']} {d['metadata']['name']}: no labels"
        if len(d["metadata"]["name"]) > 63:
            yield f"{d['kind']} {d['metadata']['name']}: the name is too long"
        if d["kind"] == "HorizontalPodAutoscaler":
            target = d["spec"]["scaleTargetRef"]
            if (target["kind"], target["name"]) not in names:
                yield f"{d['metadata']['name']}: scales {target['name']}, which does not exist"
            scaled = [x for x in documents if (x["kind"], x["metadata"]["name"]) == (target["kind"], target["name"])]
            if any("replicas" in x["spec"] for x in scaled):
                yield f"{d['metadata']['name']}: an upgrade would undo what it scaled"
        selector = {"Service": lambda s: s["selector"], "PodDisruptionBudget": lambda s: s["selector"]["matchLabels"]}.get(d["kind"])
        if selector:
            wanted = dict(selector(d["spec"]))
            wanted.pop("batch.kubernetes.io/job-completion-index", None)
            chosen = [spec for _, labels, spec in everywhere if wanted.items() <= labels.items()]
            if len(chosen) != 1:
                yield f"{d['kind']} {d['metadata']['name']}: selects {len(chosen)} kinds of pods"
            ports = {p["containerPort"] for spec in chosen for c in spec["containers"] for p in c.get("ports", [])}
            for port in d["spec"].get("ports", []):
                if port["targetPort"] not in ports:
                    yield f"Service {d['metadata']['name']}: no container listens on {port['targetPort']}"
    made = {d["spec"]["secretName"] for d in documents if d["kind"] == "Certificate"}
    for name, _, spec in everywhere:
        for v in spec.get("volumes", []):
            secret = v.get("secret", {}).get("secretName", "")
            if made and v["name"] == "tls" and secret not in made:
                yield f"{name}: no certificate creates the secret {secret}"
        account = spec.get("serviceAccountName")
        if account and account != "default" and any(k == "ServiceAccount" for k, _ in names) and ("ServiceAccount", account) not in names:
            yield f"{name}: account {account} does not exist"
        maps = [s["configMapRef"]["name"] for c, _ in containers(spec) for s in c.get("envFrom", []) if "configMapRef" in s]
        maps += [v["configMap"]["name"] for v in spec.get("volumes", []) if v["name"] == "config"]
        for m in maps:
            if ("ConfigMap", m) not in names:
                yield f"{name}: ConfigMap {m} does not exist"


def networks(documents):
    """Each role has its own network policy, if there are any."""
    policies = [d["spec"] for d in documents if d["kind"] == "NetworkPolicy"]
    for name, labels, _ in pods(documents) if policies else ():
        mine = [p for p in policies if p["podSelector"]["matchLabels"].items() <= labels.items()]
        if labels["app.kubernetes.io/component"] != "test" and len(mine) != 1:
            yield f"{name}: {len(mine)} network policies"
        for p in mine:
            if p["policyTypes"] != ["Ingress", "Egress"]:
                yield f"{name}: its network policy leaves a direction open"


def monitors(documents):
    """If pods are scraped, all pods with a metrics port are."""
    asked = {r["regex"] for d in documents if d["kind"] == "PodMonitor" for e in d["spec"]["podMetricsEndpoints"]
             for r in e["relabelings"] if r["action"] == "keep"}
    for name, labels, spec in pods(documents) if asked else ():
        has = any(p["name"] == "metrics" for c in spec["containers"] for p in c.get("ports", []))
        if has and labels["app.kubernetes.io/component"] not in asked:
            yield f"{name}: its metrics are not scraped"
