"""CPU time of a process tree, from a made-up /proc and from the real one."""

import os
import subprocess
import sys
import threading
import time

import pytest

from bench import BenchError
from bench.cpu import Reading, processes, read_tree


def _task(proc, pid, tid, on_cpu_ns, children=()):
    task = proc / str(pid) / "task" / str(tid)
    task.mkdir(parents=True)
    (task / "schedstat").write_text(f"{on_cpu_ns} 999 7\n")
    (task / "children").write_text("".join(f"{child} " for child in children))
    return task


def test_threads_and_descendants_are_counted(tmp_path):
    _task(tmp_path, 10, 10, 100, children=[20])
    _task(tmp_path, 10, 11, 30, children=[40])
    _task(tmp_path, 20, 20, 7, children=[30])
    _task(tmp_path, 30, 30, 2)
    _task(tmp_path, 40, 40, 1)
    _task(tmp_path, 50, 50, 5000)
    assert sorted(processes(10, tmp_path)) == [10, 20, 30, 40]
    assert read_tree(10, tmp_path) == Reading({(10, 10): 100, (10, 11): 30, (20, 20): 7, (30, 30): 2, (40, 40): 1})


def test_a_difference_counts_new_threads_and_reports_ended_ones():
    usage = Reading({(1, 1): 150, (1, 3): 20}).since(Reading({(1, 1): 100, (1, 2): 70}))
    assert usage.cpu_ns == 50 + 20
    assert usage.threads_ended == 1


def test_a_thread_that_ends_meanwhile_is_passed_over(tmp_path):
    _task(tmp_path, 10, 10, 100, children=[20])
    ended = _task(tmp_path, 10, 11, 30)
    for name in ("schedstat", "children"):
        (ended / name).unlink()
    assert read_tree(10, tmp_path).threads_ns == {(10, 10): 100}


def test_no_such_process(tmp_path):
    with pytest.raises(BenchError, match="process 10 is not running"):
        read_tree(10, tmp_path)


def test_own_threads_are_counted():
    burnt, leave = threading.Event(), threading.Event()

    def burn():
        started_ns = time.thread_time_ns()
        while time.thread_time_ns() < started_ns + 20_000_000:
            pass
        burnt.set()
        leave.wait()

    thread = threading.Thread(target=burn)
    thread.start()
    burnt.wait()
    reading = read_tree(os.getpid())
    leave.set()
    thread.join()
    assert reading.threads_ns[os.getpid(), thread.native_id] >= 10_000_000


def test_a_child_process_is_counted():
    code = "import sys, time\nwhile time.process_time() < 0.05: pass\nprint(flush=True)\nsys.stdin.read()"
    before = read_tree(os.getpid())
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert child.pid in set(processes(os.getpid()))
        assert read_tree(os.getpid()).since(before).cpu_ns >= 40_000_000
        child.stdin.close()
