#!/usr/bin/env python3
"""Trains lockstep's `text.mode = "lines"` in PyTorch and prints one JSON line per epoch.

    lines.py TEXT [--epochs N] [--seed N] [--learning-rate X] [--threads N]

The same data, network, batches and optimizer as

    lockstep train char-lstm --data TEXT --set text.mode=lines --set init=pytorch

Every line that is not empty is a sequence of its own: from the end of the line before it, over its characters, to its
own end. The last tenth of the lines is held out. One-hot characters, two layers of LSTM 128, a linear layer; batches of
64 lines of like length as packed sequences, so that nothing is padded and every line starts in the zero state. Adam,
gradients clipped at a global norm of 5. The random numbers are PyTorch's own.

Losses are nats per character: the sum over all characters, divided by their number.
"""

import argparse
import json
import pathlib
import random
import time

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_sequence

HIDDEN_SIZE, NUM_LAYERS = 128, 2
BATCH_SIZE = 64
# Lines are mixed within so many batches of like length.
POOL_BATCHES = 16
VALIDATION_FRACTION = 0.1
CLIP_NORM = 5.0


def arguments():
    parser = argparse.ArgumentParser(description="one PyTorch training over lines, one JSON line per epoch")
    parser.add_argument("text", type=pathlib.Path)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=0.002, help="default: the preset's, 0.002")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def read_lines(path):
    """The lines as tensors of tokens, each between the end of the line before it and its own; and how many tokens."""
    ends = [line.removesuffix("\r") for line in path.read_bytes().decode().split("\n")]
    texts = [f"\n{line}\n" for line in ends if line]
    vocabulary = {character: token for token, character in enumerate(sorted(set("".join(texts))))}
    return [torch.tensor([vocabulary[character] for character in text]) for text in texts], len(vocabulary)


def cut(lines):
    """What is learnt from, and what is held out."""
    count = int(len(lines) * (1.0 - VALIDATION_FRACTION))
    return lines[:count], lines[count:]


def pools(lines):
    """The lines by length, in pools of so many batches; the last has what is left besides."""
    lines = sorted(random.sample(lines, len(lines)), key=len)
    size = POOL_BATCHES * BATCH_SIZE
    starts = range(0, max(len(lines) // size, 1) * size, size)
    return [lines[start : start + size] for start in starts[:-1]] + [lines[starts[-1] :]]


def epoch_of(pools):
    """The batches of an epoch: each pool's lines in a new order, the batches of all pools in a random one."""
    batches = []
    for pool in pools:
        pool = random.sample(pool, len(pool))
        batches += [pool[at : at + BATCH_SIZE] for at in range(0, len(pool) - BATCH_SIZE + 1, BATCH_SIZE)]
    random.shuffle(batches)
    return batches


class Network(nn.Module):
    def __init__(self, tokens):
        super().__init__()
        self.tokens = tokens
        self.rnn = nn.LSTM(tokens, HIDDEN_SIZE, NUM_LAYERS)
        self.head = nn.Linear(HIDDEN_SIZE, tokens)

    def loss(self, batch):
        """The loss summed over all characters of a batch, and their number."""
        inputs = pack_sequence([line[:-1] for line in batch], enforce_sorted=False)
        targets = pack_sequence([line[1:] for line in batch], enforce_sorted=False).data
        one_hot = functional.one_hot(inputs.data, self.tokens).float()
        outputs, _ = self.rnn(PackedSequence(one_hot, *inputs[1:]))
        return functional.cross_entropy(self.head(outputs.data), targets, reduction="sum"), len(targets)


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    lines, tokens = read_lines(args.text)
    train, validation = cut(lines)
    validation = sorted(validation, key=len)
    network, train_pools = Network(tokens), pools(train)
    adam = torch.optim.Adam(network.parameters(), args.learning_rate)

    for epoch in range(1, args.epochs + 1):
        started, total, count = time.perf_counter(), 0.0, 0
        for batch in epoch_of(train_pools):
            loss, characters = network.loss(batch)
            adam.zero_grad(set_to_none=True)
            (loss / characters).backward()
            nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)
            adam.step()
            total, count = total + loss.item(), count + characters
        seconds, train_loss = time.perf_counter() - started, total / count
        with torch.no_grad():
            held_out = [network.loss(validation[at : at + BATCH_SIZE]) for at in range(0, len(validation), BATCH_SIZE)]
        line = {
            "peer": f"torch {torch.__version__}",
            "seed": args.seed,
            "epoch": epoch,
            "train_loss": round(train_loss, 4),
            "val_loss": round(sum(loss.item() for loss, _ in held_out) / sum(count for _, count in held_out), 4),
            "val_lines": len(validation),
            "val_characters": sum(count for _, count in held_out),
            "seconds": round(seconds, 1),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
