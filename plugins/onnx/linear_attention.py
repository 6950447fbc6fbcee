"""KeySieveLinearAttention as an ONNX function: a Scan over the tokens, whose state is that of all heads."""

from onnx import GraphProto, helper

from keysieve.plugins.onnx.body import FLOAT, Body

SCANNED = ("query", "key", "value", "decay", "rate")


def linear_attention_body() -> Body:
    """Inputs and outputs as in contract.LINEAR_ATTENTION."""
    b = Body()
    delta = b.Cast(b.attribute("delta"), to=FLOAT)
    # From [B,H,S,...]: Scan takes the axis of tokens out.
    state, read = b.Scan(
        "state",
        *SCANNED,
        outputs=2,
        body=_step(delta),
        num_scan_inputs=len(SCANNED),
        scan_input_axes=[2] * len(SCANNED),
        scan_output_axes=[2],
    )
    b.rename(read, "read")
    b.rename(state, "state_out")
    return b


def _step(delta: str) -> GraphProto:
    """One token: state [B,H,Dk,Dv], query and key [B,H,Dk], value [B,H,Dv], decay and rate [B,H]; delta 0 or 1."""
    b = Body("token_")
    row = b.Unsqueeze("token_key", [2])  # [B,H,1,Dk]
    kept = b.Mul("token_state", b.Unsqueeze(b.Exp("token_decay"), [2, 3]))
    known = b.Mul(b.MatMul(row, kept), delta)  # [B,H,1,Dv]
    change = b.Mul(b.Sub(b.Unsqueeze("token_value", [2]), known), b.Unsqueeze("token_rate", [2, 3]))
    state = b.Add(kept, b.MatMul(b.Unsqueeze("token_key", [3]), change))
    read = b.Squeeze(b.MatMul(b.Unsqueeze("token_query", [2]), state), [2])
    inputs = [helper.make_tensor_value_info(f"token_{name}", FLOAT, None) for name in ("state", *SCANNED)]
    outputs = [helper.make_tensor_value_info(name, FLOAT, None) for name in (state, read)]
    return helper.make_graph(b.nodes, "token", inputs, outputs)
