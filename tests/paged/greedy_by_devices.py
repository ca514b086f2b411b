"""Greedy tokens by number of devices: python -m tests.paged.greedy_by_devices FOLDER '{"config": {}, "sizes": []}'"""

import json
import sys
from pathlib import Path

from paged.sampling_params import SamplingParams
from tests.paged.tiny import make_engine, run, tokens

PROMPTS = {"short": [3, 1, 4], "long": [(7 * i) % 150 for i in range(37)], "middle": [5, 9, 2, 6, 5, 3, 5, 8]}
SMALL = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "compilation_cache_dir": ""}


def main(folder: Path, config: dict, sizes: list[int], **options) -> dict[int, dict]:
    (folder / "config.json").write_text(json.dumps(config))
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)
    results = {}
    for size in sizes:
        engine = make_engine(str(folder), tensor_parallel_size=size, **{"load_format": "dummy"} | SMALL | options)
        deltas = run(engine, {id: (prompt, params) for id, prompt in PROMPTS.items()})
        [device, *_] = engine.runner.state.caches[0]
        results[size] = {
            "tokens": {id: tokens(deltas[id]) for id in PROMPTS},
            "weight_bytes": engine.ledger.weights,
            "cache_bytes": engine.ledger.cache,
            "compiles_after_start": engine.compiles.count,
            "cache_devices": len(device.sharding.device_set),
        }
        engine.close()
    return results


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), **json.loads(sys.argv[2]))))
