"""Adapters for other trainers, each imported by its own name: `import epo_kernels` imports none of their packages."""

import re
from importlib.metadata import PackageNotFoundError, version


def require(package: str, at_least: str, below: str) -> None:
    """Check that a foreign package is installed in a version that its adapter was made for.

    Args:
        package: its name, which is also that of the extra which installs it.
        at_least: the first version that is served, such as "1.16".
        below: the first one that is not.

    Raises:
        ImportError: missing, too old or too new; the message holds the install line.
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
    """The numbers that a version begins with: "1.16.0.dev0" gives (1, 16, 0)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match.group().split(".")) if match else ()
