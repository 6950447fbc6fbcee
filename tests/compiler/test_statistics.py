import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from keysieve.compiler import statistics_file as module
from keysieve.compiler.official_statistics import load_official, save_official
from keysieve.compiler.query_moments import QueryMoments
from keysieve.compiler.statistics import LayerStatistics, Statistics, check_matches
from keysieve.compiler.statistics_file import load, read, save
from keysieve.errors import StatisticsError
from keysieve.passes.rope_form import RopeForm
from support.statistics import HEADS, IDENTITY, assert_same_layer, gather, make, paired, queries, rope, ropes_of

CASE7 = Path(__file__).parent.parent / "data" / "case7_calibrate_llama_tiny.npz"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "stats.safetensors"


# Accumulation


def rope_and_back(q, inv_freq):
    """q [H, N, D] rotated and turned back in its own precision, as the official calibrator does."""
    angle = torch.outer(torch.arange(q.shape[1]).float(), inv_freq).repeat(1, 2)
    cos, sin = angle.cos().to(q.dtype), angle.sin().to(q.dtype)

    def turn(x):
        left, right = x.chunk(2, dim=-1)
        return torch.cat([-right, left], dim=-1)

    rotated = q * cos + turn(q) * sin
    return rotated * cos - turn(rotated) * sin


@pytest.mark.parametrize(("rounded_as_official", "tolerance"), [(False, 1e-2), (True, 1e-6)])
def test_golden_calibration(rounded_as_official, tolerance):
    """The official run was bfloat16 and read the queries back from rotated ones; we take them before RoPE."""
    with np.load(CASE7, allow_pickle=False) as file:
        case = dict(file)
    form = RopeForm("half_split", 32, 32, case["inv_freq"].astype(np.float64))
    for layer, q in enumerate(torch.from_numpy(case["q_pre_rope"]).bfloat16()):
        if rounded_as_official:
            q = rope_and_back(q, torch.from_numpy(case["inv_freq"]))
        moments = QueryMoments(form, 4, layer)
        moments.add(q[None, :, :50])
        moments.add(q[None, :, 50:])
        found = moments.finish()
        assert found.layer == layer and moments.tokens == 96
        np.testing.assert_allclose(found.q_mean[:, :16], case["q_mean_real"][layer], atol=tolerance)
        np.testing.assert_allclose(found.q_mean[:, 16:], case["q_mean_imag"][layer], atol=tolerance)
        np.testing.assert_allclose(found.q_abs, case["q_abs_mean"][layer], atol=tolerance)


