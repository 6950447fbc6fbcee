"""docs/benchmarks.md and its pictures are what benchmarks/cpu.py makes of benchmarks/results/cpu.json."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from cpu_report import DOCS, PICTURES, report
from line_chart import line_chart

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "cpu.json"


@pytest.mark.skipif(not RESULT.is_file(), reason="nothing was measured yet")
def test_the_document_is_what_the_results_make() -> None:
    files = report(json.loads(RESULT.read_text()))
    for file, text in files.items():
        assert (DOCS / file).read_text() == text, f"{file}: run `python benchmarks/cpu.py --report`"
    assert {f"{PICTURES}/{file.name}" for file in (DOCS / PICTURES).iterdir()} <= set(files)


def test_what_was_not_measured_is_said() -> None:
    machine = {"cpu": "a CPU", "instructions": ["avx2"], "cores": 2, "memory_gb": 8, "system": "a system"}
    versions = {"official": "not run: not given (--official DIR)"}
    text = report({"machine": machine, "versions": versions, "rows": [], "ratios": {}})["benchmarks.md"]
    assert "| official | not run: not given (--official DIR) |" in text
    assert "| int4: llama.cpp's window shift |  | at most 1.05 | not measured |  |" in text


def test_a_chart_has_every_line_inside_its_axes() -> None:
    lines = {f"line <{number}>": [(0.0, number), (128.0, 3.0 * number)] for number in range(1, 11)}
    root = ElementTree.fromstring(line_chart("A & B", "tokens", "ms", lines))
    polylines = [element for element in root if element.tag.endswith("polyline")]
    points = [tuple(map(float, point.split(","))) for line in polylines for point in line.get("points").split()]
    assert len(polylines) == 10
    assert len({(line.get("stroke"), line.get("stroke-dasharray")) for line in polylines}) == 10
    assert all(70 <= x <= 630 and 48 <= y <= 348 for x, y in points)
    texts = [element.text for element in root if element.tag.endswith("text")]
    assert "A & B" in texts
    assert "line <10>" in texts
