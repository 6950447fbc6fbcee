"""OpenVINO GenAI: its continuous-batching pipeline, with its own cache eviction (scores of attention, block by block).

policy: norm_sum, its default aggregation, or dense; with -f32 it computes in float32, else in the precision that it
chooses (where the CPU grants no AMX, float32 decodes faster and reads prompts slower). 32 start tokens and 128 recent
ones are kept, as near to keysieve's protection as its blocks of 32 allow. apply_rotation and ADAPTIVE_RKV crash in
2026.4.1, so both stay off.
"""

from importlib.metadata import version
from typing import Any

import numpy as np
import openvino
from openvino_genai import (
    AggregationMode,
    CacheEvictionConfig,
    ContinuousBatchingPipeline,
    GenerationConfig,
    SchedulerConfig,
)

from contestants.worker import Contestant, serve

START, RECENT = 32, 128
PRECISIONS = {"float32": "f32", "float16": "f16", "u8": "u8"}


class OpenVINO(Contestant):
    def load(
        self,
        model: str,
        kv_dtype: str,
        policy: str,
        budget: int | None,
        batch: int,
        threads: int,
        longest: int,
        **_: Any,
    ) -> None:
        scheduler = SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_seqs = batch
        if policy != "dense":
            scheduler.use_cache_eviction = True
            mode = getattr(AggregationMode, policy.removesuffix("-f32").upper())
            scheduler.cache_eviction_config = CacheEvictionConfig(START, RECENT, budget, mode)
        properties = {"INFERENCE_NUM_THREADS": threads, "KV_CACHE_PRECISION": PRECISIONS[kv_dtype]}
        if policy.endswith("-f32"):
            properties["INFERENCE_PRECISION_HINT"] = "f32"
        self.pipeline = ContinuousBatchingPipeline(model, scheduler, "CPU", properties)
        self.generation = GenerationConfig(max_new_tokens=longest, ignore_eos=True, do_sample=False)
        self.batch = batch
        self.handles: list[Any] = []
        self.requests = 0

    def prefill(self, tokens: list[int]) -> None:
        for handle in self.handles:
            handle.cancel()
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
        prompt = openvino.Tensor(np.array([tokens], np.int64))
        self.handles = []
        for _ in range(self.batch):
            self.handles.append(self.pipeline.add_request(self.requests, prompt, self.generation))
            self.requests += 1
        waiting = list(self.handles)
        while waiting:
            self.pipeline.step()
            waiting = [handle for handle in waiting if not handle.can_read()]
        for handle in self.handles:
            handle.read()

    def step(self) -> int:
        self.pipeline.step()
        read = [handle.read() for handle in self.handles]
        return next(iter(read[0].values())).generated_ids[-1]

    def kv_bytes(self) -> int:
        return self.pipeline.get_metrics().kv_cache_size_in_bytes

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("openvino", "openvino-genai", "optimum-intel", "nncf")}


if __name__ == "__main__":
    serve(OpenVINO())
