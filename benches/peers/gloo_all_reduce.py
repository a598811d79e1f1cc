"""One of two processes that sum the same buffers with torch.distributed's gloo, again and again.

    gloo_all_reduce.py --rank 0|1 --port N

The protocol of lockstep-all-reduce (benches/src/bin/all_reduce.rs): lines "BYTES ROUNDS" on standard input, for each a
JSON line of rank 0, the microseconds of every round. The tensor is summed in place, as gloo does it. It holds zeros
while time is taken, which stay zeros; that ones and twos become threes is checked first.
"""

import argparse
import json
import sys
import time

import torch
import torch.distributed as dist

WARM_UP = 2


def main():
    parser = argparse.ArgumentParser(description="gloo's all-reduce of two local processes")
    parser.add_argument("--rank", type=int, choices=(0, 1), required=True)
    parser.add_argument("--port", type=int, required=True, help="where rank 0 listens, on loopback")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{args.port}", rank=args.rank, world_size=2)
    for line in sys.stdin:
        size, rounds = map(int, line.split())
        values = torch.full([size // 4], args.rank + 1.0)
        dist.all_reduce(values)
        assert bool((values == 3).all()), "1 + 2 = 3"
        values.zero_()
        micros = []
        for count in range(WARM_UP + rounds):
            started = time.perf_counter()
            dist.all_reduce(values)
            if count >= WARM_UP:
                micros.append(1e6 * (time.perf_counter() - started))
        if args.rank == 0:
            print(json.dumps(micros), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
