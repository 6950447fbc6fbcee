"""What probing found out about one layer's rotary embedding."""

from dataclasses import dataclass

import numpy as np

Indices = tuple[int, ...]


@dataclass(frozen=True)
class RopeForm:
    """The rotary embedding of one attention layer, as measured on the captured graph.

    kind: "half_split" (pairs x[f], x[f+R/2]), "interleaved" (pairs x[2f], x[2f+1]), "nope" (no rotation), or "paired"
    for any other pairing: band f turns dims real[f] and imaginary[f] of the pre-RoPE head, and dim d of the rotated
    head is dim layout[d] of the pre-RoPE one. The three are empty for all other kinds, where they would say nothing.
    head_dim D; rotary_dim R (number of rotated dims, the first ones unless "paired"; 0 for "nope");
    inv_freq [R/2] float64, radians per position; scaling s multiplies cos and sin (1 unless yarn or longrope).
    """

    kind: str
    head_dim: int
    rotary_dim: int
    inv_freq: np.ndarray
    scaling: float = 1.0
    real: Indices = ()
    imaginary: Indices = ()
    layout: Indices = ()

    @classmethod
    def of_pairs(
        cls, real: Indices, imaginary: Indices, layout: Indices, inv_freq: np.ndarray, scaling: float = 1.0
    ) -> "RopeForm":
        """The form that turns these pairs; half-split and interleaved ones are called so."""
        head_dim, rotary_dim = len(layout), 2 * len(real)
        if layout == tuple(range(head_dim)):
            for kind in ("half_split", "interleaved"):
                form = cls(kind, head_dim, rotary_dim, inv_freq, scaling)
                if all(np.array_equal(*both) for both in zip(form.pairs, (real, imaginary), strict=True)):
                    return form
        return cls("paired", head_dim, rotary_dim, inv_freq, scaling, real, imaginary, layout)

    @property
    def interleaved(self) -> bool:
        return self.kind == "interleaved"

    @property
    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices (real, imaginary) [R/2] of every band's two dims inside a pre-RoPE head."""
        if self.kind == "paired":
            return np.array(self.real, int), np.array(self.imaginary, int)
        bands = np.arange(self.rotary_dim // 2)
        return (2 * bands, 2 * bands + 1) if self.interleaved else (bands, bands + self.rotary_dim // 2)

    @property
    def source(self) -> np.ndarray:
        """[D]: the pre-RoPE dim that each dim of the rotated head comes from."""
        return np.array(self.layout or range(self.head_dim), int)

    @property
    def arranged(self) -> tuple[np.ndarray, np.ndarray]:
        """Dims (of the pre-RoPE head, of the rotated head) [D] that bring either to half-split with R dims first."""
        target = np.argsort(self.source)
        pairs = np.concatenate([target[side] for side in self.pairs])
        rest = np.setdiff1d(np.arange(self.head_dim), pairs)
        after = np.concatenate([pairs, rest])
        return self.source[after], after

    def __str__(self) -> str:
        partial = f" partial {self.rotary_dim}/{self.head_dim}" if 0 < self.rotary_dim < self.head_dim else ""
        scaled = f" scaling {self.scaling:.4g}" if abs(self.scaling - 1) > 1e-6 else ""
        return self.kind + partial + scaled
