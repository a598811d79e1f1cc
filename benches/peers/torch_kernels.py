"""Measures whole training steps on a GPU in PyTorch: eager and as a CUDA graph, in f32, TF32 and bf16. One JSON line each.

    torch_kernels.py [PRESET ...] [--device cuda|cpu] [--steps N] [--seconds S]

A step is that of torch_step.py: forward, cross-entropy, backward, clipping by the global norm, Adam; with bf16 the forward
pass runs under PyTorch's autocast. Batches lie on the device beforehand, as they do for `lockstep`; the loss is read once, at
the end. Times are wall-clock, over all steps of a measurement, between two synchronisations. On a CPU there is eager only, and
no TF32: to see that this file works.
"""

from measure import BATCHES, CHARACTERS, CLIP_NORM, LEARNING_RATE, PRESETS

import argparse
import json
import time

WARM_UP = 11


def arguments():
    parser = argparse.ArgumentParser(description="whole training steps on a GPU")
    parser.add_argument("presets", nargs="*", metavar="PRESET", help="default: all")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--steps", type=int, default=60, help="time at least this many steps")
    parser.add_argument("--seconds", type=float, default=2.0, help="go on for at least this long")
    args = parser.parse_args()
    unknown = set(args.presets) - set(PRESETS)
    if unknown:
        parser.error(f"unknown preset {', '.join(sorted(unknown))}, known: {', '.join(PRESETS)}")
    return args


def work(preset, device, is_graph, precision):
    """The step of one batch, and the batches."""
    import torch
    from torch import nn
    from torch.nn import functional

    torch.manual_seed(1)
    cell, layers, hidden, width, steps, rows, classes, kind = PRESETS[preset]

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = getattr(nn, cell)(width, hidden, layers, batch_first=True)
            self.head = nn.Linear(hidden, classes)

        def forward(self, x):
            if kind == CHARACTERS:
                # Not functional.one_hot: it reads the largest id back to the host.
                one_hot = torch.zeros(*x.shape, width, device=x.device).scatter_(-1, x.unsqueeze(-1), 1.0)
                return self.head(self.rnn(one_hot)[0]).flatten(0, 1)
            return self.head(self.rnn(x)[0][:, -1])

    if kind == CHARACTERS:
        text = torch.randint(width, (BATCHES, rows, steps + 1), device=device)
        inputs, targets = text[:, :, :-1].contiguous(), text[:, :, 1:].contiguous()
    else:
        inputs = torch.randint(256, (BATCHES, rows, steps, width), device=device).float() / 255
        targets = torch.randint(classes, (BATCHES, rows), device=device)
    network = Network().to(device)
    adam = torch.optim.Adam(network.parameters(), LEARNING_RATE, capturable=is_graph)

    def step(x, y):
        adam.zero_grad(set_to_none=not is_graph)
        # A graph must not hold what autocast keeps between steps.
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16", cache_enabled=not is_graph):
            loss = functional.cross_entropy(network(x), y.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)
        adam.step()
        return loss.detach()

    return step, inputs, targets


def as_graph(step, inputs, targets):
    """The same step, captured once and replayed on whatever lies in its buffers."""
    import torch

    x, y = inputs[0].clone(), targets[0].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step(x, y)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(x, y)

    def replay(new_x, new_y):
        x.copy_(new_x)
        y.copy_(new_y)
        graph.replay()
        return loss

    return replay


def measure(args, preset, mode, precision):
    import torch

    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    is_cuda = args.device == "cuda"
    synchronize = torch.cuda.synchronize if is_cuda else lambda: None
    step, inputs, targets = work(preset, args.device, mode == "graph", precision)
    if mode == "graph":
        step = as_graph(step, inputs, targets)
    for number in range(WARM_UP):
        loss = step(inputs[number % BATCHES], targets[number % BATCHES])
    synchronize()
    done, chunks, started = 0, [], time.perf_counter()
    # Synchronised now and then only, as a training loop is.
    while done < args.steps or time.perf_counter() - started < args.seconds:
        begun = time.perf_counter()
        for number in range(10):
            loss = step(inputs[(done + number) % BATCHES], targets[(done + number) % BATCHES])
        synchronize()
        chunks.append((time.perf_counter() - begun) / 10)
        done += 10
    chunks.sort()
    return {
        "peer": f"torch {torch.__version__}",
        "device": torch.cuda.get_device_name() if is_cuda else "cpu",
        "preset": preset,
        "mode": mode,
        "precision": precision,
        "step_ms": round(1e3 * chunks[len(chunks) // 2], 4),
        "steps": done,
        "loss": round(loss.item(), 4),
    }


def main():
    args = arguments()
    modes = [(mode, precision) for mode in ("eager", "graph") for precision in ("f32", "tf32", "bf16")]
    for preset in args.presets or PRESETS:
        for mode, precision in modes if args.device == "cuda" else [("eager", "f32"), ("eager", "bf16")]:
            print(json.dumps(measure(args, preset, mode, precision)), flush=True)


if __name__ == "__main__":
    main()
