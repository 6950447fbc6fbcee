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
    return tensor.clone().add_(1.0).square()


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


@pytest.mark.parametrize("also", [nothing, in_place])
def test_the_model_computes_what_torch_computes(also):
    given, found = results(translated(also))
    with torch.no_grad():
        expected = mixed(also)(*map(torch.from_numpy, given.values()))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.numpy().dtype
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-3, atol=1e-3)


def test_only_what_needs_it_is_decomposed(monkeypatch):
    from keysieve.export import torch_steps

    seen = []
    decompose = torch_steps.decompose_with_registry
    monkeypatch.setattr(
        torch_steps, "decompose_with_registry", lambda *arguments: seen.append(1) or decompose(*arguments)
    )
    translated(nothing)
    assert not seen
    translated(in_place)
    assert seen


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
