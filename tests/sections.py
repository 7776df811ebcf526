"""Sections for `benchmarks.gpu`, that do what sections of a real one may do."""

import os
import signal
import subprocess
import time


def good(where, *words):
    for word in words:
        yield {"word": word, "limit_s": where.limit_s}
    yield {"word": "last", "nan": float("nan")}


def failing(where):
    yield {"word": "before"}
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with …")


def silent(where):
    raise SystemExit(3)
    yield


def crashing(where):
    yield {"word": "before"}
    print("about to crash", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


def hanging(where):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    helper = subprocess.Popen(["sleep", "1000"])
    yield {"pids": [os.getpid(), helper.pid]}
    time.sleep(1000.0)


def partly(where):
    yield {"word": "one"}
    yield {"error": "OutOfMemoryError: too much"}
    yield {"word": "two"}