@pytest.mark.parametrize(
    "form", [rope(), rope("interleaved"), rope(rotary_dim=6), rope("interleaved", 6), rope("nope", 0)]
)
def test_means_of_every_rope_form(form):
    q = queries().double()
    found = gather(form, q=q)
    by_token = q.transpose(1, 2).reshape(-1, HEADS, 16).numpy()
    np.testing.assert_allclose(found.q_mean, by_token.mean(axis=0), atol=1e-12)  # un-rotated dims too
    real, imaginary = form.pairs
    pairs = by_token[..., real] + 1j * by_token[..., imaginary]
    np.testing.assert_allclose(found.q_abs, np.abs(pairs).mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(found.resultant, np.abs(pairs.mean(axis=0)) / np.abs(pairs).mean(axis=0), atol=1e-12)


def test_two_halves_equal_the_whole():
    q = queries(tokens=1001).half()
    whole, halves = QueryMoments(rope(), HEADS), QueryMoments(rope(), HEADS)
    whole.add(q)
    halves.add(q[:, :, :300])
    halves.add(q[:, :, 300:])
    assert whole.tokens == halves.tokens == 2002
    assert_same_layer(whole.finish(), halves.finish(), atol=1e-12)


def test_resumes_from_finished_statistics(path):
    q = queries(tokens=1001)
    whole, first = QueryMoments(rope(), HEADS, layer=5), QueryMoments(rope(), HEADS, layer=5)
    whole.add(q)
    first.add(q[:, :, :300])
    save(Statistics([first.finish()], first.tokens, 2002, "feed", IDENTITY), path)
    saved = load(path)
    resumed = QueryMoments.resume(saved.layers[0], saved.tokens)
    resumed.add(q[:, :, 300:])
    assert resumed.tokens == 2002
    assert_same_layer(resumed.finish(), whole.finish(), atol=1e-12)
    np.testing.assert_array_equal(first.finish().q_mean, saved.layers[0].q_mean)  # resume copied


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masked_tokens_do_not_count(dtype):
    q = queries(tokens=10)
    mask = torch.ones(2, 10, dtype=dtype)
    mask[1, 6:] = 0
    padded = q.clone()
    padded[1, :, 6:] = float("nan")
    moments, expected = QueryMoments(rope(), HEADS), QueryMoments(rope(), HEADS)
    moments.add(padded, mask)
    expected.add(q[:1])
    expected.add(q[1:, :, :6])
    assert moments.tokens == 16
    assert_same_layer(moments.finish(), expected.finish(), atol=1e-12)


def test_no_token_is_an_error():
    moments = QueryMoments(rope(), HEADS, layer=3)
    moments.add(queries(tokens=2), torch.zeros(2, 2))
    with pytest.raises(StatisticsError, match="layer 3: no token"):
        moments.finish()


def test_nan_queries_are_an_error():
    q = queries()
    q[0, 1, 2, 3] = float("nan")
    with pytest.raises(StatisticsError, match="layer 2: q_mean holds NaN"):
        gather(rope(), 2, q)


def test_queries_or_mask_of_another_shape_are_an_error():
    moments = QueryMoments(rope(), HEADS, layer=1)
    with pytest.raises(StatisticsError, match=r"layer 1: queries .*\[2, 3, 40, 16\].*\[B, 4, N, 16\]"):
        moments.add(queries(heads=3))
    with pytest.raises(StatisticsError, match=r"layer 1: mask .*\[2, 39\].*\[2, 40\]"):
        moments.add(queries(), torch.ones(2, 39))
    assert moments.tokens == 0


@pytest.mark.filterwarnings("error")
def test_resultant_of_a_dead_band_is_zero():
    q = queries()
    q[:, 2, :, [3, 11]] = 0
    resultant = gather(rope(), q=q).resultant
    assert resultant[2, 3] == 0
    assert (resultant[:2] > 0).all() and (resultant <= 1).all()


# The file


def test_round_trip(path):
    statistics = make(rope(), rope("interleaved", 6, 1.2), rope("nope", 0), paired())
    save(statistics, path)
    found = load(path)
    assert (found.tokens, found.tokens_planned, found.text_sha256) == (80, 100, "feed")
    assert found.model == IDENTITY
    for entry, expected in zip(found.layers, statistics.layers, strict=True):
        assert_same_layer(entry, expected)
    tensors = load_file(path)
    assert tensors["layers.001.q_mean"].dtype == np.float64
    assert sorted(tensors)[:3] == ["layers.000.inv_freq", "layers.000.q_abs", "layers.000.q_mean"]


def test_save_replaces_the_file_and_does_not_write_into_it(path):
    save(make(), path)
    with path.open("rb") as reader:
        before = path.read_bytes()
        save(make(rope("interleaved")), path)
        assert reader.read() == before
    assert path.read_bytes() != before


def test_a_failed_save_leaves_the_old_file_and_no_other(path, monkeypatch):
    save(make(), path)
    before = path.read_bytes()

    def fail(tensors, temporary, metadata):
        Path(temporary).write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(module, "save_file", fail)
    with pytest.raises(StatisticsError, match="disk full"):
        save(make(rope("interleaved")), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("write", [save, save_official])
def test_a_missing_folder_is_an_error(write, tmp_path):
    with pytest.raises(StatisticsError, match=r"cannot write .*absent"):
        write(make(), tmp_path / "absent" / "stats")


def test_a_missing_file_is_an_error(path):
    for reader in (load, lambda p: load_official(p, IDENTITY, [], []), lambda p: read(p, IDENTITY, [], [])):
        with pytest.raises(StatisticsError, match=r"stats\.safetensors: no such file.*keysieve calibrate"):
            reader(path)


@pytest.mark.parametrize("content", [b"", b"hello, this is text", b"PK\x03\x04 a zip"])
def test_a_file_that_is_not_safetensors_is_an_error(path, content):
    path.write_bytes(content)
    with pytest.raises(StatisticsError, match=r"stats\.safetensors is no readable safetensors file"):
        load(path)


def rewrite(path, change_tensors=lambda tensors: None, change_metadata=lambda metadata: None):
    """Change a saved file in place."""
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change_tensors(tensors)
    change_metadata(metadata)
    save_file(tensors, path, metadata)


def change_header(change):
    def apply(metadata):
        header = json.loads(metadata["statistics"])
        change(header)
        metadata["statistics"] = json.dumps(header)

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version="4"), "format version 4, this keysieve reads 1 and 3"),
        (lambda m: m.pop("format"), "not a keysieve statistics file"),
        (lambda m: m.pop("statistics"), "damaged metadata"),
        (lambda m: m.update(statistics="{"), "damaged metadata"),
        (change_header(lambda h: h.pop("tokens")), "damaged metadata.*tokens"),
        (change_header(lambda h: h["layers"][1]["rope"].pop("kind")), "damaged metadata.*kind"),
        (change_header(lambda h: h["layers"][1]["rope"].update(kind="spiral")), "layer 1: .*rope 'spiral'"),
        (change_header(lambda h: h["layers"][1]["rope"].update(rotary_dim=18)), "layer 1: .*rotary_dim 18"),
        (change_header(lambda h: h["layers"][1]["rope"].update(rotary_dim=8)), "layer 1: inv_freq has shape"),
        (
            change_header(lambda h: h["layers"][1].update(layer=7)),
            "layer 7: tensor layers.007.inv_freq is missing",
        ),
    ],
)
def test_damaged_metadata_is_an_error(path, change, message):
    save(make(), path)
    rewrite(path, change_metadata=change)
    with pytest.raises(StatisticsError, match=rf"stats\.safetensors: .*{message}") as error:
        load(path)
    assert "calibrate" in str(error.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["q_mean", "q_abs", "inv_freq"])
