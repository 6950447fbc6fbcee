"""Capture: a HuggingFace decoder becomes one torch.export graph with an explicit attention node per layer."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export

import keysieve.plugins.torch.ops  # noqa: F401  (registers torch.ops.keysieve)
from keysieve.compiler.linear_layers import explicit_linear_layers
from keysieve.errors import CaptureError
from keysieve.passes.graph import Graph

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION_NAME = "keysieve"
# The model's attention through our own function where it can, else the two forms that lower_attention knows.
IMPLEMENTATIONS = [ATTENTION_NAME, "sdpa", "eager"]


def attention_function(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The function transformers calls for attention: one node, K and V not repeated, every option explicit.

    query [B,Hq,S,D], key and value [B,Hkv,S,D] -> [B,S,Hq,D]. Raises CaptureError for attention that is not causal.
    """
    layer = getattr(module, "layer_idx", None)
    where = f"layer {layer} ({type(module).__name__})"
    causal = options.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise CaptureError(f"{where}: attention is not causal, so the model is no decoder; keysieve needs a decoder")
    sinks = options.get("s_aux")
    result = torch.ops.keysieve.attention(
        query,
        key,
        value,
        sinks,
        attention_mask,
        float(scaling if scaling is not None else query.shape[-1] ** -0.5),
        int(options.get("sliding_window") or 0),
        0,
        float(options.get("softcap") or 0.0),
        -1 if layer is None else int(layer),
    )
    return result.transpose(1, 2).contiguous(), None


def mask_function(*arguments: Any, **options: Any) -> torch.Tensor:
    """The function transformers calls for masks: [B,1,S,S], never left out, so that find_attention can read it."""
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*arguments, **{**options, "allow_is_causal_skip": False, "use_vmap": False})


class _Decoder(nn.Module):
    """forward(input_ids [B,S], position_ids [B,S]) -> logits [B,S,V], without a cache."""

    def __init__(self, model: "PreTrainedModel"):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits


def capture(model: "PreTrainedModel", implementation: str | None = None, only_to_find: bool = False) -> Graph:
    """Export `model` with dynamic batch and sequence sizes; returns the graph that passes work on.

    implementation: force one attention implementation ("keysieve", "sdpa" or "eager"); by default the first works.
    only_to_find: fixed sizes, which takes half the time and is enough to find RoPE, where "keysieve" works.
    Raises CaptureError with the exporter's own words when the model cannot be exported.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, attention_function)
    AttentionMaskInterface.register(ATTENTION_NAME, mask_function)
    wanted = [implementation] if implementation else IMPLEMENTATIONS
    reasons: list[str] = []
    previous = model.config._attn_implementation
    for name in wanted:
        try:
            model.set_attn_implementation(name)
        except (ValueError, ImportError) as error:
            reasons.append(f"{name}: {error}")
            continue
        try:
            graph = Graph(_export(model, dynamic=not only_to_find or name != ATTENTION_NAME))
        finally:
            model.set_attn_implementation(previous)
        if name != ATTENTION_NAME or graph.calls(torch.ops.keysieve.attention.default):
            return _tidy(graph)
        reasons.append(f"{name}: the model does not use transformers' AttentionInterface")
    raise CaptureError(f"{type(model).__name__}: no attention implementation could be captured: {'; '.join(reasons)}")


def _export(model: "PreTrainedModel", dynamic: bool) -> ExportedProgram:
    # Primes that no other size of a model equals, and above 1: export would take 0 or 1 for a constant.
    batch, tokens = 211, 223
    input_ids = torch.zeros(batch, tokens, dtype=torch.long)
    position_ids = torch.arange(tokens).repeat(batch, 1)
    sizes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} if dynamic else None
    try:
        with (
            torch.no_grad(),
            _unchanged(model),
            _masks_without_vmap(),
            explicit_linear_layers(model),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, about pytrees
            return export(
                _Decoder(model.eval()),
                (input_ids, position_ids),
                dynamic_shapes={"input_ids": sizes, "position_ids": sizes},
                strict=False,
            )
    except CaptureError:
        raise
    except Exception as error:  # torch.export raises many kinds; the cause stays attached
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CaptureError(
            f"{type(model).__name__} could not be captured by torch.export: {first} "
            "(the model must be a decoder that runs with input_ids, position_ids and use_cache=False)"
        ) from error


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Undo what the model assigns to its modules in the block: an export leaves tensors without values."""
    before = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)


@contextmanager
def _masks_without_vmap() -> Iterator[None]:
    """Masks of a model's own are made by broadcasting: older transformers use vmap, which passes cannot evaluate."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as INTERFACE

    before = {name: INTERFACE[name] for name in ("sdpa", "eager")}

    def without(make: Any) -> Any:
        return lambda *args, **options: make(*args, **{**options, "use_vmap": False})

    try:
        for name, make in before.items():
            INTERFACE[name] = without(make)
        yield
    finally:
        for name, make in before.items():
            INTERFACE[name] = make


def _tidy(graph: Graph) -> Graph:
    """Drop what only slows the passes down: metadata assertions, detach, dropout at rest, casts to the same dtype."""
    aten = torch.ops.aten
    for node in list(graph.fx.nodes):
        if node.op != "call_function":
            continue
        same = node.target is aten.to.dtype and node.meta["val"].dtype == node.args[0].meta["val"].dtype
        idle = node.target is aten.dropout.default and not node.args[2]
        if same or idle or node.target in (aten.detach.default, aten.detach_.default, aten.alias.default):
            node.replace_all_uses_with(node.args[0])
            graph.fx.erase_node(node)
        elif node.target is aten._assert_tensor_metadata.default:
            graph.fx.erase_node(node)
    return graph
