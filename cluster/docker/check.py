#!/usr/bin/env python3
"""Runs the RUN lines of the Dockerfile without Docker and an image registry: as root, in a minimal Debian made by debootstrap.

Prints for each line whether it is run unchanged, run with changes, or not run; exits with 1 if a line fails. The lines of the images are run
first. Then the built programs are started in that root, which has the same content as an image, as the user of the image and with a
read-only root file system. The lines of the build stages are run last.
usage: check.py [--programs DIR]   DIR contains `unveil-reward` and optionally `unveil` (target/debug)
"""
import argparse
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile

from dockerfile import read

DEBIAN = "bookworm"
#: Lines that are not run unchanged: a pattern, the reason, and the replacement (empty: not run).
REPLACEMENTS = [
    (r"cargo build.*", "needs the Rust image and many minutes", ""),
    (r"(.* -m pip) install .* (\S+)==(\S+)", "gigabytes: only checked in the index", r"\1 index versions \2 | grep -wF \3"),
    (r"VENV=/opt/torch .ci/setup", "needs torch, which is not installed here; every fresh checkout runs it", ""),
    (r"unveil --version.*", "run below, with the built programs", ""),
]
USER = "10001:10001"
#: Path in the root of this machine's trusted certificate authorities, apart from the packages.
AUTHORITIES = "/opt/machine-authorities.crt"


def inside(root, line, libraries=(), user=None):
    """Runs a shell line in the root, in separate mount and process namespaces. With a user, the root file system is read-only."""
    at = shlex.quote(str(root))
    script = [f"mount --bind {at} {at}", f"mount -t proc proc {at}/proc", f"mount --rbind /dev {at}/dev"]
    script += [f"mount --rbind {shlex.quote(str(path))} {at}{shlex.quote(str(path))}" for path in libraries]
    if user:
        script += [f"mount -t tmpfs tmpfs {at}/tmp", f"mount -o remount,bind,ro {at}"]
    who = ["--userspec", user] if user else []
    script.append(shlex.join(["chroot", *who, str(root), "/bin/sh", "-c", line]))
    environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/tmp", "DEBIAN_FRONTEND": "noninteractive"}
    network = {k: v for k, v in os.environ.items() if k.startswith("PIP_") or k.lower().endswith("_proxy")}
    network |= {k: AUTHORITIES for k in ("PIP_CERT", "SSL_CERT_FILE")}
    command = ["unshare", "--mount", "--pid", "--fork", "/bin/sh", "-ec", "\n".join(script)]
    return subprocess.run(command, env=environment | network, capture_output=True, text=True)


def debian(root):
    """Creates a minimal Debian with this machine's mirrors and certificate authorities."""
    mirror = next(iter(os.environ.get("UNVEIL_DEBIAN_MIRROR", "").split()), "http://deb.debian.org/debian")
    subprocess.run(["debootstrap", "--variant=minbase", DEBIAN, root, mirror], check=True, stdout=subprocess.DEVNULL)
    for path in ("/etc/apt/sources.list", "/etc/apt/sources.list.d", "/etc/apt/apt.conf.d", "/etc/pip.conf", "/etc/resolv.conf"):
        source, target = pathlib.Path(path), root / path[1:]
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        elif source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    shutil.copy("/etc/ssl/certs/ca-certificates.crt", root / AUTHORITIES[1:])


def lines(root, stages):
    """Runs the RUN lines of stages and returns whether all succeeded."""
    good, done = True, set()
    for stage in stages:
        for line in stage.all("RUN"):
            why, change = next(((why, m.expand(to)) for p, why, to in REPLACEMENTS if (m := re.fullmatch(p, line))), ("", line))
            if line in done:
                continue
            done.add(line)
            if change == "":
                print(f"not run   {stage.name}: {line}\n          ({why})")
                continue
            ended = inside(root, change)
            word = "failed" if ended.returncode else "unchanged" if change == line else "changed"
            print(f"{word:9} {stage.name}: {line}" + (f"\n          ({why})" if why else ""), flush=True)
            if ended.returncode:
                print(ended.stdout[-2000:] + ended.stderr[-2000:])
                good = False
    return good


def programs(root, folder):
    """Starts the programs as in the image: as its user, with only /tmp writable."""
    good = True
    for name in ("unveil-reward", "unveil"):
        program = folder / name
        if not program.exists():
            print(f"not run   {program} is not built")
            continue
        shutil.copy(program, root / "usr/local/bin" / name)
        found = subprocess.run(["ldd", program], capture_output=True, text=True).stdout
        torch = {pathlib.Path(w).parents[2] for w in found.split() if w.endswith("/torch/lib/libtorch_cpu.so")}
        for path in torch:
            (root / str(path)[1:]).mkdir(parents=True, exist_ok=True)
        ended = inside(root, f"{name} --version && id -u && ! touch /usr/x 2>/dev/null && touch /tmp/x", torch, USER)
        good &= ended.returncode == 0 and "10001" in ended.stdout
        print(f"{'failed' if ended.returncode else 'started':9} {name}: {(ended.stdout + ended.stderr).split()}")
    return good


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--programs", type=pathlib.Path)
    folder = arguments.parse_args().programs
    if os.geteuid() != 0 or not shutil.which("debootstrap"):
        sys.exit("check: needs root and debootstrap (apt-get install debootstrap)")
    with tempfile.TemporaryDirectory(prefix="unveil-image-") as name:
        root = pathlib.Path(name, "root")
        debian(root)
        stages = read()
        images = {s.name for s in stages if s.all("USER")} | {s.base for s in stages if s.all("USER")}
        good = lines(root, [s for s in stages if s.name in images])
        if folder:
            good &= programs(root, folder.resolve())
        good &= lines(root, [s for s in stages if s.name not in images])
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