def test_values_that_are_not_finite_name_layer_and_tensor(path, name, bad):
    save(make(), path)
    rewrite(path, lambda tensors: tensors[f"layers.001.{name}"].flat.__setitem__(0, bad))
    with pytest.raises(StatisticsError, match=f"layer 1: {name} holds NaN or infinity"):
        load(path)


@pytest.mark.parametrize("name", ["q_mean", "q_abs", "inv_freq"])
@pytest.mark.parametrize("cut", [lambda a: a[..., :-1], lambda a: a[None], lambda a: a.sum()])
def test_wrong_shapes_are_an_error(path, name, cut):
    save(make(), path)

    def change(tensors):
        tensors[f"layers.001.{name}"] = np.ascontiguousarray(cut(tensors[f"layers.001.{name}"])).reshape(
            np.shape(cut(tensors[f"layers.001.{name}"]))
        )

    rewrite(path, change)
    with pytest.raises(StatisticsError, match=r"layer 1: \w+ has shape \["):
        load(path)


def test_head_counts_of_mean_and_magnitude_must_agree(path):
    save(make(), path)
    rewrite(path, lambda tensors: tensors.update({"layers.000.q_abs": tensors["layers.000.q_abs"][:3].copy()}))
    with pytest.raises(StatisticsError, match=r"layer 0: q_abs has shape \[3, 8\] instead of \[4, 8\]"):
        load(path)


def test_another_dtype_is_an_error(path):
    save(make(), path)
    rewrite(
        path,
        lambda tensors: tensors.update({"layers.000.q_abs": tensors["layers.000.q_abs"].astype(np.float32)}),
    )
    with pytest.raises(StatisticsError, match="layer 0: q_abs is of type F32 instead of F64"):
        load(path)


