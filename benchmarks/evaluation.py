"""Evaluation: one process against two replicas, with one thread each; and known solutions through the sandbox.

python -m benchmarks.evaluation replicas
python -m benchmarks.evaluation solutions

The problems are this repository's own, in HumanEval's format. `replicas` generates with the demo checkpoint and runs
nothing; the time begins when the model is loaded. It alternates between one process and two, and compares the samples.
`solutions` runs each problem's own solution, and the same with a wrong result.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import fire

from benchmarks.machine import report
from codellama.evaluation.answers import Answer
from codellama.evaluation.run import Evaluation, generate
from codellama.evaluation.settings import Settings
from codellama.llama import Llama
from tests.support import problems


def replicas(n_problems: int = 164, max_gen_len: int = 128, repeats: int = 3) -> None:
    """Generate greedy samples, by one process and by two."""
    with tempfile.TemporaryDirectory() as folder:
        data = problems.write_lines(Path(folder) / "problems", problems.humaneval(n_problems))
        rows: list[dict[str, Any]] = []
        written: set[str] = set()
        for repeat in range(repeats):
            seconds = {}
            for size in (1, 2):
                output = Path(folder) / f"{repeat}-{size}"
                seconds[size] = run_ranks(size, data, output, max_gen_len)
                written.add((output / "samples.jsonl").read_text())
            rows.append({"one_s": seconds[1], "two_s": seconds[2], "times_faster": seconds[1] / seconds[2]})
    arguments = {"n_problems": n_problems, "max_gen_len": max_gen_len, "same_samples": len(written) == 1}
    report("evaluation replicas", arguments, rows)


def run_ranks(size: int, data: Path, output: Path, max_gen_len: int) -> float:
    """Run so many replicas with one thread each; returns the seconds of world rank 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.evaluation", "one", str(data), str(output), str(max_gen_len)]
    ranks = []
    for rank in range(size):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        env = os.environ | {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    outputs = [rank.communicate()[0] for rank in ranks]
    assert not any(rank.returncode for rank in ranks), "a process failed"
    return float(json.loads(outputs[0]))


def one(data: str, output: str, max_gen_len: int) -> None:
    """Be one rank; world rank 0 prints how long all samples took."""
    settings = Settings("humaneval", Path(data), Path(output), max_gen_len=max_gen_len, max_seq_len=1024)
    llama = Llama.build(max_seq_len=1024, max_batch_size=4, model_parallel_size=1, device="cpu", dtype="float32")
    if llama.parallel.world_rank > 0:
        generate(llama, settings, None)
        return
    with Evaluation(settings, None) as evaluation:
        begin = time.perf_counter()
        generate(llama, settings, evaluation)
        print(json.dumps(time.perf_counter() - begin))


def solutions(n_problems: int = 164, n_workers: int = 2) -> None:
    """Run each problem's solution in the sandbox, as it is and with a wrong result."""
    from codellama.evaluation.execution import run_program  # late: the other benchmark runs nothing

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = problems.write_lines(Path(folder) / "problems", problems.humaneval(n_problems))
        for kind in ("right", "wrong"):
            settings = Settings("humaneval", data, Path(folder) / kind, n_workers=n_workers)
            bodies = [
                exercise.body if kind == "right" else exercise.mutated for exercise in problems.exercises(n_problems)
            ]
            begin = time.perf_counter()
            with Evaluation(settings, partial(run_program, timeout=settings.timeout)) as evaluation:
                evaluation.add(evaluation.todo, [Answer(body, "stop") for body in bodies])
                summary = evaluation.finish()
            assert summary.passed is not None, "all were run"
            rows.append({"solutions": kind, "passed": sum(summary.passed), "seconds": time.perf_counter() - begin})
    report("evaluation solutions", {"n_problems": n_problems, "n_workers": n_workers}, rows)


if __name__ == "__main__":
    fire.Fire({"replicas": replicas, "one": one, "solutions": solutions})
