"""From what was typed (folders, files, globs, `-`) to lists of checkpoint paths, one list per run."""

from __future__ import annotations

import glob
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from dynprobe.io.errors import InputError
from dynprobe.io.manifest import find_manifest
from dynprobe.io.run_folders import Listing, list_run


def run_listings(specs: Iterable[str]) -> list[Listing]:
    """Return one listing per run; checkpoints named one by one are gathered by folder."""
    listings: list[Listing] = []
    gathered: dict[Path, Listing] = {}
    for path in _expand(specs):
        listing = _list_one(path)
        if listing.paths != [path]:
            listings.append(listing)
        elif path.parent not in gathered:
            gathered[path.parent] = listing
            listings.append(listing)
        else:
            gathered[path.parent].paths.append(path)
    for parent, listing in gathered.items():
        if len(listing.paths) > 1:
            listing.root = parent
            listing.paths = list(dict.fromkeys(listing.paths))
    return listings


def _list_one(path: Path) -> Listing:
    if path.is_file():
        return Listing(path, [path])
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder.")
    manifest = find_manifest(path)
    pattern = manifest.checkpoints.get("glob")
    if pattern:
        paths = sorted(path.glob(str(pattern)))
        if not paths:
            raise InputError(f"{path}: nothing matches '{pattern}', the glob in {manifest.path}.")
        return Listing(path, paths)
    data = [Path(spec.name) for spec in (manifest.data, manifest.test_data) if spec is not None]
    return list_run(path, exclude=[file for file in data if file.is_file()])


def _expand(specs: Iterable[str]) -> Iterator[Path]:
    for spec in specs:
        if spec == "-":
            yield from _expand(line.strip() for line in sys.stdin if line.strip() not in ("", "-"))
        elif glob.has_magic(spec) and not Path(spec).exists():
            matches = sorted(glob.glob(spec, recursive=True))  # noqa: PTH207 (the pattern may be absolute)
            if not matches:
                raise InputError(f"{spec}: nothing matches this pattern.")
            yield from (Path(match) for match in matches)
        else:
            yield Path(spec)


def run_labels(roots: list[Path]) -> list[str]:
    """Return the shortest path endings that tell the runs apart; equal paths get equal ones."""
    paths = [root.resolve() for root in roots]
    parts = {path: path.parts[1:] or path.parts for path in paths}  # without the root
    labels = []
    for path in paths:
        own, depth = parts[path], 1
        while depth < len(own) and sum(other[-depth:] == own[-depth:] for other in parts.values()) > 1:
            depth += 1
        labels.append("/".join(own[-depth:]))
    return labels
