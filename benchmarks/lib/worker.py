"""The child of `processes.call`: imports one function, calls it, and prints what it returned.

Imports nothing of its own that takes time: a cold start is one of the things that are measured.
"""

import importlib
import json
import resource
import sys

MARK = "benchmark-result: "


def main(target, arguments):
    module, _, function = target.partition(":")
    value = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    # Linux counts in KiB, macOS in bytes.
    unit = 2**20 if sys.platform == "darwin" else 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    print(MARK + json.dumps({"value": value, "peak_mib": peak}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
