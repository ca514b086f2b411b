"""Everything that can be set, as frozen dataclasses that check themselves: the Python API's keywords and the
command line's flags are these fields. A None is decided at start-up from the model and the machine."""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from paged.errors import InvalidRequestError


def option(default: Any, help: str) -> Any:
    """A dataclass field with the help text its command-line flag shows."""
    return field(default=default, metadata={"help": help})


def require(condition: bool, param: str, message: str) -> None:
    if not condition:
        raise InvalidRequestError(f"{param} {message}", param=param)


@dataclass(frozen=True, kw_only=True)
class ModelArgs:
    _argument_group_name: ClassVar[str] = "model"

    model: str = option("smollm2-135m-instruct", "hub id, directory or .gguf file")
    tokenizer: str | None = option(None, "hub id or directory of the tokenizer; none: the model's own")
    skip_tokenizer_init: bool = option(False, "run without a tokenizer: token ids in, token ids out")
    revision: str | None = option(None, "hub revision: branch, tag or commit")
    load_format: Literal["auto", "safetensors", "gguf", "orbax", "dummy"] = option("auto", "dummy: random weights")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "auto: bfloat16, on a CPU float32")
    max_model_len: int | None = option(None, "longest prompt plus output, in tokens; none: the model's context")
    seed: int = option(0, "seed of dummy weights and of requests that bring none")

    def __post_init__(self) -> None:
        require(bool(self.model), "model", "must name a model")
        require(self.max_model_len is None or self.max_model_len >= 2, "max_model_len", "must be at least 2")


@dataclass(frozen=True, kw_only=True)
class CacheArgs:
    _argument_group_name: ClassVar[str] = "cache"

    block_size: int | None = option(None, "tokens in a block; none: 16, TPU 64; in 8 bits GPU 64, TPU 128")
    gpu_memory_utilization: float = option(0.92, "fraction of device memory to use, in (0, 1]; not for CPU")
    kv_cache_memory_bytes: int | None = option(None, "bytes of KV cache; none: what is left (CPU: 2 GiB at most)")
    num_gpu_blocks_override: int | None = option(None, "exact number of cache blocks, instead of sizing the pool")
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "fp8", "int8"] = option("auto", "auto: the compute dtype")
    enable_prefix_caching: bool = option(True, "share cache blocks between requests with equal prefixes")

    def __post_init__(self) -> None:
        require(self.block_size in (None, 8, 16, 32, 64, 128), "block_size", "must be 8, 16, 32, 64 or 128")
        require(0 < self.gpu_memory_utilization <= 1, "gpu_memory_utilization", "must be in (0, 1]")
        for name in ("kv_cache_memory_bytes", "num_gpu_blocks_override"):
            value = getattr(self, name)
            require(value is None or value > 0, name, "must be positive")


@dataclass(frozen=True, kw_only=True)
class SchedulerArgs:
    _argument_group_name: ClassVar[str] = "scheduler"

    max_num_seqs: int | None = option(None, "most sequences running at once; none: 256, on a CPU 16")
    max_num_batched_tokens: int | None = option(None, "most tokens in one step; none: 8192, on a CPU 512")
    max_num_queued_requests: int = option(4096, "requests that may wait; one more is refused (429)")
    max_num_queued_tokens: int = option(16_777_216, "prompt tokens that may wait; more are refused (429)")
    scheduling_policy: Literal["fcfs", "priority"] = option("fcfs", "priority: lowest value first")
    max_logprobs: int = option(20, "most logprobs a request may ask for")

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_num_queued_requests", "max_num_queued_tokens"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, "must be at least 1")
        require(0 <= self.max_logprobs <= 100, "max_logprobs", "must be in [0, 100]")


@dataclass(frozen=True, kw_only=True)
class RunnerArgs:
    _argument_group_name: ClassVar[str] = "runner"

    attention_backend: Literal["auto", "reference", "mosaic_gpu", "mosaic_tpu"] = option("auto", "auto: by device")
    tensor_parallel_size: int = option(1, "devices of this machine that share each layer")
    deterministic: bool = option(False, "the same tokens in any company (Hopper)")
    compilation_cache_dir: str | None = option("~/.cache/paged/programs", "compiled programs; empty: not kept")

    def __post_init__(self) -> None:
        require(self.tensor_parallel_size >= 1, "tensor_parallel_size", "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    model: ModelArgs = field(default_factory=ModelArgs)
    cache: CacheArgs = field(default_factory=CacheArgs)
    scheduler: SchedulerArgs = field(default_factory=SchedulerArgs)
    runner: RunnerArgs = field(default_factory=RunnerArgs)

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> "EngineConfig":
        """Sorts flat keywords, as LLM(...) takes them, into the groups; an unknown one is a TypeError."""
        groups: dict[str, Any] = {}
        types = {"model": ModelArgs, "cache": CacheArgs, "scheduler": SchedulerArgs, "runner": RunnerArgs}
        for name, group in types.items():
            own = {f.name: kwargs.pop(f.name) for f in fields(group) if f.name in kwargs}
            groups[name] = group(**own)
        if kwargs:
            known = sorted(f.name for g in groups.values() for f in fields(g))
            raise TypeError(f"unknown option {', '.join(sorted(kwargs))}; options are: {', '.join(known)}")
        return cls(**groups)
