"""The embedded engine: a bundle on ONNX Runtime, or its plan on TensorRT, with generation in bounded memory."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from keysieve.compiler.bundle import MODEL, PROGRAM, STATE, WEIGHTS, Bundle, open_bundle
from keysieve.compiler.config import TARGETS, EvictionConfig, PolicyConfig
from keysieve.compiler.detokenize import new_text
from keysieve.compiler.head_classes import class_budgets
from keysieve.compiler.rows import MOST_ROWS, one_a_sequence
from keysieve.compiler.runtimes import Runtime, Session
from keysieve.compiler.sampling import Sampling
from keysieve.compiler.session import Counters
from keysieve.errors import BundleError, ConfigError, EngineError

Prompt = str | Sequence[int]
DEVICES = ("cpu", "cuda")


@dataclass
class Generation:
    """One finished sequence: its new tokens, their text, and why it stopped ("stop" or "length")."""

    text: str
    tokens: list[int]
    reason: str


@dataclass
class Step:
    """What a stream yields: the new token of every sequence (None where it has ended) and its text."""

    tokens: list[int | None]
    texts: list[str]


@dataclass
class Timing:
    """Seconds and tokens of the last request: the prompt, and the decoding steps after the first token.

    A sequence's first token comes with its prompt, so it is no decoded one; time that the caller of `stream` takes
    between two steps does not count.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    decoded_tokens: int = 0
    decode_seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass
class _Sequence:
    """One sequence of a running request."""

    prompt: list[int]
    pinned: int
    tokens: list[int] = field(default_factory=list)
    reason: str | None = None
    context: int = 0  # tokens before this one are no longer needed to decode new text
    shown: int = 0  # tokens whose text a stream has yielded


