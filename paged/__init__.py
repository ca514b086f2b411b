"""`paged`: language-model inference in JAX, with paged attention and continuous batching."""

from typing import TYPE_CHECKING, Any

from paged.errors import EngineStoppedError, InvalidRequestError, QueueFullError, RequestFailedError
from paged.outputs import CompletionOutput, Logprob, RequestOutput
from paged.sampling_params import SamplingParams

if TYPE_CHECKING:
    from paged.llm import LLM

__all__ = [
    "LLM",
    "CompletionOutput",
    "EngineStoppedError",
    "InvalidRequestError",
    "Logprob",
    "QueueFullError",
    "RequestFailedError",
    "RequestOutput",
    "SamplingParams",
]


def __getattr__(name: str) -> Any:
    """LLM brings jax with it: it is imported when asked for."""
    if name == "LLM":
        from paged.llm import LLM

        return LLM
    raise AttributeError(f"module 'paged' has no attribute {name!r}")
