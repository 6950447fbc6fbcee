"""find_rope: find the rotary embedding in front of every attention, and verify it by probing.

    hidden -> q_proj -> (q_norm) -> [query_pre] -> RoPE(position) -> [query_post] -> (norm) -> (scale) -> attention

The walk goes up from the attention's query through everything that depends on the tokens. Operations that also take a
position-only tensor are RoPE's products; the node through which all their data flows is the pre-RoPE tensor. The
subgraph between is then evaluated in float64 on unit vectors at several positions: the match counts only if the
result is a rotation of dim pairs by an angle proportional to the position, wherever in the head the pairs are. What
may follow is a norm that commutes with the rotation, and a scale of the whole query by its position.

Keys are verified by what the score needs of them: the key at position p is the key at position 0, turned as the
queries are. This asks for no single pre-RoPE tensor, and there is none where one rotated part serves all heads.

So "matched" means "verified", whatever the model's code looks like.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

import keysieve.plugins.torch.ops  # noqa: F401  (registers torch.ops.keysieve)
from keysieve.passes.graph import CANNOT_EVALUATE, Graph
from keysieve.passes.probe_rope import FAR, PROBE_POSITIONS, TOLERANCE, NoRope, probe, rotation_matrix
from keysieve.passes.result import Attention, Found, Miss, RopeAttention
from keysieve.passes.rope_form import RopeForm

T = TypeVar("T")
PROJECTIONS = {
    torch.ops.aten.linear.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.mm.default,
    torch.ops.aten.matmul.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.embedding.default,
    torch.ops.keysieve.attention.default,
}


def find_rope(graph: Graph, attentions: list[Attention]) -> Found[RopeAttention]:
    """Match the RoPE of each attention; a layer without any rotation matches as form "nope"."""
    finder = _Finder(graph)
    found: Found[RopeAttention] = Found([])
    for attention in attentions:
        try:
            match = finder.query(attention)
            finder.verify_key(attention, match.form)
        except NoRope as miss:
            found.misses.append(Miss(attention.number, miss.node.name, miss.reason))
            continue
        found.matches.append(match)
    return found


class _Finder:
    """The search in one graph; layers with the very same operations are evaluated once."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.data = graph.depends_on([graph.inputs["input_ids"]])
        self.positional = graph.depends_on([graph.inputs["position_ids"]])
        self.order = {node: index for index, node in enumerate(graph.fx.nodes)}
        self.known: dict[Any, Any] = {}

    def query(self, attention: Attention) -> RopeAttention:
        """Walk up from the attention's query to the tensor before RoPE; raises NoRope where it is not verified."""
        base = attention.query  # what a scale by position would follow
        nearer = [base]  # tensors between the walk and base through which everything flows, the nearest to base first
        refusal: NoRope | None = None  # the nearest: further up, it is the same for a less telling reason
        walk = _Walk(self, [base])
        while True:
            node = walk.last()
            if walk.products and walk.waist() and node is not nearer[-1]:
                if self._remembered(self._scales, node, base):
                    base, nearer, walk.products = node, [node], 0
                    continue
                try:
                    post, form = self._rotation(attention, node, nearer)
                except NoRope as refused:
                    refusal = refusal or refused  # perhaps not the whole rotation yet
                else:
                    walk.finish()
                    return RopeAttention(attention, node, post, base, form)
            elif walk.waist() and node is not nearer[-1]:
                nearer.append(node)
            if walk.ended():
                if walk.products:
                    raise refusal or NoRope(node, "position-dependent products without one pre-RoPE tensor above them")
                walk.finish()
                form = RopeForm("nope", attention.head_dim, 0, np.zeros(0))
                return RopeAttention(attention, base, base, base, form)
            walk.up()

    def _rotation(self, attention: Attention, pre: Node, nearer: list[Node]) -> tuple[Node, RopeForm]:
        """The node, of `nearer`, at which the rotation of `pre` ends, and its form; then only a norm follows."""
        refusal: NoRope | None = None
        base = nearer[0]
        for post in nearer:
            try:
                form = self._remembered(self._probe, pre, post, attention.query_heads)
            except NoRope as refused:
                refusal = refusal or refused
                continue
            if post is base or self._remembered(self._commutes, post, base, form):
                return post, form
            raise NoRope(
                base,
                f"what follows RoPE ({form}) does not commute with the rotation, so the queries before RoPE say "
                "nothing about those after it (as with a norm after RoPE that has a weight for each dim)",
            )
        raise refusal or NoRope(pre, "no rotation")

    def _probe(self, pre: Node, post: Node, heads: int) -> RopeForm:
        return probe(self.graph, pre, post, heads)

    def _scales(self, pre: Node, post: Node) -> bool:
        """Whether post is pre times a positive number that depends on the position alone, for queries of all heads."""
        shapes = [sorted(map(str, self.graph.shape(node))) for node in (pre, post)]
        tokens = {str(size) for size in self.graph.shape(self.graph.inputs["input_ids"])}
        if shapes[0] != shapes[1] or len(shapes[0]) != 4 or not tokens <= set(shapes[0]):
            return False
        for positions in ((*PROBE_POSITIONS, FAR), PROBE_POSITIONS):
            given = self._at([positions], 2)
            x = self._random(pre, given)
            try:
                y = self.graph.evaluate(post, given | {pre: x})
            except CANNOT_EVALUATE:
                continue  # a table ends before FAR
            x, y = (v.permute(self.graph.head_axes(node)) for v, node in ((x, pre), (y, post)))
            if x.shape != y.shape:
                return False
            factor = (x * y).sum((0, 1, 3), keepdim=True) / (x * x).sum((0, 1, 3), keepdim=True)  # [1,1,P,1]
            return bool((factor > 0).all()) and bool(((y - factor * x).abs() <= TOLERANCE * factor).all())
        return False

    def _commutes(self, post: Node, normed: Node, form: RopeForm) -> bool:
        """Whether what is between, g, is the same before the rotation as after it: g(RoPE(x)) == RoPE(g(x))."""
        given = self._at([PROBE_POSITIONS], 2)
        x = self._random(post, given)
        axes = self.graph.head_axes(post)
        back = np.argsort(axes).tolist()
        turn = torch.from_numpy(np.stack([rotation_matrix(form, position) for position in PROBE_POSITIONS]))

        def norm(vectors: Tensor) -> Tensor:
            """g of vectors [B,H,P,D]."""
            result = self.graph.evaluate(normed, given | {post: vectors.permute(back)})
            return result.permute(self.graph.head_axes(normed))

        def rope(vectors: Tensor) -> Tensor:
            return torch.einsum("poi,bhpi->bhpo", turn, vectors)

        x = x.permute(axes)
        try:
            first, second = norm(rope(x)), norm(x)
        except CANNOT_EVALUATE:
            return False
        return first.shape == x.shape and bool((first - rope(second)).abs().max() <= TOLERANCE * second.abs().max())

    def verify_key(self, attention: Attention, form: RopeForm) -> None:
        """Raise NoRope unless the key at position p is the key at position 0, turned by p as the queries are."""
        walk = _Walk(self, [attention.key])
        while True:
            if walk.products and walk.cut() and self._remembered(self._turns, walk.cut(), attention.key, form):
                walk.finish()
                return
            if walk.ended():
                break
            walk.up()
        if walk.products:
            raise NoRope(attention.node, f"queries have RoPE {form} but keys are not turned alike")
        walk.finish()
        if form.rotary_dim:
            raise NoRope(attention.node, f"queries have RoPE {form} but keys have none")

    def _turns(self, cut: tuple[Node, ...], key: Node, form: RopeForm) -> bool:
        """Whether, for any values of the cut, the key at each position is that at position 0 turned by the form."""
        turn = np.stack([rotation_matrix(form, position) for position in PROBE_POSITIONS])
        turn = turn @ np.linalg.inv(turn[0])  # of the rotated head: what is permuted and scaled is so at 0, too
        try:
            rows = [PROBE_POSITIONS, [0] * len(PROBE_POSITIONS)]
            given = self._at(rows, len(rows))
            for node in cut:
                given[node] = self._random(node, given, alike=True)
            turned, plain = self.graph.evaluate(key, given)  # [H,P,D] each
        except CANNOT_EVALUATE:
            return False
        error = (turned - torch.einsum("poi,hpi->hpo", torch.from_numpy(turn), plain)).abs()
        # a model's own float32 table is off by the rounding of its angles
        allowed = torch.tensor(PROBE_POSITIONS).clamp(min=1)[:, None] * TOLERANCE * max(1.0, float(plain.abs().max()))
        return bool((error <= allowed).all())

    # -- evaluation ----------------------------------------------------------------------------------------------
    def _at(self, positions: list[Any], batch: int) -> dict[Node, Tensor]:
        """Inputs of a run at those positions (one row, or one a sequence)."""
        table = torch.tensor([list(row) for row in positions]).expand(batch, -1)
        return {self.graph.inputs["input_ids"]: torch.zeros_like(table), self.graph.inputs["position_ids"]: table}

    def _random(self, node: Node, given: dict[Node, Tensor], alike: bool = False) -> Tensor:
        """Random values for a node in a run with those inputs; alike: the same for every sequence."""
        ids = self.graph.inputs["input_ids"]
        sizes = {str(size): real for size, real in zip(self.graph.shape(ids), given[ids].shape, strict=True)}
        named = list(map(str, self.graph.shape(node)))
        generator = torch.Generator().manual_seed(self.order[node])
        shape = [sizes.get(size) or int(size) for size in named]
        values = torch.randn(shape, dtype=torch.float64, generator=generator)
        if alike:
            axis = named.index(str(self.graph.shape(ids)[0]))
            values = values.narrow(axis, 0, 1).expand(shape)
        return values

    def _remembered(self, question: Callable[..., T], above: Any, below: Node, *more: Any) -> T:
        """The answer, or refusal, to a question about the subgraph between, asked once for all layers alike."""
        cut = (above,) if isinstance(above, Node) else above
        extra = tuple(repr(m) if isinstance(m, RopeForm) else m for m in more)
        signature = (question.__name__, _signature(self.graph, cut, below), *extra)
        if signature not in self.known:
            try:
                self.known[signature] = question(above, below, *more)
            except NoRope as refused:
                self.known[signature] = refused.reason
        answer = self.known[signature]
        if isinstance(answer, str):
            raise NoRope(cut[0], answer)
        return answer


