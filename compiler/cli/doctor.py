"""keysieve doctor: what is installed, and what can be built and run here."""

from argparse import ArgumentParser, Namespace
from typing import Any

from keysieve.compiler.cli.terminal import show, show_json, table


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: Namespace) -> int:
    from keysieve.compiler.doctor import doctor

    report = doctor()
    if args.json:
        show_json(report)
    else:
        show(_text(report))
    return 0


def _text(report: dict[str, Any]) -> str:
    cpu = report["cpu"]
    machine = [
        ("keysieve", report["keysieve"]),
        ("python", report["python"]),
        ("platform", report["platform"]),
        ("CPU", f"{cpu['usable']} of {cpu['count']} logical CPUs usable"),
        ("GPU", ", ".join(report["gpus"]) or "no NVIDIA GPU found"),
        ("nvcc", report["nvcc"] or "not found"),
        ("C++ compiler", report["cxx"] or "not found"),
        ("custom ops", report["custom_ops"] or "not built: `keysieve plugin build --ort`"),
        *((name, found or "not installed") for name, found in report["packages"].items()),
    ]
    targets = [
        (entry["target"], "yes" if entry["build"] else "no", "yes" if entry["run"] else "no", entry["reason"])
        for entry in report["targets"]
    ]
    return f"{table(machine)}\n\n{table([('target', 'builds', 'runs', ''), *targets])}"
