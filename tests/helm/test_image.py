"""Tests of the Dockerfile: pinned versions, user, shell syntax, agreement with the chart and with the setup of a checkout."""
import pathlib
import re
import subprocess
import sys
import unittest

from chart import ROOT, VALUES, containers, pods, render, values_of

DOCKER = ROOT / "cluster/docker"
sys.path.insert(0, str(DOCKER))
import dockerfile  # noqa: E402

IMAGES = ("unveil", "unveil-reward")
PINNED = re.compile(r"^[a-z0-9./-]+(:\d+\.\d+(\.\d+)?[0-9A-Za-z.-]*|@sha256:[0-9a-f]{64})$")
SECRETIVE = re.compile(r"secret|token|passw|credential|[_-]key\b", re.I)


def faults(stages):
    """Yields the problems of a Dockerfile."""
    names = {s.name for s in stages}
    by_name = {s.name: s for s in stages}
    for s in stages:
        if s.base not in names and not PINNED.match(s.base):
            yield f"{s.name}: {s.base} is not pinned"
        for kind, arguments in s.steps:
            if kind in ("ARG", "ENV") and SECRETIVE.search(arguments):
                yield f"{s.name}: {kind} {arguments} may hold a secret"
            if kind == "ADD":
                yield f"{s.name}: ADD fetches and unpacks: use COPY"
            if kind == "COPY" and (source := re.search(r"--from=(\S+)", arguments)) and source[1] not in names:
                yield f"{s.name}: copies from {source[1]}, which does not exist"
            if kind == "RUN" and subprocess.run(["sh", "-n", "-c", arguments], capture_output=True).returncode:
                yield f"{s.name}: invalid shell syntax: `{arguments}`"
            if kind == "RUN" and "apt-get install" in arguments and "rm -rf /var/lib/apt/lists" not in arguments:
                yield f"{s.name}: package lists stay in the image"
            if kind == "RUN" and re.search(r"curl|wget|git clone", arguments):
                yield f"{s.name}: fetches something unpinned: {arguments}"
            for package in re.findall(r"pip install .*", arguments) if kind == "RUN" else ():
                if not re.search(r"==\d", package):
                    yield f"{s.name}: {package} is not pinned"
    for name in IMAGES:
        s = by_name.get(name)
        if s is None:
            yield f"there is no stage {name}"
            continue
        user = s.all("USER")
        if not user or user[-1].split(":")[0] in ("root", "0"):
            yield f"{name}: runs as root"
        if s.steps.index(("USER", user[-1])) < max(i for i, (k, _) in enumerate(s.steps) if k in ("COPY", "RUN")) if user else False:
            yield f"{name}: is written by its own user"
        if not s.all("HEALTHCHECK"):
            yield f"{name}: no health command"
        labels = " ".join(s.all("LABEL") + by_name[s.base].all("LABEL"))
        for key in ("title", "description", "licenses", "version", "revision", "base.name"):
            if f"org.opencontainers.image.{key}=" not in labels:
                yield f"{name}: no label {key}"


class Image(unittest.TestCase):
    def test_the_dockerfile_follows_the_rules(self):
        self.assertEqual(list(faults(dockerfile.read())), [])

    def test_each_rule_detects_its_violation(self):
        text = (DOCKER / "Dockerfile").read_text()
        breaks = {
            "is not pinned": ("debian:12.12-slim AS base", "debian:latest AS base"),
            "torch is not pinned": ("torch==2.11.0", "torch"),
            "runs as root": ("USER 10001:10001", "USER root"),
            "may hold a secret": ("ARG REVISION=unknown", "ARG REGISTRY_TOKEN"),
            "ADD fetches": ("COPY . .", "ADD . ."),
            "which does not exist": ("--from=build-reward", "--from=nothing"),
            "invalid shell syntax": ("RUN unveil --version &&", "RUN unveil --version && ("),
            "package lists stay": (" && rm -rf /var/lib/apt/lists/*", ""),
            "no health command": ("HEALTHCHECK", "STOPSIGNAL"),
            "no label revision": ("image.revision", "image.rev"),
        }
        for words, (now, then) in breaks.items():
            with self.subTest(words):
                self.assertIn(now, text)
                path = pathlib.Path(self.enterContext(__import__("tempfile").TemporaryDirectory()), "Dockerfile")
                path.write_text(text.replace(now, then))
                found = list(faults(dockerfile.read(path)))
                self.assertTrue(any(words in line for line in found), found)

    def test_versions_equal_those_of_a_checkout(self):
        recipe = " ".join(line for s in dockerfile.read() for line in s.all("RUN"))
        setup = (ROOT / ".ci/setup").read_text()
        for package, variable in (("torch", "torch_version"), ("nvidia-cuda-crt", "cuda_crt")):
            self.assertIn(f"{package}=={re.search(rf'^{variable}=(.*)$', setup, re.M)[1]}", recipe)
        rust = re.search(r'rust-version = "([\d.]+)"', (ROOT / "Cargo.toml").read_text())[1]
        self.assertTrue(dockerfile.read()[0].base.split(":")[1].startswith(rust), rust)

    def test_the_chart_runs_programs_of_the_images(self):
        stages = {s.name: s for s in dockerfile.read()}
        user = stages["unveil"].all("USER")[-1].split(":")
        holds = {name: set(re.findall(r"/release/(\S+)", " ".join(stages[name].all("COPY")))) for name in IMAGES}
        for _, _, spec in pods(render(values_of("cpu-demo"))):
            self.assertEqual([str(spec["securityContext"][k]) for k in ("runAsUser", "runAsGroup")], user)
            for c, _ in containers(spec):
                image, command = c["image"].split(":")[0], c["command"]
                program = re.search(r"exec (\S+)", command[-1])[1] if command[0] == "/bin/sh" else command[0]
                self.assertIn(program, holds[image], c["name"])

    def test_values_and_chart_have_the_same_version(self):
        versions = {re.search(r'^version = "(.*)"', (ROOT / "Cargo.toml").read_text(), re.M)[1]}
        chart = (ROOT / "cluster/helm/unveil/Chart.yaml").read_text()
        versions |= {re.search(rf"^{key}: (.*)$", chart, re.M)[1] for key in ("version", "appVersion")}
        versions |= {v["image"]["tag"] for v in map(values_of, VALUES) if "image" in v}
        versions |= set(re.findall(r"ARG VERSION=(.*)", (DOCKER / "Dockerfile").read_text()))
        self.assertEqual(len(versions), 1, versions)


if __name__ == "__main__":
    unittest.main()
