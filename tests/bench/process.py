"""A measured program: reads one JSON command per line, replies with one JSON line, and waits for input in between."""

import json
import os
import subprocess
import time

from shapes import OUT, ROOT

TICKS = os.sysconf("SC_CLK_TCK")



class Child:
    """One side of a benchmark. Its messages are written to target/bench/logs/NAME.log."""

    def __init__(self, name, command, threads):
        logs = OUT / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        self.name, self.log = name, logs / f"{name}.log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [str(c) for c in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)})
        self.ready = self.answer()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()

    def ask(self, op, **args):
        """Runs one command and returns its reply."""
        try:
            self.process.stdin.write(json.dumps({"op": op, **args}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # answer() reports the failure
        return self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            tail = "".join(self.log.read_text().splitlines(True)[-15:])
            raise SystemExit(f"bench: {self.name} ended with {code}; the end of {self.log}:\n{tail}")
        reply = json.loads(line)
        if "error" in reply:
            raise SystemExit(f"bench: {self.name}: {reply['error']}")
        return reply

    def cpu_seconds(self):
        """Returns the CPU time of all threads so far."""
        fields = open(f"/proc/{self.process.pid}/stat").read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def peak_mib(self):
        """Returns the peak resident set size in MiB so far."""
        return status_mib(self.process.pid, "VmHWM")

    def resident_mib(self):
        """Returns the current resident set size in MiB."""
        return status_mib(self.process.pid, "VmRSS")


def status_mib(pid, field):
    """Returns a field of /proc/PID/status in MiB (the file has kB)."""
    for line in open(f"/proc/{pid}/status"):
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"bench: /proc/{pid}/status has no {field}")


class Quiet:
    """Waits until the machine is idle and checks that it stayed so, since other programs distort a turn."""

    def __init__(self, limit, patience=600.0):
        self.limit, self.patience, self.repeated = limit, patience, 0

    def turn(self, own, work):
        """Runs `work`, repeating it until other programs used at most `limit` cores on average; `own` returns our CPU time."""
        for _ in range(50):
            self.wait()
            busy, mine, start = busy_seconds(), own(), time.monotonic()
            out = work()
            others = busy_seconds() - busy - (own() - mine)
            if others <= self.limit * (time.monotonic() - start) + 2 / TICKS:
                return out
            self.repeated += 1
        raise SystemExit(f"bench: other programs use more than {self.limit} cores; stop them, or raise --others")

    def wait(self):
        """Waits for one second with the machine idle."""
        end = time.monotonic() + self.patience
        while time.monotonic() < end:
            busy = busy_seconds()
            time.sleep(1.0)
            if busy_seconds() - busy <= self.limit + 2 / TICKS:
                return
        raise SystemExit(f"bench: other programs use more than {self.limit} cores; stop them, or raise --others")


def busy_seconds():
    """Returns the CPU time of the whole machine so far, including time stolen by its host."""
    fields = [int(x) for x in open("/proc/stat").readline().split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / TICKS
