"""Guards of the package itself: nothing left out of the wheel, light imports, rooms that import one way."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import keysieve

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
ROOMS = {name: ROOT / folder for name, folder in PROJECT["tool"]["setuptools"]["package-dir"].items()}
# What each room may import besides itself and the leaves (errors and version).
MAY_IMPORT = {
    "kernels": set(),
    "plugins": {"kernels"},
    "passes": {"plugins", "kernels"},
    "export": {"passes", "plugins", "kernels"},
    "compiler": {"export", "passes", "plugins", "kernels"},
}
LEAVES = {"errors", "version"}


def sub_packages(name: str, folder: Path) -> set[str]:
    """The importable name of `folder` and of every package below it."""
    inits = folder.rglob("__init__.py")
    return {".".join((name, *init.parent.relative_to(folder).parts)) for init in inits}


def test_every_folder_with_code_is_listed_as_a_package() -> None:
    found = set().union(*(sub_packages(name, folder) for name, folder in ROOMS.items()))
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_every_room_is_mapped() -> None:
    assert {f"keysieve.{room}" for room in MAY_IMPORT} | {"keysieve"} == set(ROOMS)


def test_every_folder_with_python_files_is_a_package() -> None:
    folders = {file.parent for folder in ROOMS.values() for file in folder.rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]


def test_every_file_that_is_no_code_is_listed_as_data() -> None:
    listed = PROJECT["tool"]["setuptools"]["package-data"]
    for name, folder in ROOMS.items():
        for file in folder.rglob("*"):
            package = ".".join((name, *file.parent.relative_to(folder).parts))
            if file.is_file() and file.suffix not in (".py", ".pyc", ".so"):  # .so: built, not listed
                assert any(map(file.match, listed.get(package, []))), f"{file} would be missing from the wheel"


def test_every_public_name_is_found() -> None:
    missing = [name for name in keysieve.__all__ if not hasattr(keysieve, name)]
    assert not missing
    assert set(keysieve.__all__) <= set(dir(keysieve))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = keysieve.no_such_name


@pytest.mark.parametrize(
    "statement",
    ["import keysieve", "import keysieve; keysieve.EvictionConfig", "import keysieve.compiler.cli"],
)
def test_imports_are_light(statement: str) -> None:
    heavy = {"torch", "transformers", "onnx", "onnxruntime"}
    script = f"import sys; {statement}; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_help_loads_no_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "keysieve", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "calibrate" in result.stdout
    assert not [line for line in result.stderr.splitlines() if line.split("|")[-1].strip() == "torch"]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_one_way(room: str) -> None:
    allowed = MAY_IMPORT[room] | LEAVES | {room}
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {module}"
        for file in sorted(ROOMS[f"keysieve.{room}"].rglob("*.py"))
        for line, module in imported_modules(file)
        if module.split(".")[0] == "keysieve" and [*module.split("."), ""][1] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_make_help_only_prints() -> None:
    """A backtick in an echo would run what it quotes."""
    command = ["make", "--no-print-directory", "help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    lines = result.stdout.splitlines()
    assert lines and all(line.startswith("make ") for line in lines) and result.stderr == ""


def imported_modules(file: Path) -> list[tuple[int, str]]:
    """Line and absolute name of all that a file imports, inside functions too; relative ones are refused."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, name.name) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: write the import with its full name"
            if node.module == "keysieve":
                found += [(node.lineno, f"keysieve.{name.name}") for name in node.names]
            else:
                found.append((node.lineno, node.module or ""))
    return found
