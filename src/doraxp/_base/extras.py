"""Errors about modules that an extra installs: each says how to install the extra."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
"""The folder of the package, src/doraxp in a clone."""


def require(extra: str, *modules: str, of: str) -> None:
    """Raise ModuleNotFoundError unless the modules are there; `of` is the thing that needs them."""
    missing = absent(modules)
    if missing:
        message = f"{of} needs the extra {extra}: {lack(extra, missing)}"
        raise ModuleNotFoundError(message, name=missing[0])


def absent(modules: Iterable[str]) -> list[str]:
    """Return those of the modules that are not installed."""
    return [name for name in modules if not _is_installed(name)]


def lack(extra: str, missing: list[str]) -> str:
    """Return an error message: the missing modules, and how to install them."""
    *others, last = missing
    names = f"{', '.join(others)} and {last} are" if others else f"{last} is"
    return f"{names} not installed: {install_hint(extra)}"


def install_hint(extra: str) -> str:
    """Return the command that installs an extra, as the end of an error message.

    Installed from a folder, or run from one, doraxp is installed again from that folder: an index
    of packages may not have it. Otherwise its name is enough.
    """
    folder = _source_folder()
    if folder is None:
        return f"run python -m pip install 'doraxp[{extra}]'"
    return f"run python -m pip install '.[{extra}]' in {folder}"


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # a stub in sys.modules that has no spec
        return True


def _source_folder() -> Path | None:
    """Return the folder that doraxp is run or was installed from, or None."""
    root = PACKAGE.parents[1]
    if PACKAGE.parent.name == "src" and (root / "pyproject.toml").is_file():
        return root
    # These take 20 ms, which only an error may cost.
    import json
    from importlib.metadata import PackageNotFoundError, distribution
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    try:
        record = distribution("doraxp").read_text("direct_url.json")  # PEP 610
    except PackageNotFoundError:
        return None
    origin = json.loads(record or "{}")
    if "dir_info" not in origin:
        return None
    return Path(url2pathname(urlsplit(origin["url"]).path))
