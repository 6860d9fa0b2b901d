"""Write tests/golden/demo.json: the greedy outputs of the three examples on the demo checkpoint, in float32.

    python -m tests.golden.make_demo

Run it when the demo checkpoint is trained anew. tests/test_demo.py compares them, and their kind with transformers.
"""

import json
import runpy
from pathlib import Path

from codellama import Llama

OUTPUTS = Path(__file__).parent / "demo.json"
ROOT = Path(__file__).parents[2]


def example_outputs(llama: Llama) -> dict[str, list[str]]:
    """Greedy outputs of the examples' own prompts, at most 96 tokens each."""
    prompts = {name: runpy.run_path(str(ROOT / f"example_{name}.py")) for name in ("completion", "infilling")}
    dialogs = runpy.run_path(str(ROOT / "example_instructions.py"))["DIALOGS"]
    gaps = [prompt.partition("<FILL>") for prompt in prompts["infilling"]["PROMPTS"]]
    completed = llama.text_completion(prompts["completion"]["PROMPTS"], temperature=0, max_gen_len=96)
    filled = llama.text_infilling([gap[0] for gap in gaps], [gap[2] for gap in gaps], temperature=0, max_gen_len=96)
    answered = llama.chat_completion(dialogs, temperature=0, max_gen_len=96)
    return {
        "completion": [result["generation"] for result in completed],
        "infilling": [result["generation"] for result in filled],
        "instructions": [result["generation"]["content"] for result in answered],
    }


if __name__ == "__main__":
    llama = Llama.build(max_seq_len=512, max_batch_size=4, dtype="float32", device="cpu")
    OUTPUTS.write_text(json.dumps(example_outputs(llama), indent=1) + "\n")
