"""The captured graph as passes see it: nodes, the tensors behind its placeholders, and a few verbs to edit it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext
from torch.fx.node import map_arg
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from keysieve.errors import MatchError

SYM_SIZE = torch.ops.aten.sym_size.int
CANNOT_EVALUATE = (RuntimeError, ValueError, KeyError, TypeError, IndexError)  # what Graph.evaluate may raise
LOW_PRECISION = (torch.float16, torch.bfloat16, torch.float32)


class Graph:
    """A mutable view of an ExportedProgram: `inputs` are the user's, `tensors` the weights, buffers and constants.

    Passes edit the torch.fx graph through `input`, `constant`, `call` and `clone`, which keep every node's fake
    value, so that a pass reads shapes and dtypes from `shape(node)`; `program()` closes the edit.
    """

    def __init__(self, program: ExportedProgram):
        self._program = program
        self.module = program.graph_module
        self.fx = program.graph_module.graph
        self.fake_mode: Any = detect_fake_mode([n.meta.get("val") for n in self.fx.nodes])
        self.specs: dict[Node, InputSpec] = {}
        self.tensors: dict[Node, torch.Tensor] = {}
        self.inputs: dict[str, Node] = {}
        placeholders = [n for n in self.fx.nodes if n.op == "placeholder"]
        for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
            if spec.kind == InputKind.USER_INPUT:
                self.inputs[node.name] = node
                continue
            self.specs[node] = spec
            stored = program.constants if spec.target in program.constants else program.state_dict
            self.tensors[node] = stored[spec.target]
        self.output_node = next(n for n in self.fx.nodes if n.op == "output")
        self.outputs: dict[str, Node] = {"logits": self.output_node.args[0][0]}
        self.symbols: dict[str, Any] = {}
        self.closed = False
        captured = zip(("batch", "tokens"), self.shape(self.inputs["input_ids"]), strict=True)
        # What may differ from step to step, by name; the symbols are among them.
        self.sizes: dict[str, Any] = {name: size for name, size in captured if isinstance(size, torch.SymInt)}
        self._replaced = self._replacements()

    # -- reading -----------------------------------------------------------------------------------------------
    @staticmethod
    def shape(node: Node) -> tuple[Any, ...]:
        return tuple(node.meta["val"].shape)

    def head_axes(self, node: Node) -> list[int]:
        """Where batch, heads, sequence and dims stand in a 4-D node: permuted so, it is [B,H,S,D]."""
        axes = [str(size) for size in self.shape(node)]
        batch, sequence = (axes.index(str(size)) for size in self.shape(self.inputs["input_ids"]))
        return [batch, ({0, 1, 2} - {batch, sequence}).pop(), sequence, 3]

    def calls(self, target: Any) -> list[Node]:
        return [n for n in self.fx.nodes if n.op == "call_function" and n.target is target]

    def depends_on(self, roots: Iterable[Node]) -> set[Node]:
        """Nodes whose *values* (not just shapes) depend on one of the roots."""
        found = set(roots)
        for node in self.fx.nodes:
            if node.target is not SYM_SIZE and any(i in found for i in node.all_input_nodes):
                found.add(node)
        return found

    def ancestors(self, outputs: Iterable[Node], stop: Iterable[Node] = ()) -> list[Node]:
        """All nodes that the outputs need, in graph order; the walk ends at (and leaves out) the stop nodes."""
        stop, found, todo = set(stop), set(), list(outputs)
        while todo:
            node = todo.pop()
            if node not in found and node not in stop:
                found.add(node)
                todo.extend(node.all_input_nodes)
        return sorted(found)  # nodes compare by their place in the graph

    def evaluate(self, output: Node, given: Mapping[Node, torch.Tensor]) -> torch.Tensor:
        """Run the subgraph that leads to `output` in float64, with the given nodes replaced by real tensors."""
        return self.evaluate_all([output], given, torch.float64)[0]

    def evaluate_all(
        self, outputs: Sequence[Node], given: Mapping[Node, torch.Tensor], dtype: torch.dtype
    ) -> list[torch.Tensor]:
        """The same for several outputs, in that dtype; what no later node needs is dropped, copies of weights too."""
        nodes = [node for node in self.ancestors(outputs, stop=given) if node.op != "placeholder"]
        env: dict[Node, Any] = dict(given)
        last_use = {used: node for node in nodes for used in node.all_input_nodes}

        def value(node: Node) -> Any:
            if node not in env and node in self.tensors:
                tensor = self.tensors[node]
                return tensor.to(dtype) if tensor.dtype in LOW_PRECISION else tensor
            return env[node]

        for node in nodes:
            if callable(node.target):
                args, kwargs = map_arg((node.args, node.kwargs), value)
                env[node] = node.target(*_replace_dtypes(args, dtype), **_replace_dtypes(kwargs, dtype))
            for used in node.all_input_nodes:
                if last_use[used] is node and used not in outputs:
                    env.pop(used, None)
        return [value(output) for output in outputs]

    # -- editing -----------------------------------------------------------------------------------------------
    def symbol(self, name: str) -> Any:
        """The dynamic size of that name (created on first use)."""
        if name not in self.symbols:
            from torch._dynamo.source import ConstantSource

            # An example of its own: where torch compares two sizes, equal examples would make them one.
            probe = self.fake_mode.from_tensor(
                torch.empty(227 + 2 * len(self.symbols)),
                source=ConstantSource(f"keysieve_{name}"),
                symbolic_context=StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC]),
            )
            self.symbols[name] = self.sizes[name] = probe.shape[0]
        return self.symbols[name]

    def input(self, name: str, shape: tuple[Any, ...], dtype: torch.dtype) -> Node:
        """Add an input of the engine."""
        with self.fx.inserting_before(self.first_call()):
            node = self.fx.placeholder(name)
        with self.fake_mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype)
        self.inputs[name] = node
        return node

    def constant(self, name: str, value: torch.Tensor) -> Node:
        """Add a constant tensor of the engine, stored like a weight; the name may be given again."""
        with self.fx.inserting_before(self.first_call()):
            node = self.fx.placeholder(name)
        node.target = node.name  # which is unique
        node.meta["val"] = self.fake_mode.from_tensor(value, static_shapes=True)
        argument = TensorArgument(name=node.name)
        self.specs[node] = InputSpec(
            kind=InputKind.BUFFER, arg=argument, target=f"keysieve_{node.name}", persistent=False
        )
        self.tensors[node] = value
        return node

    def call(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """Insert one call at the current insertion point (see `before`) and compute its fake value."""
        node = self.fx.call_function(op, args, kwargs)
        self.refresh(node)
        return node

    def refresh(self, node: Node) -> None:
        """Compute the fake value of a call from those of its arguments.

        Raises MatchError where torch fixes a size to do so: the engine would serve that size alone.
        """
        where = f"node {node.name} ({node.target})"
        self.check_sizes_vary(f"the pass that adds {where}")
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        # As torch.export does it: the C++ forms of composite operations, such as linear, may ask for numbers.
        with self.fake_mode, enable_python_dispatcher():
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
        self.check_sizes_vary(where)

    def size(self, node: Node, dim: int) -> Any:
        """A node's size along dim as an argument for `call`: an int, or a sym_size node."""
        value = self.shape(node)[dim]
        return value if isinstance(value, int) else self.call(SYM_SIZE, node, dim)

    def item(self, node: Node, index: int) -> Node:
        """The index-th result of a call with several."""
        import operator

        return self.call(operator.getitem, node, index)

    def before(self, node: Node) -> Any:
        """Context: insert before that node."""
        return self.fx.inserting_before(node)

    def clone(self, output: Node, given: Mapping[Node, Node], sizes: Mapping[Any, Any]) -> Node:
        """Copy the subgraph that leads to `output`, with nodes and sizes replaced, in float32.

        given: node -> its replacement; sizes: symbol (as str) -> int or node that stands for that size in the copy.
        """
        env: dict[Node, Any] = dict(given)
        for node in self.ancestors([output], stop=given):
            if node.op == "placeholder":
                env[node] = node
            elif str(node.meta.get("val")) in sizes:  # a size, by whichever route it was computed
                env[node] = sizes[str(node.meta["val"])]
            else:
                args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
                env[node] = self.call(
                    node.target,  # type: ignore[arg-type]
                    *_replace_dtypes(args, torch.float32),
                    **_replace_dtypes(kwargs, torch.float32),
                )
        return env[output]

    def remove(self, node: Node) -> None:
        """Remove an input or constant that nothing uses any more."""
        self.inputs.pop(node.name, None)
        self.specs.pop(node, None)
        self.tensors.pop(node, None)
        self.fx.erase_node(node)

    def first_call(self) -> Node:
        """The node behind the last input: what is inserted before it may use every input."""
        return next(n for n in self.fx.nodes if n.op != "placeholder")

    def check_sizes_vary(self, where: str) -> None:
        """Raises MatchError where torch has put a number, or another size, in place of one of the sizes."""
        if self._replacements() == self._replaced:
            return
        known: dict[Any, str] = {}
        for name, size in self.sizes.items():
            now = size.node.expr
            if not now.is_symbol or now in known:
                raise MatchError(
                    f"{where} fixes the size {name!r} to {known.get(now, now)}, so the engine would be right for no "
                    f"other; it may be a shape rule of torch {torch.__version__}: compile with a torch that "
                    "docs/models.md lists, or report the model with this message"
                )
            known[now] = name
        self._replaced = self._replacements()

    def _replacements(self) -> int:
        """How many sizes torch replaced by others or by numbers."""
        environment = self.fake_mode.shape_env
        return len(environment.replacements) if environment is not None else 0

    # -- closing -----------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Keep what the outputs need, which are returned in the order of the dict."""
        self.check_sizes_vary("a pass")
        self.output_node.args = (tuple(self.outputs.values()),)
        self.closed = True
        self._share_sizes()
        self.fx.eliminate_dead_code()
        for node in [n for n in self.specs if not n.users]:
            self.remove(node)
        self.fx.lint()

    def program(self) -> ExportedProgram:
        """The edited graph as an ExportedProgram with inputs and outputs in the order of the dicts."""
        self.close()
        self.module.recompile()
        old = self._program
        specs = []
        for node in [n for n in self.fx.nodes if n.op == "placeholder"]:
            user = InputSpec(kind=InputKind.USER_INPUT, arg=TensorArgument(name=node.name), target=None)
            specs.append(self.specs.get(node, user))
        outputs = [
            OutputSpec(kind=OutputKind.USER_OUTPUT, arg=TensorArgument(name=n.name), target=None)
            for n in self.outputs.values()
        ]
        constants = dict(old.constants)
        for node, spec in self.specs.items():
            if spec.target not in old.state_dict:
                constants[spec.target] = self.tensors[node]
        user_inputs = [n for n in self.fx.nodes if n.op == "placeholder" and n not in self.specs]
        ranges = dict(old.range_constraints)
        for size in self.symbols.values():
            ranges[size.node.expr] = ValueRanges(0, int_oo)
        call_graph = _flat_call_graph(old, len(user_inputs), len(outputs))
        return ExportedProgram(
            root=self.module,
            graph=self.fx,
            graph_signature=ExportGraphSignature(specs, outputs),
            state_dict=old.state_dict,
            range_constraints=ranges,
            module_call_graph=call_graph,
            constants=constants,
            verifiers=old.verifiers,
        )

    def _share_sizes(self) -> None:
        """Read every dynamic size once, from the first tensor that has it."""
        first: dict[str, Node] = {}
        for node in self.calls(SYM_SIZE):
            node.replace_all_uses_with(first.setdefault(str(node.meta["val"]), node))


def _replace_dtypes(value: Any, wanted: torch.dtype) -> Any:
    """The same arguments with every floating dtype replaced, so that no step rounds to a model's short dtype."""
    if isinstance(value, torch.dtype):
        return wanted if value in LOW_PRECISION else value
    if isinstance(value, (list, tuple)):
        return type(value)(_replace_dtypes(v, wanted) for v in value)
    if isinstance(value, dict):
        return {k: _replace_dtypes(v, wanted) for k, v in value.items()}
    return value


def _flat_call_graph(program: ExportedProgram, inputs: int, outputs: int) -> list[Any]:
    """A module call graph whose root takes the inputs positionally and returns a tuple."""
    import dataclasses

    from torch.utils._pytree import tree_flatten

    root = program.module_call_graph[0]
    signature = dataclasses.replace(
        root.signature,
        in_spec=tree_flatten((tuple(range(inputs)), {}))[1],
        out_spec=tree_flatten(tuple(range(outputs)))[1],
        forward_arg_names=None,
    )
    return [dataclasses.replace(root, signature=signature)]
