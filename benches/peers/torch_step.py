"""Measures whole training steps of one preset in PyTorch and prints one JSON line.

    torch_step.py PRESET [--threads N] [--steps N] [--seconds S] [--hidden-size H] [--seq-len T]

The protocol is that of `lockstep bench step`: random batches in memory taken in turn, 8 steps to warm up, then at least
STEPS steps and SECONDS seconds (2000 steps at most), each timed alone. A step is forward, cross-entropy, backward,
clipping by the global norm at 5, and Adam, in f32. Characters enter one-hot, images row by row.
"""

import time

STARTED = time.perf_counter()

import argparse
import json
import os
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


def arguments():
    parser = argparse.ArgumentParser(description="one PyTorch measurement, one JSON line")
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60, help="time at least this many steps")
    parser.add_argument("--seconds", type=float, default=6.0, help="go on for at least this long")
    parser.add_argument("--hidden-size", type=int, help="instead of the preset's")
    parser.add_argument("--seq-len", type=int, help="instead of the preset's, of characters")
    return parser.parse_args()


def trainer(args):
    """The network of a preset with its data, as a function that does the step of a number and gives the loss."""
    import torch
    from torch import nn
    from torch.nn import functional

    torch.manual_seed(1)
    cell, layers, hidden, width, steps, rows, classes, kind = PRESETS[args.preset]
    hidden, steps = args.hidden_size or hidden, args.seq_len or steps

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = getattr(nn, cell)(width, hidden, layers, batch_first=True)
            self.head = nn.Linear(hidden, classes)

        def forward(self, x):
            if kind == CHARACTERS:
                return self.head(self.rnn(functional.one_hot(x, width).float())[0]).flatten(0, 1)
            return self.head(self.rnn(x)[0][:, -1])

    if kind == CHARACTERS:
        text = torch.randint(width, (BATCHES, rows, steps + 1))
        inputs, targets = text[:, :, :-1].contiguous(), text[:, :, 1:].contiguous()
    else:
        inputs = torch.randint(256, (BATCHES, rows, steps, width)).float() / 255
        targets = torch.randint(classes, (BATCHES, rows))
    network = Network()
    adam = torch.optim.Adam(network.parameters(), LEARNING_RATE)

    def step(number):
        logits = network(inputs[number % BATCHES])
        loss = functional.cross_entropy(logits, targets[number % BATCHES].flatten())
        adam.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)
        adam.step()
        return loss.item()

    return step


def measure(args):
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(args.threads)
    import torch

    torch.set_num_threads(args.threads)
    step = trainer(args)
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
        "peer": f"torch {torch.__version__}",
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


if __name__ == "__main__":
    print(json.dumps(measure(arguments())))