def test_magnitude_below_the_mean_is_impossible(path):
    entry = make().layers[0]
    magnitude = entry.mean_magnitude.copy()
    dataclasses.replace(entry, q_abs=magnitude * (1 - 1e-6))  # rounding
    magnitude[1, 2] *= 0.99
    with pytest.raises(StatisticsError, match=r"layer 0: q_abs of head 1, band 2 is .*impossible"):
        dataclasses.replace(entry, q_abs=magnitude)
    save(make(), path)
    rewrite(path, lambda tensors: tensors["layers.001.q_abs"].__imul__(0.1))
    with pytest.raises(StatisticsError, match=r"stats\.safetensors: layer 1: q_abs"):
        load(path)


# The model they belong to


def test_matching_statistics_pass(path):
    statistics = make(rope(scaling=1.1), rope("interleaved", 6))
    nearly = [
        dataclasses.replace(r, inv_freq=r.inv_freq * (1 + 1e-6), scaling=r.scaling * (1 + 1e-7))
        for r in ropes_of(statistics)
    ]
    check_matches(statistics, IDENTITY, nearly)


@pytest.mark.parametrize("name", IDENTITY)
def test_every_identity_field_is_compared(name):
    other = {**IDENTITY, name: "other"}
    with pytest.raises(StatisticsError, match=f"{name} is {IDENTITY[name]!r} in the file and 'other'.*calibrate"):
        check_matches(make(), other, [rope(), rope()])


def test_an_identity_field_that_one_side_lacks_is_a_difference():
    with pytest.raises(StatisticsError, match="revision is nothing in the file and 'r1' in the model"):
        check_matches(make(), {**IDENTITY, "revision": "r1"}, [rope(), rope()])
    with pytest.raises(StatisticsError, match="layers is 2 in the file and nothing in the model"):
        check_matches(make(), {k: v for k, v in IDENTITY.items() if k != "layers"}, [rope(), rope()])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ([rope()], "number of attention layers is 2 in the file and 1 in"),
        ([rope(), rope("interleaved")], "layer 1: rope kind is 'half_split' in the file and 'interleaved'"),
        ([rope(), rope(rotary_dim=8)], "layer 1: rope rotary_dim is 16 in the file and 8"),
        ([rope(), rope(scaling=1.1)], "layer 1: rope scaling is 1.0 in the file and 1.1"),
        ([rope(), rope(theta=1.001e4)], "layer 1: rope inv_freq of band 1 is 0.316.* in the file and 0.316"),
        ([RopeForm("half_split", 32, 16, rope().inv_freq), rope()], "layer 0: rope head_dim is 16 .* and 32"),
    ],
)
def test_every_part_of_the_rope_is_compared(other, message):
    with pytest.raises(StatisticsError, match=f"{message}.*calibrate again"):
        check_matches(make(), IDENTITY, other)


# Choosing the format


@pytest.mark.parametrize("name", ["stats.safetensors", "stats.bin"])
def test_read_takes_own_files_and_checks_them(tmp_path, name):
    save(make(), tmp_path / name)
    assert read(tmp_path / name, IDENTITY, [rope(), rope()], [HEADS, HEADS]).tokens == 80
    with pytest.raises(StatisticsError, match="config_sha256"):
        read(tmp_path / name, {**IDENTITY, "config_sha256": "other"}, [rope(), rope()], [HEADS, HEADS])
    with pytest.raises(StatisticsError, match="layer 1: number of query heads is 4 in the file and 8"):
        read(tmp_path / name, IDENTITY, [rope(), rope()], [HEADS, 8])


@pytest.mark.parametrize("name", ["stats.pt", "stats.bin"])
def test_read_takes_official_files_by_content(tmp_path, name):
    save_official(make(), tmp_path / name)
    found = read(tmp_path / name, IDENTITY, [rope(), rope()], [HEADS, HEADS])
    assert isinstance(found.layers[1], LayerStatistics)


def test_read_takes_a_pt_suffix_at_its_word(tmp_path):
    path = tmp_path / "stats.pt"
    path.write_bytes(b"not a zip")
    with pytest.raises(StatisticsError, match="no readable TriAttention file"):
        read(path, IDENTITY, [rope()], [HEADS])
