"""Measures characters per second of one text that goes on in PyTorch and prints one JSON line.

    torch_sample.py [--form layers|cells] [--threads N] [--seconds S]

char-lstm's network with random weights: LSTM 2x128, 65 characters, one row, one character at a time. The next one is
drawn from the softmax of logits / 0.7 and read back, as a program that shows it would have to. The network is one
nn.LSTM, or two nn.LSTMCell: these do without what oneDNN prepares for a sequence anew in each call.
"""

import argparse
import json
import os
import time

HIDDEN_SIZE, CHARACTERS = 128, 65
TEMPERATURE = 0.7
WARM_UP = 1000
STRETCH = 100


def main():
    parser = argparse.ArgumentParser(description="characters per second of a PyTorch loop, one JSON line")
    parser.add_argument("--form", choices=("layers", "cells"), default="layers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="go on for at least this long")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(args.threads)
    import torch
    from torch import nn

    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    head = nn.Linear(HIDDEN_SIZE, CHARACTERS).eval()

    if args.form == "layers":
        rnn = nn.LSTM(CHARACTERS, HIDDEN_SIZE, 2).eval()

        def read(x, state):
            outputs, state = rnn(x[None], state)
            return outputs[0], state

    else:
        cells = [nn.LSTMCell(width, HIDDEN_SIZE).eval() for width in (CHARACTERS, HIDDEN_SIZE)]

        def read(x, states):
            after = []
            for cell, before in zip(cells, states or (None, None)):
                after.append(cell(x, before))
                x = after[-1][0]
            return x, after

    one_hot, text, state = torch.eye(CHARACTERS).view(CHARACTERS, 1, CHARACTERS), [0], None
    with torch.inference_mode():

        def go_on(count):
            nonlocal state
            for _ in range(count):
                h, state = read(one_hot[text[-1]], state)
                probabilities = torch.softmax(head(h) / TEMPERATURE, 1)
                text.append(torch.multinomial(probabilities, 1).item())

        go_on(WARM_UP)
        before, started = len(text), time.perf_counter()
        while time.perf_counter() - started < args.seconds:
            go_on(STRETCH)
        characters, seconds = len(text) - before, time.perf_counter() - started
    result = {
        "peer": f"torch {torch.__version__}",
        "form": args.form,
        "threads": args.threads,
        "characters": characters,
        "characters_per_second": round(characters / seconds),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
