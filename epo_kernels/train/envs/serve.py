"""The program of a helper process: creates one object and calls its methods; one JSON line in, one JSON line out.

It is run by path, and imports parts of epo_kernels without the package's __init__: with PyTorch, a process would need
several times the memory and seconds to start. The object's own output goes to stderr.
"""

import importlib
import json
import os
import sys
import types
from typing import Any


def open_object(path: list[str], package: str, address: str, arguments: dict[str, Any]) -> Any:
    """An object of the class at `address`, "module:Class"."""
    sys.path[:] = path
    bare = types.ModuleType("epo_kernels")
    bare.__path__ = [package]
    sys.modules["epo_kernels"] = bare
    module, _, kind = address.partition(":")
    return getattr(importlib.import_module(module), kind)(**arguments)


def main() -> None:
    served: Any = None
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # libraries print to stdout, which must not mix with the answers
        for line in sys.stdin:
            request = json.loads(line)
            name, arguments = request["call"], request["arguments"]
            try:
                if served is None:
                    served, answer = open_object(**arguments), None
                else:
                    answer = getattr(served, name)(**arguments)
                text = json.dumps({"answer": answer})
            except Exception as error:  # such as a broken game file: reported to the caller
                text = json.dumps({"error": f"{type(error).__name__}: {error}"})
            answers.write(text + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
