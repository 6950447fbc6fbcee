"""What mixes tokens beside attention is refused, by layer; all models that compile elsewhere in the tests pass."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from keysieve.compiler import check_split as module
from keysieve.compiler import compile as compile_module
from keysieve.compiler.check_split import check_split
from keysieve.compiler.compile import compile
from keysieve.compiler.config import CompileConfig, EvictionConfig, PolicyConfig
from keysieve.compiler.progress import Progress
from keysieve.errors import MatchError
from keysieve.passes.graph import Graph
from support.bundles import tiny_folder
from support.graphs import ToyDecoder, evicting
from support.tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


class Mixing(nn.Module):
    """A module whose tokens see a share of their neighbour on the left."""

    def __init__(self, inner: nn.Module, share: float = 0.5):
        super().__init__()
        self.inner, self.share = inner, share

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return x + self.share * nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]


def toy() -> ToyDecoder:
    return ToyDecoder(lambda query, key, positions: (query, key))


def checked(model: nn.Module) -> None:
    check_split(evicting(model, "key-norm", "union"), [7])


def test_attention_alone_passes() -> None:
    checked(toy())


@pytest.mark.parametrize("share", [0.5, 0.02])
def test_tokens_mixed_before_the_attention(share: float) -> None:
    model = toy()
    model.embedding = Mixing(model.embedding, share)
    with pytest.raises(MatchError, match=r"keys and values of layer 7 depend .*: something before its attention mixes"):
        checked(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_mixed_behind_the_last_attention(dtype: torch.dtype) -> None:
    model = toy()
    model.out = Mixing(model.out)
    with pytest.raises(MatchError, match=r"the logits depend .*: something behind the attention of layer 7 mixes"):
        checked(model.to(dtype))


def test_a_difference_counts_if_every_text_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where two experts are as good for a token, and rounding decides."""
    found = [0, None, 0]
    monkeypatch.setattr(module, "first_difference", lambda graph, layers, seed: found[seed])
    checked(toy())
    found[1] = 0
    with pytest.raises(MatchError):
        checked(toy())


def test_compile_refuses_before_anything_is_written(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the class of the module that does it; without weights (a dry run) there is nothing to compare."""
    model = tiny_model("llama_mha")
    model.model.layers[0].mlp = Mixing(model.model.layers[0].mlp)
    monkeypatch.setattr(compile_module, "load_model", lambda *arguments: model)
    config = CompileConfig(EvictionConfig(PolicyConfig("key-norm")))
    with pytest.raises(MatchError, match=r"keys and values of layer 1 depend .* behind the attention of layer 0 mixes"):
        compile(tiny_folder("llama_mha", root), tmp_path / "bundle", config, Progress(quiet=True))
    assert list(tmp_path.iterdir()) == []


def test_compile_refuses_what_is_right_for_one_batch(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shape of a product in numbers, as some torch may have it, and nothing that torch itself notices."""
    refresh = Graph.refresh

    def in_numbers(graph: Graph, node: Node) -> None:
        refresh(graph, node)
        if node.target is torch.ops.aten.linear.default:
            with graph.fake_mode:
                node.meta["val"] = torch.empty([211, 229, int(graph.shape(node)[2])])

    monkeypatch.setattr(Graph, "refresh", in_numbers)
    config = CompileConfig(EvictionConfig(PolicyConfig("key-norm")))
    with pytest.raises(MatchError, match=r"node linear_\d+ \(aten.linear.default\) was made for one size alone"):
        compile(tiny_folder("llama_mha", root), tmp_path / "bundle", config, Progress(quiet=True))
    assert list(tmp_path.iterdir()) == []
