"""The short way to ONNX gives what torch.onnx.export gives, and the long way is still open."""

import sys
from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.export import Dim, export

import keysieve.export
from keysieve.errors import ExportError
from keysieve.export.translate import translate

pytestmark = pytest.mark.slow


class Mixed(nn.Module):
    """Casts, mixed dtypes and a reshape; with `also`, an operation that torch has to decompose."""

    def __init__(self, also):
        super().__init__()
        self.also = also
        self.linear = nn.Linear(6, 4, dtype=torch.float16)

    def forward(self, numbers, positions):  # [B,S,6] float16, [B,S] int32
        hidden = torch.sqrt(self.linear(numbers).abs())
        hidden = hidden.to(torch.float32).to(torch.float32) + positions.unsqueeze(-1) * 2
        heads = hidden.reshape(*hidden.shape[:2], 2, -1) / (positions[..., None, None] + 1)
        return self.also(heads), (positions >= 1).to("cpu", torch.int64).cumsum(1)


def nothing(tensor):
    return tensor


def in_place(tensor):
    kept = tensor * 2
    before = kept + 1
    kept.add_(before)
    return kept - before


def through_a_view(tensor):
    kept = tensor * 2
    view = kept[..., 0]
    kept.add_(1.0)
    return view * kept[..., 1]


def into_a_shorter_dtype(tensor):
    return tensor.half().mul_(tensor)


def composite(tensor):
    return tensor.square()


def unknown(tensor):
    return torch.special.bessel_j0(tensor)


def mixed(also):
    torch.manual_seed(0)
    return Mixed(also).eval()


def program(also):
    sizes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    inputs = torch.rand(5, 7, 6, dtype=torch.float16), torch.zeros(5, 7, dtype=torch.int32)
    return export(mixed(also), inputs, dynamic_shapes=(sizes, sizes), strict=False)


def translated(also):
    with torch.no_grad():
        return translate(program(also), ["numbers", "positions"], ["heads", "steps"], {})


@pytest.fixture
def long_way(monkeypatch):
    monkeypatch.setitem(sys.modules, "keysieve.export.torch_steps", None)
    monkeypatch.delattr(keysieve.export, "torch_steps", raising=False)


def results(model):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    given = {
        "numbers": generator.normal(size=(2, 3, 6)).astype(np.float16),
        "positions": np.array([[0, 1, 2], [7, 8, 9]], np.int32),
    }
    return given, session.run(["heads", "steps"], given)


def operators(model):
    return Counter(node.op_type for node in model.graph if node.op_type not in ("Identity", "Constant"))


@pytest.mark.parametrize("also", [nothing, in_place, through_a_view, into_a_shorter_dtype, composite])
def test_the_model_computes_what_torch_computes(also):
    given, found = results(translated(also))
    with torch.no_grad():
        expected = mixed(also)(*map(torch.from_numpy, given.values()))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.numpy().dtype
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("also", "expected"),
    [(nothing, 0), (in_place, 0), (through_a_view, 1), (into_a_shorter_dtype, 1), (composite, 1)],
)
def test_only_what_needs_it_is_decomposed(also, expected, monkeypatch):
    from keysieve.export import torch_steps

    seen = []
    decompose = torch_steps.decompose_with_registry
    monkeypatch.setattr(
        torch_steps, "decompose_with_registry", lambda *arguments: seen.append(1) or decompose(*arguments)
    )
    translated(also)
    assert len(seen) == expected


def test_short_and_long_way_agree(request):
    short = translated(nothing)
    request.getfixturevalue("long_way")
    long = translated(nothing)
    assert "keysieve.export.torch_steps" in sys.modules and sys.modules["keysieve.export.torch_steps"] is None
    assert operators(short) == operators(long)
    assert short.opset_imports == long.opset_imports
    assert [(v.name, v.dtype) for v in short.graph.outputs] == [(v.name, v.dtype) for v in long.graph.outputs]
    for one, other in zip(results(short)[1], results(long)[1], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("way", ["short", "long"])
def test_an_operation_without_onnx_form_is_named(way, request):
    if way == "long":
        request.getfixturevalue("long_way")
    with pytest.raises(ExportError, match="bessel_j0"):
        translated(unknown)


def test_an_input_that_loses_a_size_on_the_way(monkeypatch):
    """As where a step of torch asks for the number, and so makes the example the only one."""
    from keysieve.export import torch_steps

    promote = torch_steps._promote

    def asks(module):
        assert int(next(n for n in module.graph.nodes if n.name == "numbers").meta["val"].shape[0]) == 5
        promote(module)

    monkeypatch.setattr(torch_steps, "_promote", asks)
    with pytest.raises(ExportError, match="input numbers has 5 for size 0 in the ONNX graph, and may have any"):
        translated(nothing)
