"""Trains one preset in PyTorch on real data and prints one JSON line per epoch.

    torch_quality.py PRESET --data-dir DIR [--epochs N] [--seed N] [--threads N]

The same data, batch and optimizer as lockstep's preset; the initialisation is PyTorch's own. Characters: the first 90 %
of tinyshakespeare in text order, 64 rows of 50 characters, the state carried from batch to batch and zero at each
epoch's start, the rest for validation. Images: MNIST read row by row, a new random order each epoch, the test set for
validation.
"""

import argparse
import gzip
import json
import pathlib

import numpy
import torch
from torch import nn
from torch.nn import functional

from torch_step import CHARACTERS, CLIP_NORM, LEARNING_RATE, PRESETS


def arguments():
    parser = argparse.ArgumentParser(description="one PyTorch training, one JSON line per epoch")
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--data-dir", type=pathlib.Path, required=True, help="with mnist/ and tinyshakespeare/, or flat")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def find(data_dir, *names):
    """The first of these files that is there, in the folder or one below it."""
    for name in names:
        for path in sorted([data_dir / name, *data_dir.glob(f"*/{name}")]):
            if path.is_file():
                return path
    raise SystemExit(f"{data_dir} has none of {', '.join(names)}")


def idx(data_dir, stem, kind):
    path = find(data_dir, f"{stem}-{kind}.gz", f"{stem}-{kind}", f"{stem}.{kind}")
    content = path.read_bytes()
    content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    dimensions = content[3]
    shape = [int.from_bytes(content[4 * i : 4 * i + 4]) for i in range(1, dimensions + 1)]
    return torch.from_numpy(numpy.frombuffer(content, numpy.uint8, offset=4 + 4 * dimensions).reshape(shape).copy())


class Network(nn.Module):
    def __init__(self, preset):
        super().__init__()
        cell, layers, hidden, self.width, _, _, classes, self.kind = PRESETS[preset]
        self.rnn = getattr(nn, cell)(self.width, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x, state=None):
        if self.kind == CHARACTERS:
            x, state = self.rnn(functional.one_hot(x, self.width).float(), state)
            return self.head(x).flatten(0, 1), state
        return self.head(self.rnn(x.float() / 255)[0][:, -1]), None


def windows(tokens, rows, steps):
    """Row r is one contiguous part of the text; the targets are the next characters."""
    count = (len(tokens) - 1) // (rows * steps)
    inputs = tokens[: rows * steps * count].view(rows, -1)
    targets = tokens[1 : rows * steps * count + 1].view(rows, -1)
    return [(inputs[:, i : i + steps], targets[:, i : i + steps]) for i in range(0, steps * count, steps)]


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    _, _, _, width, steps, rows, _, kind = PRESETS[args.preset]
    network = Network(args.preset)
    adam = torch.optim.Adam(network.parameters(), LEARNING_RATE)

    if kind == CHARACTERS:
        text = find(args.data_dir, "tinyshakespeare/input.txt", "input.txt").read_text()
        vocabulary = {character: token for token, character in enumerate(sorted(set(text)))}
        assert len(vocabulary) == width, f"the text has {len(vocabulary)} distinct characters, not {width}"
        tokens = torch.tensor([vocabulary[character] for character in text])
        cut = int(0.9 * len(tokens))
        train, validation = windows(tokens[:cut], rows, steps), windows(tokens[cut:], rows, steps)
        batches = lambda: train
    else:
        images, labels = idx(args.data_dir, "train-images", "idx3-ubyte"), idx(args.data_dir, "train-labels", "idx1-ubyte")
        validation = [
            (x, y)
            for x, y in zip(
                idx(args.data_dir, "t10k-images", "idx3-ubyte").split(1000),
                idx(args.data_dir, "t10k-labels", "idx1-ubyte").split(1000),
            )
        ]

        def batches():
            order = torch.randperm(len(images))
            for start in range(0, len(images) - rows + 1, rows):
                chosen = order[start : start + rows]
                yield images[chosen], labels[chosen]

    def loss_of(x, y, state):
        logits, state = network(x, state)
        y = y.flatten().long()
        right = (logits.detach().argmax(1) == y).sum().item()
        return functional.cross_entropy(logits, y), state, right, len(y)

    for epoch in range(1, args.epochs + 1):
        state, losses = None, []
        for x, y in batches():
            loss, state, _, _ = loss_of(x, y, state)
            adam.zero_grad(set_to_none=True)
            loss.backward()
            if kind == CHARACTERS:
                nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)
                state = tuple(part.detach() for part in state) if isinstance(state, tuple) else state.detach()
            adam.step()
            losses.append(loss.item())
        with torch.no_grad():
            state, total, right, count = None, 0.0, 0, 0
            for x, y in validation:
                loss, state, hits, size = loss_of(x, y, state)
                total, right, count = total + loss.item() * size, right + hits, count + size
        line = {
            "peer": f"torch {torch.__version__}",
            "preset": args.preset,
            "seed": args.seed,
            "epoch": epoch,
            "train_loss": round(sum(losses) / len(losses), 4),
            "val_loss": round(total / count, 4),
            "val_accuracy": round(right / count, 4),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
