"""What `compare` and `sweep` share: programs that print one JSON line, run in turn, and statistics of their ratios."""

import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
PEERS = HERE / "peers"
LOCKSTEP = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", HERE.parent / "target")) / "release" / "lockstep"

# An allocator that keeps large blocks and reuses them instead of giving them back to the system in every step.
TUNED_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 26),
}


class Failed(Exception):
    """A program could not be started or did not end well."""


def allow_interrupts():
    """Lets Ctrl-C, or SIGINT, end the measurement with what was measured, also in the background of a script."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def machine_seconds():
    """Busy processor seconds of the machine less those of our finished children; None where the system is silent."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _idle, _wait, irq, softirq = map(int, file.readline().split()[1:8])
    except OSError:
        return None
    times = os.times()
    busy = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    return busy - times.children_user - times.children_system


def run(command, environment=None):
    """A program's last line as JSON, with the number of cores that everybody else used meanwhile."""
    words = [str(word) for word in command]
    before, started = machine_seconds(), time.monotonic()
    try:
        done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    except OSError as error:
        raise Failed(f"cannot start {words[0]}: {error.strerror}")
    if done.returncode != 0:
        raise Failed(f"{' '.join(words[:3])} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    if before is not None:
        others = (machine_seconds() - before) / (time.monotonic() - started)
        result["other_cores"] = max(0.0, round(others, 2))  # the two clocks tick apart by a little
    return result


def sign_test_interval(values, coverage=0.95):
    """The narrowest pair of order statistics, as far from both ends, that covers the median: (low, high, coverage)."""
    ordered, n = sorted(values), len(values)
    covered = lambda k: 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n
    k = max((k for k in range(1, n // 2 + 1) if covered(k) >= coverage), default=1)
    return ordered[k - 1], ordered[-k], max(covered(k), 0.0)


def say(*words):
    """Progress, on standard error."""
    print(*words, file=sys.stderr, flush=True)


def table(header, rows):
    """Markdown, with columns as wide as they need to be."""
    lines = [header, *rows]
    widths = [max(len(str(line[at])) for line in lines) for at in range(len(header))]
    shown = ["| " + " | ".join(str(cell).ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines]
    return "\n".join([shown[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *shown[1:]])
