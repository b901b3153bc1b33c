"""Data files that other packages carry, read where they lie.

Importing those packages for it would be a quarter of a training's start. Called by the built-in workloads.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from obsinfra.errors import DataError


def bundled_file(package: str, name: str, *, what: str, otherwise: str = "") -> Path:
    """The file `name`, relative to an installed package, which is not imported.

    Args:
        what: what it is, for the error.
        otherwise: what else the user could do than install it, likewise.

    Raises:
        DataError: the package is not installed, or has no such file.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(folder) / name
        if path.is_file():
            return path
    missing = f"no module named {package!r}" if spec is None else f"{package} without {name}"
    raise DataError(
        f"{what} not installed ({missing})",
        "the extra `examples`" + (", or your own" if otherwise else ""),
        "pip install 'obsinfra[examples]'" + otherwise,
    )
