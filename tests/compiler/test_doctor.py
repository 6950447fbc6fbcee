"""The doctor's report: JSON-ready, light, and honest about what cannot be used."""

import json
import subprocess
import sys

from packaging.specifiers import SpecifierSet

from keysieve.compiler.doctor import PACKAGES, doctor, needed_versions, targets

ALL = dict.fromkeys(PACKAGES, "100.0")


def by_name(entries: list[dict]) -> dict[str, dict]:
    return {entry["target"]: entry for entry in entries}


def test_report_of_this_machine() -> None:
    report = json.loads(json.dumps(doctor()))
    assert set(report["packages"]) == set(PACKAGES)
    assert report["packages"]["torch"]
    assert report["cpu"]["usable"] >= 1
    found = by_name(report["targets"])
    assert set(found) == {"onnx", "onnxruntime", "openvino", "torch", "tensorrt-rtx", "tensorrt"}
    assert found["onnxruntime"] == {"target": "onnxruntime", "build": True, "run": True, "reason": ""}


def test_no_heavy_import() -> None:
    script = (
        "import sys; from keysieve.compiler.doctor import doctor; doctor(); "
        "print(sorted({'torch', 'transformers', 'onnx', 'onnxruntime', 'openvino'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_versions_come_from_the_package_metadata() -> None:
    needed = needed_versions()
    assert "2.10" not in needed["torch"]
    assert "2.11" in needed["torch"]


def test_a_missing_package_is_named_with_its_command() -> None:
    entry = by_name(targets(ALL | {"onnxruntime": None}, {"onnxruntime": SpecifierSet(">=1.27")}))["onnxruntime"]
    assert entry["build"] and not entry["run"]
    assert entry["reason"] == "onnxruntime is not installed (pip install 'onnxruntime>=1.27')"


def test_an_old_package_is_named_with_both_versions() -> None:
    entry = by_name(targets(ALL | {"torch": "2.1.0"}, {"torch": SpecifierSet(">=2.13")}))["openvino"]
    assert not entry["build"] and entry["run"]
    assert "torch 2.1.0 is installed, >=2.13 is needed" in entry["reason"]


def test_a_local_version_counts_as_its_release() -> None:
    assert by_name(targets(ALL | {"torch": "2.13.0+cpu"}, {"torch": SpecifierSet(">=2.13")}))["onnx"]["build"]


def test_an_onnx_file_without_any_runtime_cannot_run() -> None:
    entry = by_name(targets(ALL | {"onnxruntime": None, "openvino": None}, {}))["onnx"]
    assert entry["build"] and not entry["run"]
    assert "onnxruntime is not installed" in entry["reason"] and "openvino is not installed" in entry["reason"]


def test_torch_runs_on_a_cpu_and_says_what_a_gpu_lacks() -> None:
    reasons = [
        by_name(targets(ALL | packages, {}, gpu=gpu))["torch"]
        for packages, gpu in (({}, True), ({}, False), ({"triton": None}, True))
    ]
    assert all(entry["build"] and entry["run"] for entry in reasons)
    assert [entry["reason"] for entry in reasons[:2]] == ["", "on the CPU: there is no NVIDIA GPU"]
    assert reasons[2]["reason"].startswith("on the CPU: triton is not installed")


def test_tensorrt_is_built_without_a_gpu_and_run_with_one() -> None:
    for name in ("tensorrt-rtx", "tensorrt"):
        assert by_name(targets(ALL, {}))[name] == {"target": name, "build": True, "run": True, "reason": ""}
        entry = by_name(targets(ALL, {}, gpu=False))[name]
        assert (entry["build"], entry["run"], entry["reason"]) == (True, False, "running needs an NVIDIA GPU")
        entry = by_name(targets(ALL, {}, cxx=False))[name]
        assert not entry["build"] and "no C++ compiler on PATH" in entry["reason"]


def test_tensorrt_rtx_is_named_with_its_distribution() -> None:
    needed = needed_versions()
    entry = by_name(targets(ALL | {"tensorrt_rtx": None}, {"tensorrt-rtx-cu13": needed["tensorrt-rtx-cu13"]}))[
        "tensorrt-rtx"
    ]
    assert not entry["build"] and not entry["run"]
    assert entry["reason"] == "tensorrt_rtx is not installed (pip install 'tensorrt-rtx-cu13==1.7.1.116')"


def test_without_tensorrt_a_script_is_written() -> None:
    entry = by_name(targets(ALL | {"tensorrt": None}, {}))["tensorrt"]
    assert entry["build"] and not entry["run"]
    assert "tensorrt is not installed" in entry["reason"] and "a script builds the plan elsewhere" in entry["reason"]
