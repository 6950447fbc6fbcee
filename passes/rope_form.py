"""What probing found out about one layer's rotary embedding."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RopeForm:
    """The rotary embedding of one attention layer, as measured on the captured graph.

    kind: "half_split" (pairs x[f], x[f+R/2]), "interleaved" (pairs x[2f], x[2f+1]) or "nope" (no rotation).
    head_dim D; rotary_dim R (first R dims are rotated, R = 0 for "nope");
    inv_freq [R/2] float64, radians per position; scaling s multiplies cos and sin (1 unless yarn or longrope).
    """

    kind: str
    head_dim: int
    rotary_dim: int
    inv_freq: np.ndarray
    scaling: float = 1.0

    @property
    def interleaved(self) -> bool:
        return self.kind == "interleaved"

    @property
    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices (real, imaginary) [R/2] of every band's two dims inside a head."""
        bands = np.arange(self.rotary_dim // 2)
        return (2 * bands, 2 * bands + 1) if self.interleaved else (bands, bands + self.rotary_dim // 2)

    def __str__(self) -> str:
        partial = f" partial {self.rotary_dim}/{self.head_dim}" if 0 < self.rotary_dim < self.head_dim else ""
        scaled = f" scaling {self.scaling:.4g}" if abs(self.scaling - 1) > 1e-6 else ""
        return self.kind + partial + scaled
