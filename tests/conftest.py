"""What every test shares."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported: two test workers on two cores must not fight over them, and sums are repeatable.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NO_COLOR", "1")

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def samples() -> Path:
    """The folder of real runs that ships with the project."""
    return ROOT / "sample_checkpoints"
