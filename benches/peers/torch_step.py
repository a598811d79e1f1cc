"""Measures whole training steps of one preset in PyTorch and prints one JSON line.

    torch_step.py PRESET [--threads N] [--steps N] [--seconds S] [--hidden-size H] [--seq-len T] [--precision bf16]

The protocol is in measure.py. A step is forward, cross-entropy, backward, clipping by the global norm at 5, and Adam, in
f32; with bf16 the forward pass runs under PyTorch's autocast. Characters enter one-hot, images row by row.
"""

from measure import BATCHES, CHARACTERS, CLIP_NORM, LEARNING_RATE, PRESETS, measure, parser

import json
import os


def arguments():
    known = parser("PyTorch")
    known.add_argument("--hidden-size", type=int, help="instead of the preset's")
    known.add_argument("--seq-len", type=int, help="instead of the preset's, of characters")
    known.add_argument("--precision", choices=("f32", "bf16"), default="f32", help="of products")
    return known.parse_args()


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
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            logits = network(inputs[number % BATCHES])
        loss = functional.cross_entropy(logits.float(), targets[number % BATCHES].flatten())
        adam.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)
        adam.step()
        return loss.item()

    return step


def main():
    args = arguments()
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(args.threads)
    import torch

    torch.set_num_threads(args.threads)
    print(json.dumps(measure(args, f"torch {torch.__version__}", trainer(args))))


if __name__ == "__main__":
    main()