class Engine:
    """A loaded bundle. `generate` and `stream` serve requests; `session` gives the bare step loop."""

    def __init__(self, bundle: Bundle, runtime: Runtime):
        self.bundle = bundle
        self.manifest = bundle.manifest
        self._runtime = runtime
        self._initial = load_file(bundle.path / STATE) if STATE in bundle.manifest["files"] else {}
        self._running: Session | None = None
        self._counters: Counters | None = None
        self.timing = Timing()

    @property
    def counters(self) -> Counters | None:
        """Those of the last request, as far as it got."""
        return self._running.counters if self._running is not None else self._counters

    @cached_property
    def tokenizer(self) -> Any:
        """The model's, loaded when it is needed; None where the bundle has none."""
        return _load_tokenizer(self.bundle.path)

    # -- requests ----------------------------------------------------------------------------------------------------
    def generate(self, prompts: Prompt | Sequence[Prompt], **options: Any) -> list[Generation]:
        """Generate for one prompt or a batch of unequal ones; see `stream` for the options. Always returns a list."""
        sequences, steps = self._start(prompts, **options)
        for _ in steps:
            pass
        return [
            Generation(self._text(sequence.tokens), sequence.tokens, sequence.reason or "length")
            for sequence in sequences
        ]

    def stream(self, prompts: Prompt | Sequence[Prompt], **options: Any) -> Iterator[Step]:
        """Yield one Step a generated token.

        prompts: text, or token ids, or a list of either. Options: max_new_tokens=128; temperature=0, top_p=1, top_k=0,
        seed=None; stop_tokens=None (the model's own end tokens; [] never stops); chat=False wraps text prompts in the
        model's chat template; budget=None (the bundle's; one number or one a sequence); prompt=None ("evictable" or
        "pinned", the bundle's by default); chunk=None (prompt tokens a step); capacity=None (rows allocated);
        dense=False (never evict); ignore_position_limit=False.
        Raises EngineError, before any work, for a request that cannot be served.
        """
        return self._start(prompts, **options)[1]

    def session(
        self,
        batch: int = 1,
        budget: int | Sequence[int] | None = None,
        capacity: int | None = None,
        dense: bool = False,
        pinned: Sequence[int] | None = None,
        chunk: int | None = None,
        total: int | None = None,
    ) -> Session:
        """The step loop without tokenizer and sampling; options as Session's.

        dense: never evict (capacity is then required).
        """
        eviction = self.manifest["eviction"]
        if dense and capacity is None:
            raise EngineError("a dense session needs a capacity: the number of tokens it will hold")
        wanted: int | Sequence[int] | None = None if dense else eviction["budget"] if budget is None else budget
        if capacity is None:
            capacity = int(np.max(np.asarray(wanted))) + int(eviction["interval"])
        self._runtime.check(batch, capacity, 1)
        return self._runtime.session(self.manifest, batch, capacity, wanted, pinned, self._initial, chunk, total)

    # -- the request loop --------------------------------------------------------------------------------------------
    def _start(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        stop_tokens: Sequence[int] | None = None,
        chat: bool = False,
        budget: int | Sequence[int] | None = None,
        prompt: str | None = None,
        chunk: int | None = None,
        capacity: int | None = None,
        dense: bool = False,
        ignore_position_limit: bool = False,
    ) -> tuple[list[_Sequence], Iterator[Step]]:
        eviction = self.manifest["eviction"]
        ids = self._tokenize(prompts, chat)
        if max_new_tokens < 1:
            raise EngineError(f"max_new_tokens is {max_new_tokens}; at least one token must be asked for")
        total = max(len(tokens) for tokens in ids) + max_new_tokens
        self._check_positions(total, ignore_position_limit)
        prompt_mode = prompt or eviction["prompt"]
        if prompt_mode not in ("evictable", "pinned"):
            raise EngineError(f"unknown prompt mode {prompt_mode!r}; choose evictable or pinned")
        sequences = [_Sequence(tokens, len(tokens) if prompt_mode == "pinned" else 0) for tokens in ids]
        budgets = one_a_sequence(eviction["budget"] if budget is None else budget, len(ids))
        if not dense:
            self._check_pinned(sequences, budgets)
        interval, most = int(eviction["interval"]), int(budgets.max())
        if chunk is not None and chunk < 1:
            raise EngineError(f"chunk is {chunk}; a step takes at least one token")
        chunk = min(chunk or self._runtime.chunk(len(ids)) or interval, total)
        needed = total if dense else min(total, most + max(interval, chunk))
        capacity = needed if capacity is None else capacity
        if capacity < needed:
            raise EngineError(
                f"capacity {capacity} is too small: "
                + (
                    f"{total} tokens without eviction need as many rows"
                    if dense
                    else f"a budget of {most} rows with chunks of {chunk} tokens and interval {interval} needs "
                    f"{needed}; use a larger capacity, or a smaller budget or chunk"
                )
            )
        self._runtime.check(len(ids), capacity, chunk)
        pinned = [sequence.pinned for sequence in sequences]
        session = self.session(len(ids), budgets.tolist(), capacity, dense, pinned, chunk, total)
        sampling = Sampling(temperature, top_p, top_k, seed)
        stops = set(self.manifest.get("stop_tokens", []) if stop_tokens is None else stop_tokens)
        return sequences, self._run(session, sequences, sampling, stops, max_new_tokens, chunk)

    def _run(
        self,
        session: Session,
        sequences: list[_Sequence],
        sampling: Sampling,
        stops: set[int],
        max_new_tokens: int,
        chunk: int,
    ) -> Iterator[Step]:
        self._running = session
        try:
            started = time.perf_counter()
            prompts = [sequence.prompt for sequence in sequences]
            steps = session.decode(prompts, chunk, sampling, stops, max_new_tokens)
            drawn = next(steps)
            timing = self.timing = Timing(sum(map(len, prompts)), time.perf_counter() - started)
            while True:
                new: list[int | None] = []
                for sequence, token in zip(sequences, drawn, strict=True):
                    if sequence.reason is not None:
                        new.append(None)
                        continue
                    new.append(token)
                    if token in stops:
                        sequence.reason = "stop"
                    else:
                        sequence.tokens.append(token)
                        if len(sequence.tokens) == max_new_tokens:
                            sequence.reason = "length"
                yield Step(new, [self._new_text(sequence) for sequence in sequences])
                going = np.array([sequence.reason is None for sequence in sequences])
                if not going.any():
                    break
                started = time.perf_counter()
                drawn = steps.send(going)
                timing.decode_seconds += time.perf_counter() - started
                timing.decoded_tokens += int(going.sum())
        finally:
            self._counters = session.counters
            if self._running is session:
                self._running = None
            session.close()

    def _tokenize(self, prompts: Prompt | Sequence[Prompt], chat: bool) -> list[list[int]]:
        if not len(prompts):
            raise EngineError("the prompt is empty; give at least one token")
        single = isinstance(prompts, str) or isinstance(prompts[0], (int, np.integer))
        result = []
        for prompt in [prompts] if single else prompts:
            if isinstance(prompt, str):
                prompt = self.encode(prompt, chat)
            ids = [int(token) for token in prompt]  # type: ignore[union-attr,arg-type]
            if not ids:
                raise EngineError("a prompt is empty; give at least one token")
            bad = [token for token in ids if not 0 <= token < self.manifest["vocab_size"]]
            if bad:
                raise EngineError(f"token {bad[0]} is outside the model's vocabulary of {self.manifest['vocab_size']}")
            result.append(ids)
        return result

    def encode(self, text: str, chat: bool = False) -> list[int]:
        """The tokens of a text prompt; chat wraps it in the model's template. Raises EngineError without tokenizer."""
        if self.tokenizer is None:
            raise EngineError(f"{self.bundle.path} has no tokenizer; give token ids instead of text")
        if not chat:
            return list(self.tokenizer(text)["input_ids"])
        if not self.tokenizer.chat_template:
            raise EngineError(f"{self.bundle.path}: the model's tokenizer has no chat template; leave chat out")
        from jinja2 import TemplateError

        message = [{"role": "user", "content": text}]
        try:
            rendered = self.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise EngineError(
                f"{self.bundle.path}: the model's chat template fails on this text ({error}); leave chat out"
            ) from error
        return list(self.tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def _check_positions(self, total: int, ignore: bool) -> None:
        limit = self.manifest.get("position_limit")
        if limit and total > limit and not ignore:
            raise EngineError(
                f"prompt and new tokens make {total} positions, the model was made for {limit}; "
                "ask for fewer tokens, or pass ignore_position_limit (quality is then not known)"
            )

    def _check_pinned(self, sequences: list[_Sequence], budgets: np.ndarray) -> None:
        eviction = self.manifest["eviction"]
        sinks, recent = int(eviction["sinks"]), int(eviction["recent"])
        classes = class_budgets(self.manifest["classes"], budgets, sinks + recent)
        for sequence, budget in zip(sequences, classes.min(axis=0, initial=MOST_ROWS), strict=True):
            if sequence.pinned and sequence.pinned + recent >= budget:
                narrow = " of its narrowest heads" if len(classes) > 1 else ""
                raise EngineError(
                    f"a pinned prompt of {sequence.pinned} tokens and {recent} recent rows do not fit a budget of "
                    f"{budget} rows{narrow}; raise it above {sequence.pinned + recent}, or make the prompt evictable"
                )

    # -- text --------------------------------------------------------------------------------------------------------
    def _text(self, tokens: Sequence[int]) -> str:
        if self.tokenizer is None:
            return ""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _new_text(self, sequence: _Sequence) -> str:
        """Text that the newest tokens complete; a character whose bytes are not all there yet waits."""
        shown = sequence.shown
        before, new = sequence.tokens[sequence.context : shown], sequence.tokens[shown:]
        text = new_text(self._text, before, new, sequence.reason is not None)
        if text is None:
            return ""
        sequence.context, sequence.shown = shown, len(sequence.tokens)
        return text


def load(
    path: Path | str,
    threads: int | None = None,
    device: str = "cpu",
    native: bool | None = None,
    compiled: bool = False,
) -> Engine:
    """Open a bundle for generation.

    device "cpu" or "cuda": a bundle of the target torch runs on either. Others run on ONNX Runtime on a CPU, and their
    TensorRT plans on a GPU. threads: of a CPU (default: all cores). native, on ONNX Runtime: True runs with keysieve's
    custom ops, False without; by default with them where they were built. compiled, on torch: let torch.compile fuse
    the decoding step, which takes about a minute once and is faster then.
    Raises BundleError for a damaged bundle or one of another version, EngineError where the device cannot run it.
    """
    if device not in DEVICES:
        raise EngineError(f"unknown device {device!r}; choose one of {', '.join(DEVICES)}")
    bundle = open_bundle(path)
    _check_complete(bundle)
    on_torch = bundle.manifest["target"] == "torch"
    if compiled and not on_torch:
        raise EngineError(f"{bundle.path} is not of the target torch, so there is nothing for torch.compile to fuse")
    if native is not None and (on_torch or device == "cuda"):
        raise EngineError("native chooses custom ops of ONNX Runtime, which does not run this bundle; leave it out")
    if on_torch:
        from keysieve.compiler.runtimes.torch import open_runtime

        return Engine(bundle, open_runtime(bundle, device, threads, compiled))
    if device == "cuda":
        from keysieve.compiler.runtimes.tensorrt import PlanRuntime

        return Engine(bundle, PlanRuntime(bundle))
    from keysieve.compiler.runtimes.onnxruntime import OnnxRuntime

    return Engine(bundle, OnnxRuntime(bundle, threads, native))


def _check_complete(bundle: Bundle) -> None:
    """Raise BundleError unless the bundle is of a known target and names the files that this needs."""
    target, policy = bundle.manifest["target"], _policy(bundle)
    if target not in TARGETS:
        raise BundleError(f"{bundle.path} is of target {target!r}, which this keysieve does not know; compile it again")
    needed = [PROGRAM, WEIGHTS] if target == "torch" else [MODEL]
    if policy.trigonometric and policy.centres == "online" and bundle.manifest["classes"]:
        needed.append(STATE)
    missing = [name for name in needed if name not in bundle.manifest["files"]]
    if missing:
        raise BundleError(f"{bundle.path} lacks {', '.join(missing)}; compile the bundle again")


def _policy(bundle: Bundle) -> PolicyConfig:
    """The policy of a bundle. Raises BundleError unless all that a manifest says of eviction is there."""
    eviction = bundle.manifest["eviction"]
    try:
        missing = sorted({each.name for each in fields(EvictionConfig)} - set(eviction))
        if not missing:
            return PolicyConfig(**eviction["policy"])
        cause: object = f"it lacks {', '.join(missing)}"
    except (TypeError, ConfigError) as error:
        cause = error
    raise BundleError(f"{bundle.path}: its manifest's eviction is damaged: {cause}; compile the bundle again")


def _load_tokenizer(path: Path) -> Any:
    if not (path / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path))
