"""One text, fed to a session in chunks and then token by token."""

from itertools import pairwise

import numpy as np
import torch

from keysieve.compiler.session import Session
from support.tiny_models import VOCABULARY

PROMPT, MORE, CHUNK = 40, 80, 16
TOKENS = torch.randint(3, VOCABULARY, (PROMPT + MORE,), generator=torch.Generator().manual_seed(7)).tolist()


def steps() -> list[list[int]]:
    """The prompt in chunks, the partial one first, then one token a step."""
    first = PROMPT % CHUNK
    cuts = [0, first, *range(first + CHUNK, PROMPT + 1, CHUNK)]
    return [TOKENS[a:b] for a, b in pairwise(cuts)] + [[token] for token in TOKENS[PROMPT:]]


def logits_of(session: Session) -> np.ndarray:
    """Logits [N,V] of all tokens, fed in `steps`."""
    parts = steps()
    found = []
    for part, following in zip(parts, [*parts[1:], [0]], strict=True):
        ids, count = np.array([part]), np.array([len(part)], np.int32)
        found.append(session.step(ids, count, np.arange(len(part))[None], len(following))[0].copy())
    return np.concatenate(found)
