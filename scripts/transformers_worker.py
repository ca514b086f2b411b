"""Runs transformers' `generate` for scripts.compare_transformers, in an interpreter that has torch.

    python scripts/transformers_worker.py MODEL THREADS

MODEL is a checkpoint directory or a .gguf file. Each line of stdin is {"prompts": lists of token ids, "tokens": how
many to generate for each}; it is answered by {"seconds": ..., "outputs": lists of token ids}: one static batch, padded
on the left, greedy, float32, end-of-sequence ignored. The first line of stdout says which versions run.
"""

import json
import sys
import time
from pathlib import Path


def main(model_path: str, num_threads: int) -> None:
    import torch  # type: ignore[import-not-found]
    import transformers

    torch.set_num_threads(num_threads)
    path = Path(model_path)
    where = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    folder = str(path.parent if where else path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where).eval()
    model.generation_config = transformers.GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        longest = max(map(len, request["prompts"]))
        padding = [longest - len(p) for p in request["prompts"]]
        ids = torch.tensor([[0] * pad + p for pad, p in zip(padding, request["prompts"], strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
        begin = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(ids, attention_mask=mask, max_new_tokens=request["tokens"])
        seconds = time.perf_counter() - begin
        print(json.dumps({"seconds": seconds, "outputs": output[:, longest:].tolist()}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
