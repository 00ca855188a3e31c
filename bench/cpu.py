"""CPU time of a process and all its descendants, in nanoseconds, from Linux's /proc.

`/proc/PID/task/*/schedstat` counts what each thread spent on a CPU, in user and kernel mode, in nanoseconds; `/proc/PID/stat` counts
in ticks of 10 ms. Time spent waiting for a CPU is not in it, so a busy machine disturbs it far less than a wall clock. A thread that
ends takes its file with it: readings are kept per thread, and `Usage.threads_ended` tells that a difference is too small.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import BenchError

PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Usage:
    """CPU time between two readings of one tree."""

    cpu_ns: int
    threads_ended: int


@dataclass(frozen=True, slots=True)
class Reading:
    """CPU time so far of each (process, thread) of a tree."""

    threads_ns: dict[tuple[int, int], int]

    def since(self, earlier: "Reading") -> Usage:
        before = earlier.threads_ns
        used = sum(ns - before.get(key, 0) for key, ns in self.threads_ns.items())
        return Usage(used, len(before.keys() - self.threads_ns.keys()))


def _on_cpu_ns(schedstat: str) -> int:
    return int(schedstat.split(maxsplit=1)[0])


def processes(pid: int, proc: Path = PROC) -> Iterator[int]:
    """The process and its descendants; one that ends meanwhile is passed over."""
    yield pid
    for task in _tasks(pid, proc):
        try:
            children = (task / "children").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for child in children.split():
            yield from processes(int(child), proc)


def _tasks(pid: int, proc: Path) -> list[Path]:
    try:
        return list((proc / str(pid) / "task").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return []


def read_tree(pid: int, proc: Path = PROC) -> Reading:
    """What the tree under `pid` has used so far."""
    threads: dict[tuple[int, int], int] = {}
    for process in processes(pid, proc):
        for task in _tasks(process, proc):
            try:
                threads[process, int(task.name)] = _on_cpu_ns((task / "schedstat").read_text())
            except (FileNotFoundError, ProcessLookupError):
                continue
    if not threads:
        raise BenchError(f"process {pid} is not running, or this kernel has no {proc}/PID/task/*/schedstat")
    return Reading(threads)
