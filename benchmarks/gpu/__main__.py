"""Runs one section of `bench.py gpu`: its rows go to a file, a line of JSON each.

python -m benchmarks.gpu MODULE:FUNCTION ROWS FAKE LIMIT_S ARGS…
"""

import importlib
import json
import signal
import sys

from benchmarks.gpu import Where, in_one_line


def leave(*_) -> None:
    """Answers SIGTERM as Ctrl-C is answered, so that what was started ends, too."""
    sys.exit(128 + signal.SIGTERM)


def main(function: str, file: str, fake: str, limit_s: str, *args: str) -> None:
    signal.signal(signal.SIGTERM, leave)
    module, name = function.split(":")
    where = Where(bool(int(fake)), float(limit_s), 0.01 if int(fake) else 0.5)
    with open(file, "a") as rows:
        try:
            for row in getattr(importlib.import_module(module), name)(where, *args):
                print(json.dumps(row), file=rows, flush=True)
        except Exception as error:
            print(json.dumps({"error": in_one_line(error)}), file=rows, flush=True)
            raise


main(*sys.argv[1:])
