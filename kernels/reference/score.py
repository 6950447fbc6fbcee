"""How important every cached key of every layer is; the naive version, which is the specification."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from keysieve.errors import ConfigError


def score(
    length: Tensor,
    limit: Tensor,
    position: Tensor,
    centre: Tensor,
    weight: Tensor,
    keys: Sequence[Tensor],
    policy: str,
    query_heads: int,
    rotary_dim: int,
    interleaved: int,
) -> Tensor:
    """Score every row of every layer's key cache; the higher, the better worth keeping.

    length [B] rows held, limit [B] rows at which an eviction is due, position [B] int64 absolute position of
    the first new token; keys: one rotated key cache [B, Hkv, C, D] per layer.
    centre [L, B, Hq, J, D]: the query centres turned to the current position, one per future offset (J = 1
    for the mean over the offsets), times the attention scaling. weight [L, B, Hq, R/2]: the factor of every
    band's magnitude. Policies other than "trig" ("key_norm", "streaming", "random") take 1-element zeros.

    Returns [L, B, Hq, C]: float32, or float64 if an input is float64. Rows at and past `length` hold no
    meaning. All zeros if no sequence is due.
    Raises ConfigError for an unknown policy, or for centres or weights of another shape.
    Source: TriAttention, arXiv 2604.04921, in the form that is linear in the rotated key.
    """
    if policy != "trig" and policy not in _HEAD_SCORES:
        raise ConfigError(f"unknown score policy {policy!r}; choose one of trig, {', '.join(_HEAD_SCORES)}")
    batch, kv_heads, capacity, _ = keys[0].shape
    if policy == "trig":
        _check_centre(centre, weight, (len(keys), batch, query_heads), rotary_dim)
    double = torch.float64 in (centre.dtype, weight.dtype, *(key.dtype for key in keys))
    dtype = torch.float64 if double else torch.float32
    if not bool((length >= limit).any()):
        return torch.zeros(len(keys), batch, query_heads, capacity, dtype=dtype, device=keys[0].device)
    layers = []
    for layer, key in enumerate(keys):
        key = key.to(dtype).repeat_interleave(query_heads // kv_heads, dim=1)  # [B, Hq, C, D]
        if policy == "trig":
            bands = band_magnitudes(key, rotary_dim, bool(interleaved))
            layers.append(_trig(key, bands, centre[layer].to(dtype), weight[layer].to(dtype)))
        else:
            layers.append(_HEAD_SCORES[policy](key, position, layer))
    return torch.stack(layers)


def band_magnitudes(key: Tensor, rotary_dim: int, interleaved: bool) -> Tensor:
    """|k_f|, the magnitude of every rotary band's pair: [..., D] -> [..., R/2]."""
    rotated = key[..., :rotary_dim]
    if interleaved:
        real, imaginary = rotated[..., 0::2], rotated[..., 1::2]
    else:
        real, imaginary = rotated[..., : rotary_dim // 2], rotated[..., rotary_dim // 2 :]
    return torch.sqrt(real * real + imaginary * imaginary)


def _check_centre(centre: Tensor, weight: Tensor, leading: tuple[int, int, int], rotary_dim: int) -> None:
    if centre.ndim != 5 or centre.shape[:3] != leading or weight.shape != (*leading, rotary_dim // 2):
        raise ConfigError(
            f"centre {list(centre.shape)} and weight {list(weight.shape)} do not fit the contract: with "
            f"L, B, Hq = {list(leading)} they are [L, B, Hq, J, D] and [L, B, Hq, {rotary_dim // 2}]"
        )


def _trig(key: Tensor, bands: Tensor, centre: Tensor, weight: Tensor) -> Tensor:
    """key [B, Hq, C, D], bands [B, Hq, C, R/2], centre [B, Hq, J, D], weight [B, Hq, R/2] -> [B, Hq, C]."""
    along_centre = torch.einsum("bhjd,bhcd->bhjc", centre, key).amax(dim=2)
    return along_centre + torch.einsum("bhf,bhcf->bhc", weight, bands)


def _key_norm(key: Tensor, position: Tensor, layer: int) -> Tensor:
    """Minus the norm of the key over all D dims: [B, Hq, C, D] -> [B, Hq, C]."""
    return -torch.sqrt((key * key).sum(dim=-1))


def _streaming(key: Tensor, position: Tensor, layer: int) -> Tensor:
    """The row index, so that the latest rows win: [B, Hq, C, D] -> [B, Hq, C]."""
    return torch.arange(key.shape[2], device=key.device).to(key.dtype).expand(key.shape[:3])


def _random(key: Tensor, position: Tensor, layer: int) -> Tensor:
    """A hash of (position, row, head, layer) to [0, 1): [B, Hq, C, D] -> [B, Hq, C]."""
    _, heads, capacity, _ = key.shape
    row = torch.arange(capacity, device=key.device)
    head = torch.arange(heads, device=key.device)[:, None]
    start = (position.long() % 4093)[:, None, None]
    x = (start * 1009 + row * 1013 + head * 31 + layer * 17) % 65521
    for _ in range(2):
        x = (x * x + 12289) % 65521
    return x.to(key.dtype) / 65521


_HEAD_SCORES: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "key_norm": _key_norm,
    "streaming": _streaming,
    "random": _random,
}
