"""A module directly in this folder is a command. All that an author of one needs is imported here."""

from dynprobe.analyzers.core.contract import (
    Bands,
    Contours,
    DeclarationError,
    Heatmap,
    InputFile,
    Lines,
    Measurement,
    OptionError,
    Range,
    Setting,
    analyzer,
)
from dynprobe.analyzers.core.result import Result, Var

__all__ = [
    "Bands",
    "Contours",
    "DeclarationError",
    "Heatmap",
    "InputFile",
    "Lines",
    "Measurement",
    "OptionError",
    "Range",
    "Result",
    "Setting",
    "Var",
    "analyzer",
]
