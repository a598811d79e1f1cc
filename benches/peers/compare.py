"""Times Lockstep's training step beside PyTorch's: processes in turn, the ratios of neighbours, and their median.

    cargo build --release -p lockstep-benches
    compare.py --python PYTHON_WITH_TORCH [--pairs 20] [PRESET ...]

One round runs lockstep-step and torch_step.py, one after the other, for every preset; what else the machine does then
falls on both alike. A pair's ratio is ours / peer's of the two processes' medians: below 1 we are faster. Reported are
the medians over all processes, the median of the ratios, and a sign-test interval for that median: the k-th smallest
to the k-th largest ratio, with the largest k that still covers it with 95 %. Fewer than six pairs cannot give 95 %;
then it is the smallest to the largest ratio with the coverage these have. No shape of the distribution is assumed.

Where cores are shared, threads that spin at barriers suffer more from a neighbour than threads that sleep, and a ratio
measured under load says more about that than about the step: --calm 0.1 counts only the pairs that had the machine to
themselves. The rule looks at the others' processor time, never at the result.
"""

import argparse
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time

PRESETS = ("char-lstm", "char-gru", "char-lstm-512", "mnist-rnn", "mnist-lstm", "mnist-gru")
HERE = pathlib.Path(__file__).resolve().parent
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", HERE.parent.parent / "target"))


def arguments():
    parser = argparse.ArgumentParser(description="Lockstep's step beside PyTorch's, in turn")
    parser.add_argument("presets", nargs="*", default=PRESETS, metavar="PRESET", help="default: all six")
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has PyTorch")
    parser.add_argument("--binary", default=TARGET / "release" / "lockstep-step", help="our release build")
    parser.add_argument("--pairs", type=int, default=20, help="rounds over all presets")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing after this long")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20, help="steps a process times at least")
    parser.add_argument("--seconds", type=float, default=2.0, help="and how long at least")
    parser.add_argument("--malloc", choices=("default", "tuned", "both"), default="both", help="the peer's allocator")
    parser.add_argument("--calm", type=float, default=math.inf, help="leave out pairs while others used more cores")
    parser.add_argument("--json", metavar="FILE", help="append one JSON line per process")
    args = parser.parse_args()
    unknown = set(args.presets) - set(PRESETS)
    if unknown:
        parser.error(f"unknown preset {', '.join(sorted(unknown))}; known: {', '.join(PRESETS)}")
    return args


def contestants(args):
    """What runs in one round, by name: ours and the peers, as a function from preset to command."""
    protocol = ["--threads", str(args.threads), "--steps", str(args.steps), "--seconds", str(args.seconds)]
    script = str(HERE / "torch_step.py")
    peer = lambda malloc: lambda preset: [args.python, script, preset, "--malloc", malloc, *protocol]
    commands = {"ours": lambda preset: [str(args.binary), preset, "--clip", "global", *protocol]}
    for malloc in ("default", "tuned"):
        if args.malloc in (malloc, "both"):
            commands[f"torch, {malloc} malloc"] = peer(malloc)
    return commands


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


def run(command):
    """One process's JSON line, with the number of cores that everybody else used meanwhile."""
    before, started = machine_seconds(), time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        sys.exit(f"error: cannot start {command[0]}: {error.strerror}\nhint: name it with --binary or --python")
    if done.returncode != 0:
        sys.exit(f"error: {command[0]} ended with {done.returncode}: {done.stderr.strip()[-400:]}")
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


def table(results, names, calm=math.inf):
    """A Markdown table, a row per preset and peer, over the pairs during which others used `calm` cores at most."""
    rows = [
        "| preset | ours, ms | peer | peer, ms | ours / peer | interval of the median | pairs |",
        "|---|---|---|---|---|---|---|",
    ]
    ours, *peers = names
    for preset, by_name in results.items():
        for peer in peers:
            measured = list(zip(by_name[ours], by_name[peer]))
            pairs = [pair for pair in measured if all(side.get("other_cores", 0) <= calm for side in pair)]
            if not pairs:
                rows.append(f"| {preset} | – | {peer} | – | – | – | 0 of {len(measured)} |")
                continue
            ratios = [our["ms_med"] / their["ms_med"] for our, their in pairs]
            low, high, coverage = sign_test_interval(ratios)
            mine, theirs = (statistics.median(side["ms_med"] for side in sides) for sides in zip(*pairs))
            rows.append(
                f"| {preset} | {mine:.2f} | {peer} | {theirs:.2f} | {statistics.median(ratios):.3f} "
                f"| {low:.3f}–{high:.3f} ({100 * coverage:.0f} %) | {len(pairs)} of {len(measured)} |"
            )
    return "\n".join(rows)


def record(path, result):
    """Appends to the file, if there is one, and says on standard error what was measured."""
    if path:
        with open(path, "a") as file:
            file.write(json.dumps(result) + "\n")
    others = f"others used {result['other_cores']} cores" if "other_cores" in result else ""
    print(result["round"], result["preset"], result["name"], f"{result['ms_med']} ms,", others, file=sys.stderr)


def main():
    args, started = arguments(), time.monotonic()
    commands = contestants(args)
    results = {preset: {name: [] for name in commands} for preset in args.presets}
    for number in range(args.pairs):
        for preset in args.presets:
            if time.monotonic() - started > 60 * args.minutes:
                break
            for name, command in commands.items():
                result = run(command(preset))
                results[preset][name].append(result)
                record(args.json, {"round": number, "name": name, **result})
    everything = [result for by_name in results.values() for side in by_name.values() for result in side]
    others = [result["other_cores"] for result in everything if "other_cores" in result]
    print(table(results, list(commands), args.calm))
    if others:
        print(f"\n{args.threads} threads; all else on the machine used {statistics.median(others)} cores (median).")


if __name__ == "__main__":
    main()
