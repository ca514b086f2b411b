"""What is run: prompts of random tokens, with fixed or random lengths."""

from dataclasses import dataclass
from random import Random

MAX_TOKEN_ID = 10_000  # prompts are made of ids up to this, as in nano-vLLM's benchmark


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt and how many tokens to generate for it, whatever they are."""

    prompt: list[int]
    output_len: int

    @property
    def total_len(self) -> int:
        return len(self.prompt) + self.output_len


def nano(num_prompts: int = 256, max_token_id: int = MAX_TOKEN_ID, seed: int = 0) -> list[Item]:
    """nano-vLLM's bench.py: 100 to 1,024 tokens in and as many out, in its order of random draws; 256 prompts of
    seed 0 have 142,827 tokens and generate 133,966. Fewer prompts are the first ones of a smaller draw."""
    random = Random(seed)
    prompts = [[random.randint(0, max_token_id) for _ in range(random.randint(100, 1024))] for _ in range(num_prompts)]
    return [Item(prompt, random.randint(100, 1024)) for prompt in prompts]


def fixed(
    num_prompts: int, input_len: int, output_len: int, max_token_id: int = MAX_TOKEN_ID, seed: int = 0
) -> list[Item]:
    random = Random(seed)
    return [Item([random.randint(0, max_token_id) for _ in range(input_len)], output_len) for _ in range(num_prompts)]


def poisson_arrivals(count: int, rate: float, seed: int = 0) -> list[float]:
    """Seconds at which `count` requests arrive, independently of each other, `rate` of them a second on average. An
    infinite rate is all at once."""
    random, now, times = Random(seed), 0.0, []
    for _ in range(count):
        times.append(now)
        now += 0.0 if rate == float("inf") else random.expovariate(rate)
    return times
