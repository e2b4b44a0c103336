"""The program of a helper process: makes one object and calls its methods, a JSON line in, a JSON line out.

It is run by path, and what it imports of epo_kernels is imported without the package's own __init__: with PyTorch in
it, a process would need several times the memory and seconds to start. What the object prints goes to stderr.
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
        os.dup2(2, 1)  # libraries print, which must not get between the answers
        for line in sys.stdin:
            request = json.loads(line)
            name, arguments = request["call"], request["arguments"]
            try:
                if served is None:
                    served, answer = open_object(**arguments), None
                else:
                    answer = getattr(served, name)(**arguments)
                text = json.dumps({"answer": answer})
            except Exception as error:  # a broken game file, say: reported to whoever asked
                text = json.dumps({"error": f"{type(error).__name__}: {error}"})
            answers.write(text + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
