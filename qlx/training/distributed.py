"""Training in several processes: torchrun's engine starts them, accelerate keeps them in step.

Every process trains on its share of each batch and gradients are averaged (DistributedDataParallel), so
that N processes take the steps of one with N times the batch. The first one alone reports and writes.
`qlx train --nproc N` starts them on one machine; on several, `torchrun … -m qlx train` on each.
"""

import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from signal import SIGTERM
from typing import Any

from qlx.errors import CheckFailed, Interrupted, UsageError, require

__all__ = ["Process", "join_processes", "launch", "this_process"]


_LONGEST_WAIT = timedelta(hours=6)
"""For other processes: while the first one writes, reads back and replays a large run, they do nothing."""
_PATIENCE_SECONDS = (
    5.0  # an error of all processes comes within moments; their engine looks every 0.1 s
)


@dataclass(frozen=True)
class Process:
    """This process among those of one training, all of which are on this machine if `together`."""

    rank: int = 0
    count: int = 1
    together: bool = field(default=True, kw_only=True)

    @property
    def first(self) -> bool:
        """Whether this is the process that reports and writes."""
        return self.rank == 0

    def speak_last(self) -> None:
        """Before this process ends with an error: give the first time to report what all have met."""
        if not self.first:
            time.sleep(_PATIENCE_SECONDS)

    def wait(self) -> None:
        """Go on when all processes have come to this point."""
        if self.count > 1:
            require("accelerate", "train").PartialState().wait_for_everyone()

    def draw_apart(self, seed: int) -> None:
        """Begin this process's own random numbers, such as dropout's, which the first process has from the seed."""
        if not self.first:
            import torch

            torch.manual_seed(seed + self.rank)

    def gather(self, value: Any) -> list[Any]:
        """What each process gives, in their order, in every one of them; the values are JSON's."""
        if self.count == 1:
            return [value]
        import torch
        from torch import distributed

        device = require("accelerate", "train").PartialState().device
        written = torch.frombuffer(bytearray(json.dumps(value), "ascii"), dtype=torch.uint8)
        size = torch.tensor([len(written)], device=device)
        sizes = [torch.zeros_like(size) for _ in range(self.count)]
        distributed.all_gather(sizes, size)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8, device=device)
        padded[: len(written)] = written.to(device)
        parts = [torch.empty_like(padded) for _ in sizes]
        distributed.all_gather(parts, padded)
        return [
            json.loads(part[: int(size)].cpu().numpy().tobytes())
            for part, size in zip(parts, sizes, strict=True)
        ]


def this_process() -> Process:
    """What torchrun's environment says of this process; the only one where it says nothing."""
    rank, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    return Process(rank, count, together=here == count)


def join_processes() -> Process:
    """Meet the other processes of this training, if there are any."""
    process = this_process()
    if process.count > 1:
        import torch

        state = require("accelerate", "train").PartialState
        state(cpu=not torch.cuda.is_available(), timeout=_LONGEST_WAIT)
    return process


def launch(arguments: Sequence[str], count: int) -> int:
    """Run `qlx` with `arguments` in `count` processes on this machine; returns the exit code.

    The first process speaks for all, and says why it ended early. What the others print is shown only
    where one of them fails.

    Raises:
        UsageError: the machine has GPUs, but fewer than processes.
        CheckFailed: a process other than the first failed.
    """
    import torch
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _check_gpus(count, torch.cuda.device_count())
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = (
        {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": str(max(1, (cores or 1) // count))}
    )
    os.environ.update({name: value for name, value in threads.items() if name not in os.environ})
    with tempfile.TemporaryDirectory(prefix="qlx-processes-") as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=str(os.getpid()),
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(
                log_dir=logs, redirects=dict.fromkeys(range(1, count), Std.ALL)
            ),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "qlx", *arguments)
        except ChildFailedError as error:
            codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            return _exit_code(codes, Path(logs))
        except SignalException:
            return Interrupted.exit_code
    return 0


def _check_gpus(processes: int, gpus: int) -> None:
    if 0 < gpus < processes:
        raise UsageError(
            f"--nproc {processes}: each process needs a GPU of its own and this machine has {gpus}; give at most "
            f"--nproc {gpus}, or hide the GPUs to train on the CPU (CUDA_VISIBLE_DEVICES=)"
        )


def _exit_code(failures: Mapping[int, int], logs: Path) -> int:
    """The first process's own exit code, of the codes by process; the others are then ended with SIGTERM.

    Raises:
        CheckFailed: another one failed; with what it said last.
    """
    if failures.get(0, -1) > 0:
        return failures[0]
    rank, code = min(failures.items(), key=lambda found: (found[1] == -SIGTERM, found))
    said = [
        line.removeprefix("qlx: ")
        for path in logs.rglob(f"{rank}/stderr.log")
        for line in path.read_text("utf-8", "replace").splitlines()
        if line.startswith("qlx: ")
    ]
    why = said[-1] if said else f"it ended with {code}"
    raise CheckFailed(f"process {rank} of the training failed: {why}")
