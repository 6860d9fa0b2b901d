"""The command `codellama evaluate`: its flags, checked before anything is read or loaded.

It knows nothing of how a score comes about; `run.py` does.
"""

import logging
import os
import sys
from functools import partial
from pathlib import Path

from codellama.evaluation.settings import Settings, parse_ks

logger = logging.getLogger(__name__)


def evaluate(
    task: str,
    *,
    data: str,
    output_dir: str | None = None,
    allow_code_execution: bool = False,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    n: int = 1,
    k: str = "1",
    temperature: float = 0.0,
    top_p: float = 0.95,
    max_gen_len: int = 512,
    chat: bool = False,
    suffix_first: bool = False,
    limit: int | None = None,
    model: str | None = None,
    variant: str | None = None,
    timeout: float = 10.0,
    n_workers: int | None = None,
    max_seq_len: int = 2048,
    max_batch_size: int = 4,
    model_parallel_size: int | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    checkpoint_format: str | None = None,
) -> None:
    """Score a model on HumanEval, MBPP, or HumanEval infilling.

    Samples are written as they come, and the same command goes on where it was interrupted. Generated programs are run
    only with --allow_code_execution, in a sandbox; docs/evaluation.md says what it does not protect from.

    Args:
        task: humaneval, mbpp or humaneval-infilling.
        data (FILE): the benchmark's own file of problems, as it was published.
        output_dir (FOLDER): for samples, results and summary; without it, evaluation-TASK.
        allow_code_execution: run the generated programs, without which there is no score.
        n: samples of each problem.
        k (LIST): which pass@k to estimate, with commas between.
        temperature: 0 always takes the most probable token, as the paper does for pass@1.
        top_p: draw from the most probable tokens that together have this probability.
        max_gen_len: tokens of a sample at most.
        chat: ask as an Instruct model is asked, in a chat.
        suffix_first: show the model what stands after the gap first, for infilling.
        limit: only this many problems.
        model (NAME): 7b, 13b, 34b or 70b: also show what the paper has for it.
        variant (NAME): base, python or instruct, with --model.
        timeout (SECONDS): what a program may take.
        n_workers: programs that run at once; without it, half as many as there are cores.
        max_batch_size: samples that are generated at once.
        model_parallel_size: processes that share one copy of the weights; without it, all of them.
        seed: makes the samples repeat.

    Examples:
        codellama evaluate humaneval --data HumanEval.jsonl.gz --ckpt_dir CodeLlama-7b
        codellama evaluate mbpp --data mbpp.jsonl --allow_code_execution
        codellama evaluate mbpp --data mbpp.jsonl --ckpt_dir CodeLlama-7b-Instruct --chat
        codellama evaluate humaneval --data HumanEval.jsonl --n 100 --k 1,10,100 --temperature 0.8
    """
    settings = Settings(
        task=task,
        data=Path(data),
        output_dir=Path(output_dir if output_dir is not None else f"evaluation-{task}"),
        ckpt_dir=ckpt_dir,
        tokenizer_path=tokenizer_path,
        checkpoint_format=checkpoint_format,
        n=n,
        ks=parse_ks(k),
        temperature=temperature,
        top_p=top_p,
        max_gen_len=max_gen_len,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
        seed=seed,
        limit=limit,
        chat=chat,
        suffix_first=suffix_first,
        timeout=timeout,
        n_workers=max(1, (os.cpu_count() or 1) // 2) if n_workers is None else n_workers,
        model=model,
        variant=variant,
        model_parallel_size=model_parallel_size,
        device=device,
        dtype=dtype,
        quantize=quantize,
    )
    from codellama.evaluation.run import run

    execute = None
    if allow_code_execution:
        from codellama.evaluation.execution import isolation, run_program

        if os.environ.get("RANK", "0") == "0":
            logger.info("%s", isolation())
        execute = partial(run_program, timeout=timeout)
    summary = run(settings, execute, progress=sys.stderr.isatty())
    if summary is not None:
        print(summary.format())
        print(f"samples, results and summary are in {settings.output_dir}")
