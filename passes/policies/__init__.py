"""Eviction policies: each file says what score a policy gives to a cached key; selection and compaction are shared."""

from dataclasses import dataclass

from torch.fx import Node


@dataclass(frozen=True)
class ScoreInputs:
    """What a policy hands to the score node.

    policy: the score op's name of the formula; centre [L,B,Hq,J,D] and weight [L,B,Hq,R/2] float32, or one-element
    zeros of the same rank for policies that need none.
    """

    policy: str
    centre: Node
    weight: Node
    rotary_dim: int
    interleaved: bool
