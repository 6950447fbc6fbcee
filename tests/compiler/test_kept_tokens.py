"""The page of kept tokens: every token once, its holders, and what is gone."""

from html.parser import HTMLParser

from keysieve.compiler.kept_tokens import kept_page
from support.tiny_models import tiny_tokenizer


class Spans(HTMLParser):
    """(text, attributes) of every span inside of the text."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self._inside = False
        self._attributes: dict[str, str | None] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside |= tag == "div"
        self._attributes = dict(attrs) if tag == "span" and self._inside else None

    def handle_endtag(self, tag: str) -> None:
        self._attributes = None

    def handle_data(self, data: str) -> None:
        if self._attributes is not None:
            self.found.append((data, self._attributes))


def test_every_token_is_shown_once_with_its_holders() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("a <b> & the rest")["input_ids"]
    holders = [6, 0, 3, *[1] * (len(ids) - 3)]
    page = kept_page("a<b", tokenizer, ids, len(ids) - 1, holders, 6)
    spans = Spans()
    spans.feed(page)
    assert "".join(text for text, _ in spans.found) == tokenizer.decode(ids)
    titles = [attributes["title"] for _, attributes in spans.found]
    assert titles == [f"token {number}: held by {count} of 6 KV heads" for number, count in enumerate(holders)]
    classes = [attributes.get("class") for _, attributes in spans.found]
    assert classes == [None, "gone", *[None] * (len(ids) - 3), "new"]
    colours = [attributes.get("style") for _, attributes in spans.found]
    assert colours[1] is None and len({*colours[:4]}) == 4  # the colour is the number
    assert f"{len(ids)} tokens, {len(ids) - 1} of them the prompt's" in page
    assert f"{1 / len(ids):.1%} of the tokens are held by no head" in page
    assert "<h1>a&lt;b:" in page
