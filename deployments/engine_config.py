"""The configuration of an engine and its replicas: `target` and `drafter`."""

# Without `from __future__ import annotations`: Ray Serve reads the builder's real argument type.

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rapid.engine.pacing import MAX_BATCH_TOKENS, STEP_BUDGET_MS
from rapid.kv_cache.memory import FREE_MEMORY_SHARE, WHOLE_GPU_SHARE
from rapid.models.info import GraphLimits


class Strict(BaseModel):
    """No unknown fields: a typo is an error that names it."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ReplicasConfig(Strict):
    """How many replicas there are. Between the bounds they follow the open leases and the KV memory in use."""

    min: int = Field(1, ge=0, description="0 lets a drafter go away while no request needs it")
    max: int = Field(1, ge=1)
    target_leases: float | None = Field(
        None, gt=0, description="open leases a replica is meant to have; three quarters of max_sequences when not set"
    )
    target_kv_share: float = Field(0.8, gt=0, le=1, description="share of its KV memory a replica is meant to use")
    upscale_delay_s: float = Field(10, ge=0)
    downscale_delay_s: float = Field(300, ge=0)

    @model_validator(mode="after")
    def _in_order(self) -> "ReplicasConfig":
        if self.max < max(1, self.min):
            raise ValueError(f"max must be at least min, got min {self.min} and max {self.max}")
        return self


class EngineConfig(Strict):
    """One model and the actors that run it."""

    model: str = Field("smollm2-135m-instruct", description="embedded name, local folder, or Hugging Face hub id")
    dtype: str = Field("auto", pattern="^(auto|float32|bfloat16|float16)$")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    device_map: Literal["auto"] | None = Field(
        None, description="auto spreads the layers over the num_gpus whole GPUs of one process"
    )
    num_cpus: float = Field(0.5, gt=0, description="what Ray reserves for the engine; not a limit on threads")
    num_gpus: float = Field(0, ge=0)
    tensor_parallel: int = Field(
        1, ge=1, description="ranks that share the model; num_cpus and num_gpus are each rank's"
    )
    replicas: ReplicasConfig = ReplicasConfig()
    threads: int | None = Field(None, ge=1, description="CPU threads of a forward pass; all cores when not set")
    quantization: str = Field(
        "none", pattern="^(none|int8|fp8|int4)$", description="of the weights: int8, int4 on a CPU; also fp8 on CUDA"
    )
    kv_dtype: Literal["auto", "int8", "fp8"] = Field(
        "auto", description="of stored keys and values: int8 on a CPU, fp8 on CUDA; the model's own type when auto"
    )
    kv_memory_gib: float | None = Field(
        None, gt=0, description="for keys and values; kv_memory_share of what is free when not set"
    )
    kv_memory_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description=f"of what weights and passes leave free; when not set, {WHOLE_GPU_SHARE:.0%} with a whole GPU "
        f"(num_gpus of 1 or more), else {FREE_MEMORY_SHARE:.0%}",
    )
    max_batch_tokens: int | None = Field(
        None,
        ge=1,
        description=f"tokens in one forward pass; when not set, {MAX_BATCH_TOKENS['cpu']} on a CPU and "
        f"{MAX_BATCH_TOKENS['cuda']} on CUDA",
    )
    step_budget_ms: float = Field(
        STEP_BUDGET_MS, gt=0, description="what a pass that reads prompts may take while other sequences decode"
    )
    graph_seconds: float = Field(GraphLimits.seconds, ge=0, description="for recording CUDA graphs at load; 0: none")
    graph_memory_gib: float = Field(GraphLimits.gib, ge=0, description="for CUDA graphs")
    max_sequences: int = Field(8, ge=1, description="requests that a replica holds at the same time")
    max_queued: int = Field(64, ge=1, description="requests that wait for a place; one more is answered 429")
    pass_timeout_s: float = Field(
        20, gt=0, description="a forward pass that takes longer, and far longer than others, ends the engine's process"
    )
    idle_timeout_s: float = Field(600, gt=0, description="a sequence unused for this long is freed")
    drain_timeout_s: float = Field(600, gt=0, description="how long a replica that is to go waits for its leases")

    @model_validator(mode="after")
    def _stores_what_the_device_reads(self) -> "EngineConfig":
        if self.kv_dtype == "fp8" and self.device == "cpu":
            raise ValueError("kv_dtype fp8 is for CUDA: on a CPU set kv_dtype to int8 or auto")
        if self.kv_dtype == "int8" and (self.device.startswith("cuda") or self.num_gpus):
            raise ValueError("kv_dtype int8 is for a CPU: on CUDA set kv_dtype to fp8 or auto")
        if self.kv_dtype == "int8" and self.dtype not in ("auto", "bfloat16"):
            raise ValueError(f"kv_dtype int8 goes with dtype bfloat16, got {self.dtype}: leave dtype at auto")
        if self.kv_dtype == "fp8" and self.dtype == "float32":
            raise ValueError("kv_dtype fp8 goes with dtype bfloat16 or float16, got float32: leave dtype at auto")
        return self

    @model_validator(mode="after")
    def _one_way_to_share(self) -> "EngineConfig":
        if self.device_map is None:
            return self
        if self.tensor_parallel > 1:
            raise ValueError("device_map is for one process and tensor_parallel for several: set one of them")
        if self.device != "auto":
            raise ValueError(f"device_map chooses the devices: leave device at auto, got {self.device}")
        if self.num_gpus % 1:
            raise ValueError(f"with device_map num_gpus is a number of whole GPUs, got {self.num_gpus:g}")
        return self

    @property
    def kv_share(self) -> float:
        """The share of free memory for keys and values, where no bytes are given."""
        return self.kv_memory_share or (WHOLE_GPU_SHARE if self.num_gpus >= 1 else FREE_MEMORY_SHARE)

    def batch_tokens(self, device: str) -> int:
        """Tokens in one forward pass on a ``device``: cpu or cuda."""
        return self.max_batch_tokens or MAX_BATCH_TOKENS[device]

    @property
    def num_stages(self) -> int:
        """How many devices a pass goes through, one after another."""
        return max(1, int(self.num_gpus)) if self.device_map else 1
