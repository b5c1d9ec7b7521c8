"""A process of one peer: pinned to cores before it imports anything, and asked for work line by line.

    python _peers_worker.py '{"cores": [0], "module": "_peers_step", "case": "Ours", "arguments": {...}, "answers": 5}'

The parent writes a line of JSON, ``[method, arguments]``, and reads one back from the file descriptor ``answers``. The first
line says that the case is ready.
"""

import importlib
import json
import os
import sys


def peak_bytes():
    """Largest resident memory of this process so far, where the system tells; without that of the process that started it."""
    try:
        with open("/proc/self/status") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None


def forget_peak():
    """Makes `peak_bytes` count from now on; returns whether the system can."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def main():
    told = json.loads(sys.argv[1])
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, told["cores"])
    case = getattr(importlib.import_module(told["module"]), told["case"])(**told["arguments"])
    with open(told["answers"], "w") as answers:
        print("null", file=answers, flush=True)
        for line in sys.stdin:
            method, arguments = json.loads(line)
            print(json.dumps(getattr(case, method)(**arguments)), file=answers, flush=True)


if __name__ == "__main__":
    main()
