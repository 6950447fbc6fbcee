"""Functions that mix tokens become nodes while a model is captured, and compute what they stand for."""

import sys

import pytest
import torch
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import mamba2_chunk_scan
from transformers.models.qwen3_next import modeling_qwen3_next as original

from keysieve.compiler.capture import capture
from keysieve.compiler.linear_layers import REPLACED, causal_conv, delta_rule, state_space
from keysieve.passes.carry_states import CARRIERS
from support.families import family_model

OPS = torch.ops.keysieve


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("normed", [True, False])
def test_delta_rule_is_that_of_transformers(group: int, normed: bool) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 5, 3, 8) * 0.3
    value, decay, rate = torch.randn(2, 5, 3 * group, 6), -torch.rand(2, 5, 3 * group), torch.rand(2, 5, 3 * group)
    found, state = delta_rule(query, key, value, g=decay, beta=rate, use_qk_l2norm_in_kernel=normed)
    query, key = (x.repeat_interleave(group, 2) for x in (query, key))  # older transformers leave this to the caller
    rule = original.torch_recurrent_gated_delta_rule
    expected, _ = rule(query, key, value, decay, rate, use_qk_l2norm_in_kernel=normed)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert state is None


@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.2, 0.9)])
@pytest.mark.parametrize("skip", [True, False])
def test_state_space_is_that_of_transformers(skip: bool, limit: tuple[float, float]) -> None:
    torch.manual_seed(0)
    x, dt, A = torch.randn(2, 9, 4, 5), torch.randn(2, 9, 4), -torch.rand(4)
    B, C = torch.randn(2, 2, 9, 2, 6)
    options = {"D": torch.randn(4) if skip else None, "dt_bias": torch.randn(4), "dt_softplus": True, "dt_limit": limit}
    expected = mamba2_chunk_scan(x, dt, A, B, C, chunk_size=4, **options)
    torch.testing.assert_close(state_space(x, dt, A, B, C, chunk_size=4, **options), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_convolution_sees_the_past_alone(activation: str | None) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 6), torch.randn(3, 4), torch.randn(3)
    found = causal_conv(x, weight, bias, activation=activation)
    expected = bias[:, None] + sum(
        weight[:, 3 - age, None] * torch.nn.functional.pad(x, (age, 0))[..., :6] for age in range(4)
    )
    expected = expected if activation is None else torch.nn.functional.silu(expected)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_nodes_know_their_layer_and_the_model_stays_as_it_was() -> None:
    model = family_model("lfm2")
    module = sys.modules[type(model).__module__]
    before = {name: vars(module)[name] for name in REPLACED if name in vars(module)}
    assert before
    graph = capture(model, only_to_find=True)
    assert {name: vars(module)[name] for name in before} == before
    assert not any(part._forward_pre_hooks for part in model.modules())
    assert [node.args[-1] for node in graph.calls(OPS.causal_conv.default)] == [0, 2]
    assert not graph.calls(OPS.linear_attention.default)


def test_every_kind_of_carried_layer_is_replaced_at_capture() -> None:
    """What carry_states asks for is what capture leaves."""
    made = {causal_conv: OPS.causal_conv.default}
    made |= dict.fromkeys((delta_rule, state_space), OPS.linear_attention.default)
    assert {made[function] for function in REPLACED.values()} == set().union(*CARRIERS.values())
