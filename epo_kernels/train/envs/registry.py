"""Resolves an environment's name to its suite class.

A name is built in, an entry point in the group `epo_kernels.environments` of an installed package, or
`my_module:MySuite`. All three are loaded in the same way.
"""

import re
import traceback
from dataclasses import is_dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from epo_kernels.train.envs.base import EnvConfig
from epo_kernels.train.envs.suite import Suite
from epo_kernels.train.setting import check_settings, suggest

GROUP = "epo_kernels.environments"
# Not entry points of this package: those would be missing until a source tree is reinstalled.
BUILT_IN = {
    "scienceworld": "epo_kernels.train.envs.scienceworld.suite:ScienceWorldSuite",
    "alfworld": "epo_kernels.train.envs.alfworld.suite:ALFWorldSuite",
    "practice": "epo_kernels.train.envs.practice:PracticeSuite",
}


def suite_class(name: str) -> type[Suite]:
    """The class named by `env.name`. Its module is imported; the packages it requires need not be installed.

    Raises:
        ValueError: no such environment, module or class, or the class is not a complete suite.
        ImportError: the module imports a package that is not installed.
    """
    if name in BUILT_IN or ":" in name:
        return _checked(_load(name, BUILT_IN.get(name, name)), f"env.name={name}")
    addresses = {point.name: point.value for point in entry_points(group=GROUP)}
    if name not in addresses:
        addresses |= BUILT_IN
        raise ValueError(
            f"env.name must be one of {', '.join(sorted(addresses))}, or a plug-in's my_module:MySuite, "
            f"got {name!r}{suggest(name, list(addresses))}"
        )
    return _checked(_load(name, addresses[name]), f"env.name={name}")


def _load(name: str, address: str) -> Any:
    module, _, attribute = address.partition(":")
    try:
        return EntryPoint(name, address, GROUP).load()
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise ImportError(
                f"env.name={name}: the module {module} needs {error.name}, which is not installed: "
                f"pip install {(error.name or '').partition('.')[0]}"
            ) from error
        raise ValueError(
            f"env.name={name}: there is no module {error.name!r}. `python -m epo_kernels.train` finds installed "
            f"packages, folders on PYTHONPATH and modules in the current folder, {Path.cwd()}"
        ) from error
    except AttributeError as error:
        if _raised_by_module(error):
            raise _broken(name, module, error) from error
        raise ValueError(f"env.name={name}: the module {module} has no {attribute!r}") from error
    except Exception as error:
        raise _broken(name, module, error) from error


def _raised_by_module(error: Exception) -> bool:
    """Whether the module's own code raised it, rather than the look-up of the class."""
    return Path(traceback.extract_tb(error.__traceback__)[-1].filename).parent.name != "metadata"


def _broken(name: str, module: str, error: Exception) -> ValueError:
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = "" if isinstance(error, SyntaxError) else f" ({last.filename}, line {last.lineno})"
    return ValueError(f"env.name={name}: importing {module} raised {type(error).__name__}: {error}{where}")


def _checked(found: Any, named: str) -> type[Suite]:
    methods = ", ".join(sorted(Suite.__abstractmethods__))
    if not (isinstance(found, type) and issubclass(found, Suite)):
        raise ValueError(
            f"{named} is not a suite: it must be a class derived from epo_kernels.train.envs.Suite that defines "
            f"{methods}, got {found!r}"
        )
    if missing := sorted(found.__abstractmethods__):
        raise ValueError(f"{named} is not a complete suite: it does not define {', '.join(missing)}")
    if not (isinstance(found.Options, type) and is_dataclass(found.Options)):
        raise ValueError(f"{named}: its Options must be a dataclass, got {found.Options!r}")
    # Panel names become part of file names.
    if isinstance(found.panels, str) or not found.panels or not all(re.fullmatch(r"[\w-]+", p) for p in found.panels):
        raise ValueError(
            f"{named}: its panels must be a tuple of names of splits (letters, digits, _ and -), such as ('iid',), got "
            f"{found.panels!r}"
        )
    return found


def make_suite(config: EnvConfig) -> Suite:
    """The suite named by `config.name`; with its default options if `config.options` is None.

    Expensive resources start only with its first task or environment.

    Raises:
        ImportError: a package required by the suite is not installed.
        ValueError: as for `suite_class`, or a setting is out of range.
    """
    found = suite_class(config.name)
    for module, package in found.requires.items():
        if find_spec(module) is None:
            raise ImportError(f"env.name={config.name} needs the package {module}: pip install '{package}'")
    if config.options is None:
        config = replace(config, options=found.Options())
    check_settings(config, "env.")
    check_settings(config.options, "env.options.")
    return found(config)
