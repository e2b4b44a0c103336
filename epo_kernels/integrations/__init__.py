"""Adapters for other trainers, each imported explicitly: `import epo_kernels` imports none of their packages."""

import re
from importlib.metadata import PackageNotFoundError, version


def require(package: str, at_least: str, below: str) -> None:
    """Check that a third-party package is installed in a version supported by its adapter.

    Args:
        package: name of the package, and of the extra that installs it.
        at_least: first supported version, such as "1.16".
        below: first unsupported version.

    Raises:
        ImportError: missing, too old or too new; the message includes the install command.
    """
    cure = f'install it with: pip install "epo-kernels[{package}]"'
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ImportError(f"epo_kernels.integrations.{package} needs {package}; {cure}") from None
    if not _numbers(at_least) <= _numbers(found) < _numbers(below):
        raise ImportError(
            f"epo_kernels.integrations.{package} needs {package} >= {at_least}, < {below}, got {found}; {cure}"
        )


def _numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: "1.16.0.dev0" gives (1, 16, 0)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match.group().split(".")) if match else ()
