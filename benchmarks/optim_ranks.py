"""What processes gain that share Newton-Schulz: time of a step of Muon (M3 without its slow part), alone and shared.

    python benchmarks/optim_ranks.py

Every process holds replicas of the same matrices. Both ways run in turns, after a check that they give the same weights
to 1e-5 and that all processes hold the same bits. Figures are medians over turns, one thread per process.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common import RESULTS, Records, parse, parser
from nestlearn.optim import M3
from nestlearn.optim.sharding import gathered


def make(shape: tuple[int, int], count: int) -> tuple[nn.ParameterList, M3]:
    """Matrices with gradients, and their optimizer."""
    torch.manual_seed(0)
    matrices = nn.ParameterList([nn.Parameter(torch.randn(shape) / 30) for _ in range(count)])
    for matrix in matrices:
        matrix.grad = torch.randn(shape)
    return matrices, M3(matrices.parameters(), lr=0.01, alpha=0.0, second_moment=False)


def worker(rank: int, processes: int, port: int, turns: int, shape: tuple[int, int], count: int, found: Tensor) -> None:
    """One process: fills ``found[way, turn]`` with seconds of a step, the largest of all processes."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=processes)
    made = [make(shape, count) for _ in range(2)]
    made[1][1].process_group = dist.group.WORLD
    for turn in range(turns):
        for way, (_, optimizer) in enumerate(made):
            dist.barrier()
            began = time.perf_counter()
            optimizer.step()
            seconds = torch.tensor(time.perf_counter() - began)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            found[way, turn] = seconds
    for alone, shared in zip(made[0][0], made[1][0], strict=True):
        torch.testing.assert_close(alone, shared, rtol=0, atol=1e-5)
        copies = gathered(shared.detach(), shared, None)
        assert all(torch.equal(copy, shared) for copy in copies)
    dist.destroy_process_group()


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print and record."""
    made = parser(__doc__, RESULTS / "optim_ranks.jsonl")
    made.add_argument("--processes", type=int, default=2)
    made.add_argument("--turns", type=int, default=7)
    made.add_argument("--count", type=int, default=8)
    made.add_argument("--shape", type=int, nargs=2, default=(1024, 1024))
    options = parse(made, words)
    found = torch.zeros(2, options.turns).share_memory_()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = (options.processes, port, options.turns, tuple(options.shape), options.count, found)
    torch.multiprocessing.spawn(worker, given, options.processes)
    alone, shared = (median(row[1:].tolist()) for row in found)
    record = {"alone_seconds": alone, "shared_seconds": shared, "ratio": alone / shared}
    key = {"processes": options.processes, "shape": list(options.shape), "count": options.count}
    print(Records(options.out).get(key, lambda: record))


if __name__ == "__main__":
    main()
