"""Versions that every comparison with other packages prints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version


def versions(packages: Iterable[str]) -> str:
    """Of ours and of the packages, where they can be asked for one."""
    found = []
    for name in ("dynprobe", "torch", "numpy", "scipy", *packages):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)
