"""What the peers in Python share: the presets, and how a step is measured; `measure.rs` has the same for those in Rust.

The protocol is that of `lockstep bench step`: random batches in memory taken in turn, 8 steps to warm up, then at least
STEPS steps and SECONDS seconds (2000 steps at most), each timed alone. Import this first: the clock starts here.
"""

import time

STARTED = time.perf_counter()

import argparse
import resource
import statistics

# preset: cell, layers, hidden width, input width, time steps, rows, classes
CHARACTERS, ROWS = "characters", "rows"
PRESETS = {
    "char-lstm": ("LSTM", 2, 128, 65, 50, 64, 65, CHARACTERS),
    "char-gru": ("GRU", 2, 128, 65, 50, 64, 65, CHARACTERS),
    "char-lstm-512": ("LSTM", 2, 512, 65, 100, 64, 65, CHARACTERS),
    "mnist-rnn": ("RNN", 1, 150, 28, 28, 150, 10, ROWS),
    "mnist-lstm": ("LSTM", 1, 150, 28, 28, 150, 10, ROWS),
    "mnist-gru": ("GRU", 1, 150, 28, 28, 150, 10, ROWS),
}
WARM_UP = 8
MOST_STEPS = 2000
BATCHES = 32
CLIP_NORM = 5.0
LEARNING_RATE = 1e-3


def parser(peer):
    """The arguments that all peers take."""
    arguments = argparse.ArgumentParser(description=f"one {peer} measurement, one JSON line")
    arguments.add_argument("preset", choices=PRESETS)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--steps", type=int, default=60, help="time at least this many steps")
    arguments.add_argument("--seconds", type=float, default=6.0, help="go on for at least this long")
    return arguments


def measure(args, peer, step):
    """What is reported of `step`, a function that does the step of a number and gives the loss."""
    loss = step(0)
    start_to_first_step = time.perf_counter() - STARTED
    for number in range(1, WARM_UP):
        step(number)
    times, warm = [], time.perf_counter()
    while len(times) < max(args.steps, 1) or (
        time.perf_counter() - warm < args.seconds and len(times) < MOST_STEPS
    ):
        start = time.perf_counter()
        loss = step(WARM_UP + len(times))
        times.append(1e3 * (time.perf_counter() - start))
    times.sort()
    return {
        "peer": peer,
        "preset": args.preset,
        "threads": args.threads,
        "batch_size": PRESETS[args.preset][5],
        "n": len(times),
        "ms_med": round(statistics.median(times), 3),
        "ms_min": round(times[0], 3),
        "ms_p90": round(times[-(-9 * len(times) // 10) - 1], 3),
        "ms_max": round(times[-1], 3),
        "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "start_to_first_step_s": round(start_to_first_step, 3),
        "loss": round(loss, 3),
    }
