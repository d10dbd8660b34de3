"""Claims about the page: it stands alone, is small, and says everything the report says."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from figure_samples import LANDSCAPE, declared, landscape, series

from dynprobe.analyzers.core.contract import Lines
from dynprobe.cli.figure import draw

VOID = {"meta", "br", "link"}


class _Balanced(HTMLParser):
    """Notes every tag that is closed out of order, and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def written(tmp_path: Path, *args: object, **kwargs: object) -> str:
    path = tmp_path / "page.html"
    draw(*args, path, **kwargs)  # type: ignore[arg-type]
    return path.read_text(encoding="utf-8")


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    page = written(tmp_path, landscape((0, 1000)), LANDSCAPE)
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)  # names of namespaces are never fetched
    assert "://" not in without_names
    assert "<script" not in page
    assert "@import" not in page
    assert {s[:5] for s in re.findall(r'(?:src|href)="([^"]*)"', without_names) if s[0] != "#"} <= {"data:"}


def test_the_page_is_well_formed_and_so_is_its_picture(tmp_path: Path) -> None:
    page = written(tmp_path, landscape((0, 1000), failed=(0,)), LANDSCAPE)
    parser = _Balanced()
    parser.feed(page)
    assert parser.wrong == []
    assert parser.open == []
    ET.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])


@pytest.mark.parametrize("style", ["contour", "filled", "surface"])
def test_nine_surfaces_of_51_by_51_points_weigh_less_than_half_a_megabyte(tmp_path: Path, style: str) -> None:
    page = written(tmp_path, landscape(range(0, 1000, 100), shape=(51, 51)), LANDSCAPE, style=style)
    assert len(page.encode()) < 500_000


def test_failures_are_listed_with_their_reason_and_cannot_inject_markup(tmp_path: Path) -> None:
    page = written(tmp_path, series(failed=(200,)), declared(Lines("trace")))
    assert "NaN in &#x27;conv1.weight&#x27; &amp; &lt;more&gt;" in page
    assert "<more>" not in page
    assert "1 of 5" in page


def test_small_variables_are_listed_with_errors_and_large_ones_by_their_range(tmp_path: Path) -> None:
    parser = _Balanced()
    parser.feed(written(tmp_path, series((0, 300)), declared(Lines("trace"))))
    assert "50 ± 2" in parser.text
    assert "eigenvalue[2]" in parser.text
    result = landscape()
    result["loss"][0, 0, :3] = np.inf
    page = written(tmp_path, result, LANDSCAPE)
    assert "<td>0.02</td>" in page
    assert "<td>3</td>" in page
    assert "loss, largest" in page


def test_a_failed_piece_has_dashes_rather_than_numbers(tmp_path: Path) -> None:
    page = written(tmp_path, series((0, 300), failed=(300,)), declared(Lines("trace")))
    row = next(line for line in page.splitlines() if ">failed<" in line)
    assert "<td>–</td>" in row
    assert "NaN" not in row


def test_provenance_is_on_the_page(tmp_path: Path) -> None:
    result = landscape(
        attributes={"command": "dynprobe landscape runs/a", "options": {"seed": 3}, "n_samples": 9}
    )
    page = written(tmp_path, result, LANDSCAPE)
    assert "<dt>command</dt><dd>dynprobe landscape runs/a</dd>" in page
    assert "<dt>options.seed</dt><dd>3</dd>" in page
    assert "A line about it" in page


def test_the_page_follows_the_readers_light_or_dark_setting(tmp_path: Path) -> None:
    page = written(tmp_path, landscape(), LANDSCAPE)
    assert "color-scheme: light dark" in page
    assert "prefers-color-scheme: dark" in page


def test_a_long_table_is_cut_and_says_so(tmp_path: Path) -> None:
    page = written(tmp_path, series(range(230)), declared(Lines("trace")))
    assert "30 more rows are in the report." in page
