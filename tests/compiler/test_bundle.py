"""A bundle appears whole or not at all, and every damage is noticed when it is opened."""

import errno
import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from keysieve.compiler.bundle import (
    FORMAT,
    MANIFEST,
    MODEL,
    REQUIRED,
    hash_file,
    new_folder,
    open_bundle,
    write_atomically,
    write_manifest,
)
from keysieve.compiler.config import EvictionConfig, PolicyConfig
from keysieve.errors import BundleError, KeySieveError
from support.bundles import tiny_bundle

SMALL = EvictionConfig(PolicyConfig("triattention"), budget=48, interval=16, sinks=2, recent=8)


@pytest.fixture
def bundle(root: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_bundle("llama", SMALL, root), tmp_path / "bundle"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle made by hand, without a model."""
    folder = tmp_path / "bundle"
    with new_folder(folder) as files:
        (files / MODEL).write_bytes(b"graph")
        (files / "part").mkdir()
        (files / "part" / "weights").write_bytes(bytes(10_000))
        write_manifest(files, dict.fromkeys(REQUIRED[1:], 0))
    return folder


def rewrite(folder: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


# -- writing -----------------------------------------------------------------------------------------------------------


def test_a_folder_takes_its_name_when_the_block_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "new" / "parent" / "bundle"
    with new_folder(path) as temporary:
        assert temporary.parent == path.parent and not path.exists()
        (temporary / "file").write_text("x")
    assert [file.name for file in path.parent.iterdir()] == ["bundle"]
    assert (path / "file").read_text() == "x"
    assert path.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt()])
def test_a_failed_block_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), new_folder(tmp_path / "new" / "parents" / "bundle") as temporary:
        (temporary / "file").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_and_says_so(tmp_path: Path) -> None:
    with (
        pytest.raises(BundleError, match=r"cannot write .*bundle: No space left on device; nothing was left behind"),
        new_folder(tmp_path / "bundle") as temporary,
    ):
        (temporary / "file").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_existing_output_is_kept(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bundle"
    if kind == "folder":
        path.mkdir()
    file = path / "mine" if kind == "folder" else path
    file.write_text("precious")
    with (
        pytest.raises(BundleError, match=r"bundle exists already; remove it or choose another name"),
        new_folder(path),
    ):
        pytest.fail("the block must not run")
    assert file.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [path]


def test_a_parent_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(BundleError, match=r"cannot create .*file/bundle"), new_folder(tmp_path / "file" / "bundle"):
        pytest.fail("the block must not run")
    assert (tmp_path / "file").read_text() == "precious"


def test_the_manifest_has_size_and_hash_of_every_file(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["format"] == FORMAT
    assert manifest["files"] == {
        MODEL: {"bytes": 5, "sha256": sha256(b"graph").hexdigest()},
        "part/weights": {"bytes": 10_000, "sha256": sha256(bytes(10_000)).hexdigest()},
    }
    assert hash_file(folder / MODEL) == sha256(b"graph").hexdigest()


def test_a_compiled_bundle_lists_all_its_files(bundle: Path) -> None:
    found = open_bundle(bundle)
    files = {file.name for file in bundle.iterdir()} - {MANIFEST}
    assert set(found.manifest["files"]) == files
    assert {MODEL, f"{MODEL}.data", "stats.safetensors", "config.json", "tokenizer.json"} <= files
    assert found.model == bundle / MODEL
    assert open_bundle(str(bundle)) == found


def test_a_text_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "report.json"
    write_atomically(path, "one")
    write_atomically(path, "two")
    assert path.read_text() == "two"
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(KeySieveError, match=r"cannot write .*report\.json: disk full"):
        write_atomically(path, "three")
    assert path.read_text() == "two"
    assert list(path.parent.iterdir()) == [path]


# -- opening -----------------------------------------------------------------------------------------------------------


def test_a_bundle_may_move(bundle: Path, tmp_path: Path) -> None:
    moved = bundle.rename(tmp_path / "elsewhere")
    assert open_bundle(moved).manifest["target"] == "onnxruntime"


def test_no_bundle_at_the_path(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no bundle at .*none: `keysieve compile MODEL -o .*none` makes one"):
        open_bundle(tmp_path / "none")
    with pytest.raises(BundleError, match=r"has no manifest\.json.*compile it again"):
        open_bundle(tmp_path)


@pytest.mark.parametrize("name", [MODEL, f"{MODEL}.data", "stats.safetensors", "tokenizer.json", "config.json"])
def test_every_file_is_checked(bundle: Path, name: str) -> None:
    file = bundle / name
    content = file.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    file.write_bytes(flipped)
    with pytest.raises(BundleError, match=rf"{name} was altered: its SHA-256 is not the manifest's"):
        open_bundle(bundle)
    file.write_bytes(content[:-1])
    size = len(content)
    with pytest.raises(BundleError, match=rf"{name} has {size - 1} bytes instead of {size}: it was truncated"):
        open_bundle(bundle)
    file.unlink()
    with pytest.raises(BundleError, match=rf"{name} is missing; compile the bundle again"):
        open_bundle(bundle)
    file.write_bytes(content)
    open_bundle(bundle)


@pytest.mark.parametrize("version", [FORMAT + 1, "1", None])
def test_another_format_is_refused(folder: Path, version: object) -> None:
    rewrite(folder, lambda manifest: manifest.update(format=version))
    with pytest.raises(
        BundleError, match=rf"manifest\.json has bundle format {version!r}, this keysieve reads format {FORMAT}"
    ):
        open_bundle(folder)


def test_a_manifest_that_is_no_json_is_refused(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    for damaged in (text[:-20], "", "\udcff".encode("utf-8", "surrogateescape").decode("latin-1")):
        (folder / MANIFEST).write_text(damaged, encoding="latin-1")
        with pytest.raises(BundleError, match=r"manifest\.json cannot be read: .*compile the bundle again"):
            open_bundle(folder)
    (folder / MANIFEST).write_text("[1, 2]")
    with pytest.raises(BundleError, match="has bundle format 'list'"):
        open_bundle(folder)


@pytest.mark.parametrize("name", [name for name in REQUIRED if name != "format"])
def test_a_manifest_that_lacks_a_field_is_refused(folder: Path, name: str) -> None:
    rewrite(folder, lambda manifest: manifest.pop(name))
    with pytest.raises(BundleError, match=rf"manifest\.json lacks {name}; compile the bundle again"):
        open_bundle(folder)


@pytest.mark.parametrize(
    ("files", "said"),
    [([], "names no files"), ({"program.json": 1}, "lacks size and SHA-256 of program.json")],
    ids=str,
)
def test_files_that_a_manifest_does_not_describe(folder: Path, files: object, said: str) -> None:
    rewrite(folder, lambda manifest: manifest.update(files=files))
    with pytest.raises(BundleError, match=said):
        open_bundle(folder)
