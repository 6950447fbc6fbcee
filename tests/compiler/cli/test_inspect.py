"""keysieve inspect: the table, the JSON, and the exit code of a model that cannot be compiled."""

import json

import pytest

from keysieve.compiler.cli import main
from keysieve.compiler.cli.describe import layer_rows
from keysieve.compiler.inspect import LayerReport

FUNCTION = "inspect.inspect"
GOOD = ("half_split", None)
MISS = (None, "sliding window of 512 is not supported")


def lines(text: str) -> list[str]:
    """Lines with every run of spaces as one."""
    return [" ".join(line.split()) for line in text.splitlines()]


def test_equal_neighbours_share_a_line(stub, report, capsys: pytest.CaptureFixture) -> None:
    calls = stub(FUNCTION, report(GOOD, GOOD, MISS, MISS, ("nope", None), nodes={"KeySieveScore": 1}))
    assert main(["inspect", "m", "--quiet"]) == 0
    assert calls[0][0] == ("m",)
    assert calls[0][1]["progress"].quiet is True
    printed = lines(capsys.readouterr().out)
    assert printed[:4] == [
        "SomeForCausalLM: 3 of 5 attention layers match",
        "layers 0-1 full half_split evicts by triattention",
        f"layers 2-3 unsupported - does not match, node node_2 to node_3: {MISS[1]}",
        "layer 4 full nope evicts by the plain product with its query centre",
    ]
    assert "nodes inserted 1 KeySieveScore" in printed
    assert "KV cache 1.0 kB a token, float32" in printed
    assert "384.0 kB a sequence, for budget 256 and interval 128" in printed


def test_what_happens_to_layers_of_every_kind() -> None:
    def layer(number: int, kind: str, form: str | None, window: int = 0) -> LayerReport:
        return LayerReport(number, kind, form, True, None, "node", window)

    hybrid = [layer(0, "sliding", "half_split", 4096), layer(1, "full", "nope")]
    assert [row[-1] for row in layer_rows(hybrid, "")] == [
        "keeps its window of 4,096 tokens",
        "evicts, by --policy key-norm or streaming",
    ]
    assert layer_rows(hybrid, "key-norm")[1][-1] == "evicts by key-norm"
    assert [row[-1] for row in layer_rows([layer(0, "full", "half_split"), layer(1, "full", "nope")], "")] == [
        "evicts"
    ] * 2
    assert layer_rows([layer(0, "full", "nope")], "")[0][-1] == "has no rotary embedding"


def test_heads_are_told_where_they_differ_and_latents_where_there_are_some() -> None:
    def layer(number: int, query_heads: int, latent: int = 0) -> LayerReport:
        return LayerReport(number, "full", "half_split", True, None, "node", 0, query_heads, 2, 16, latent)

    assert [row[::3] for row in layer_rows([layer(0, 4), layer(1, 4), layer(2, 8)], "")] == [
        ("layers 0-1", "evicts; 4 query and 2 KV heads of 16"),
        ("layer 2", "evicts; 8 query and 2 KV heads of 16"),
    ]
    assert [row[-1] for row in layer_rows([layer(0, 4, 512)], "")] == ["evicts; K and V expanded from a latent of 512"]


def test_a_model_that_is_not_compiled_has_no_nodes(stub, report, capsys: pytest.CaptureFixture) -> None:
    stub(FUNCTION, report(GOOD))
    assert main(["inspect", "m"]) == 0
    assert "none: `keysieve compile` inserts them" in capsys.readouterr().out


def test_json_has_one_entry_a_layer(stub, report, capsys: pytest.CaptureFixture) -> None:
    stub(FUNCTION, report(GOOD, MISS))
    assert main(["inspect", "m", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [{key: layer[key] for key in ("kind", "rope_form", "matched", "reason")} for layer in found["layers"]] == [
        {"kind": "full", "rope_form": "half_split", "matched": True, "reason": None},
        {"kind": "unsupported", "rope_form": None, "matched": False, "reason": MISS[1]},
    ]


@pytest.mark.parametrize("layers", [[MISS], [("nope", None)], []])
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_no_match_at_all_is_1(layers: list, options: list[str], stub, report, capsys: pytest.CaptureFixture) -> None:
    stub(FUNCTION, report(*layers))
    assert main(["inspect", "m", *options]) == 1
    printed = capsys.readouterr()
    assert "no attention layer of m has a rotary embedding" in printed.err
    assert printed.out
    assert "evicts" not in printed.out