class _Walk:
    """The way up from a tensor through its data; the frontier is always a cut: all the data flows through it."""

    def __init__(self, finder: _Finder, start: Iterable[Node]):
        self.finder = finder
        self.frontier = set(start)
        self.products = 0  # operations passed that also take a tensor of the positions alone
        self.counted: Node | None = None  # a tensor of the tokens' number alone
        self.sequence = str(finder.graph.shape(finder.graph.inputs["input_ids"])[1])

    def last(self) -> Node:
        return max(self.frontier, key=self.finder.order.__getitem__)

    def waist(self) -> bool:
        """Whether all the data flows through one tensor."""
        return len(self.frontier) == 1 and _is_tensor(self.last())

    def cut(self) -> tuple[Node, ...]:
        """The frontier in graph order; empty while one of it is no tensor."""
        nodes = sorted(self.frontier, key=self.finder.order.__getitem__)
        return tuple(nodes) if all(map(_is_tensor, nodes)) else ()

    def ended(self) -> bool:
        return self._closed(self.last()) and all(map(self._closed, self.frontier))

    def up(self) -> None:
        """Replace the last open node by its inputs."""
        graph = self.finder.graph
        node = max((n for n in self.frontier if not self._closed(n)), key=self.finder.order.__getitem__)
        self.frontier.remove(node)
        for i in node.all_input_nodes:
            if i in self.finder.data:
                self.frontier.add(i)
            elif i in self.finder.positional:
                self.products += 1
            elif _is_tensor(i) and self.sequence in map(str, graph.shape(i)):
                self.counted = i
        if not self.frontier:
            raise NoRope(node, "the attention's input does not depend on the tokens")

    def finish(self) -> None:
        """Go on to the projections, where no position may enter any more; raises NoRope where one does."""
        self.products = 0
        while not self.ended():
            node = self.last()
            self.up()
            if self.products:
                raise NoRope(node, "the position enters before the rotation, too")
        if self.counted:
            raise NoRope(self.counted, "depends on the token's index in the input instead of on position_ids")

    def _closed(self, node: Node) -> bool:
        return node.op == "placeholder" or node.target in PROJECTIONS


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)  # not a size, and not the list that chunk or split gives


def _signature(graph: Graph, cut: tuple[Node, ...], post: Node) -> Any:
    """Equal for subgraphs of the same operations on the same tables, whatever their nodes are called."""
    names: dict[Node, Any] = {node: ("pre", index, *map(str, graph.shape(node))) for index, node in enumerate(cut)}
    operations: list[tuple[str, str]] = []
    for node in graph.ancestors([post], stop=cut):
        if node.op == "placeholder":
            names[node] = node.name
            continue
        names[node] = len(operations)
        arguments = map_arg((node.args, node.kwargs), names.__getitem__)
        operations.append((str(node.target), repr(arguments)))
    return (tuple(names[node] for node in cut), tuple(operations))
