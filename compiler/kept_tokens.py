"""A page that shows over a text which of its tokens the caches still hold, and by how many of the KV heads."""

from collections.abc import Sequence
from html import escape
from typing import Any

from keysieve.compiler.detokenize import pieces
from keysieve.compiler.holders import forgotten_share
from keysieve.compiler.shade import shade

DARK = 0.4  # of the scale; from there on the text is white
LEGEND = (0.0, 0.25, 0.5, 0.75, 1.0)
STYLE = """
body { font: 16px/1.7 Georgia, serif; max-width: 46em; margin: 2em auto; padding: 0 1em; color: #222; }
p.numbers, p.legend { font: 13px sans-serif; }
#text { white-space: pre-wrap; overflow-wrap: anywhere; }
#text span, .legend span { padding: 1px 0; }
.legend span { padding: 2px 8px; }
.gone { color: #999; text-decoration: line-through; }
.new { border-bottom: 2px solid #2a7; }
"""


def kept_page(name: str, tokenizer: Any, ids: Sequence[int], prompt: int, holders: Sequence[int], heads: int) -> str:
    """The HTML text.

    ids: those that were read, the first `prompt` of them the prompt's; holders: how many of the `heads` KV heads hold
    each.
    """
    spans, number = [], 0
    for text, count in pieces(tokenizer.decode, ids):
        most = max(holders[number : number + count])
        said = f"token {number}: held by {most} of {heads} KV heads"
        spans.append(_span(text, most / heads, said, new=number >= prompt))
        number += count
    numbers = (
        f"{len(ids):,} tokens, {prompt:,} of them the prompt's; {sum(holders) / heads:,.0f} rows a KV head on average; "
        f"{forgotten_share(holders):.1%} of the tokens are held by no head any more"
    )
    legend = " ".join(_span(f"{share:.0%}", share, "", new=False) for share in LEGEND)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(name)}: what is kept</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>{escape(name)}: what is kept</h1>\n"
        f'<p class="numbers">{numbers}.</p>\n<p class="legend">held by {legend} of the KV heads; '
        '<span class="new">generated</span></p>\n'
        f'<div id="text">{"".join(spans)}</div></body></html>\n'
    )


def _span(text: str, share: float, said: str, new: bool) -> str:
    names = [name for name, wanted in (("gone", share == 0), ("new", new)) if wanted]
    style = f"background:{shade(share)}" + (";color:#fff" if share >= DARK else "") if share else ""
    attributes = {"class": " ".join(names), "style": style, "title": said}
    written = "".join(f' {key}="{escape(value)}"' for key, value in attributes.items() if value)
    return f"<span{written}>{escape(text)}</span>"
