"""Whole runs: right and wrong answers get their score; interruptions, batches and ranks change nothing."""

import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from codellama.errors import EvaluationError, PromptError
from codellama.evaluation.answers import Answer
from codellama.evaluation.run import Evaluation, run
from codellama.evaluation.settings import Settings
from codellama.evaluation.summary import Summary
from tests.support import problems
from tests.support.distributed import ROOT, run_ranks
from tests.support.problems import write_lines
from tests.support.serving import wait_until


@dataclass(frozen=True)
class Outcome:
    passed: bool
    reason: str


def execute_here(source: str) -> Outcome:
    """Run a program of our own, which is known to end: no model has written it."""
    try:
        exec(compile(source, "program", "exec"), {"__name__": "program"})
    except Exception as error:
        return Outcome(False, type(error).__name__)
    return Outcome(True, "passed")


def execute_by_hash(source: str) -> Outcome:
    """Let chance decide, the same for the same program: nothing that a model has written is run in the tests."""
    passed = hashlib.sha256(source.encode()).digest()[0] < 100
    return Outcome(passed, "passed" if passed else "failed")


Write = Callable[[Path, int], Path]
FORMATS: dict[str, tuple[str, Write, Callable[[problems.Exercise], str]]] = {
    "HumanEval": ("humaneval", lambda path, n: write_lines(path, problems.humaneval(n)), lambda e: e.body),
    "infilling": (
        "humaneval-infilling",
        lambda path, n: write_lines(path, problems.infilling(n)),
        lambda e: e.body.splitlines(keepends=True)[-1],
    ),
    "mbpp": ("mbpp", lambda path, n: write_lines(path, problems.mbpp(n)), lambda e: e.header + e.body),
    "sanitized": (
        "mbpp",
        lambda path, n: path.write_text(json.dumps(problems.sanitized_mbpp(n))) and path,
        lambda e: e.header + e.body,
    ),
}


def settings_for(folder: Path, task: str = "humaneval", **changes: Any) -> Settings:
    return Settings(task=task, data=folder / "problems", output_dir=folder / "out", **changes)


def mark(settings: Settings, completions: dict[str | int, str]) -> Summary:
    """A run whose model knows the answers."""
    with Evaluation(settings, execute_here) as evaluation:
        slots = evaluation.todo
        evaluation.add(slots, [Answer(completions[problem.task_id], "stop") for problem, _ in slots])
        return evaluation.finish()


@pytest.mark.parametrize("form", FORMATS)
def test_right_answers_score_1_and_wrong_ones_0(form: str, tmp_path: Path) -> None:
    task, write, solution = FORMATS[form]
    count = 164 if form == "HumanEval" else 24
    write(tmp_path / "problems", count)
    shown = 3 if task == "mbpp" else 0  # the examples of the prompt
    exercises = problems.exercises(count + shown)[shown:]
    settings = settings_for(tmp_path, task)
    with Evaluation(settings, None) as evaluation:
        ids = [problem.task_id for problem in evaluation.problems]
    assert len(ids) == len(exercises) == count

    right = mark(settings, {id: solution(e) for id, e in zip(ids, exercises, strict=True)})
    assert right.passed == [1] * count
    assert (right.estimates[1].value, right.reasons, right.n_cut) == (1.0, {"passed": count}, 0)
    mutated = {id: solution(replace(e, body=e.mutated)) for id, e in zip(ids, exercises, strict=True)}
    wrong = mark(replace(settings, output_dir=tmp_path / "wrong"), mutated)
    assert wrong.passed == [0] * count
    assert (wrong.estimates[1].value, wrong.reasons) == (0.0, {"AssertionError": count})
    mixed = {id: (mutated[id] if at % 4 else solution(exercises[at])) for at, id in enumerate(ids)}
    assert mark(replace(settings, output_dir=tmp_path / "mixed"), mixed).estimates[1].value == 0.25
    lines = [json.loads(line) for line in (tmp_path / "mixed" / "samples.jsonl").read_text().splitlines()]
    assert {line["task_id"]: line["completion"] for line in lines} == mixed


def test_an_answer_in_a_chat_is_a_program(tmp_path: Path) -> None:
    """The whole function, after a prompt that already holds its head."""
    write_lines(tmp_path / "problems", problems.humaneval(4))
    answers = {f"HumanEval/{at}": f"\n{e.header}{e.body}" for at, e in enumerate(problems.exercises(4))}
    assert mark(settings_for(tmp_path, chat=True), answers).passed == [1] * 4


@pytest.fixture
def sampled(tmp_path: Path, tiny_folder: Path) -> Settings:
    """Three drawn samples of seven problems by a tiny model."""
    write_lines(tmp_path / "problems", problems.humaneval(7))
    return settings_for(
        tmp_path, ckpt_dir=str(tiny_folder), dtype="float32", device="cpu", n=3, ks=(1, 3), temperature=0.9,
        max_gen_len=12, max_seq_len=512, seed=5,
    )  # fmt: skip


def finished(settings: Settings) -> tuple[Summary, dict[Any, Any], dict[Any, Any]]:
    """Run to the end; the summary, and samples and results by their key."""
    summary = run(settings, execute_by_hash)
    assert summary is not None
    return summary, written(settings, "samples"), written(settings, "results")


def written(settings: Settings, name: str) -> dict[Any, Any]:
    text = (settings.output_dir / f"{name}.jsonl").read_text()
    entries = [json.loads(line) for line in text.splitlines()]
    assert len({(entry["task_id"], entry["index"]) for entry in entries}) == len(entries)
    return {(entry["task_id"], entry["index"]): entry for entry in entries}


def test_a_run_of_drawn_samples(sampled: Settings) -> None:
    summary, samples, results = finished(sampled)
    assert list(samples) == [(f"HumanEval/{at}", index) for at in range(7) for index in range(3)]
    assert len({sample["completion"] for sample in samples.values()}) > 15, "each sample has a seed of its own"
    assert summary.passed is not None
    assert 0 < sum(summary.passed) < 21
    assert sum(summary.passed) == sum(result["passed"] for result in results.values())
    assert summary.estimates[3].value == sum(count > 0 for count in summary.passed) / 7
    assert summary.n_cut == sum(sample["finish_reason"] == "length" for sample in samples.values())
    saved = json.loads((sampled.output_dir / "summary.json").read_text())
    assert saved["pass_at_k"]["1"]["value"] == pytest.approx(sum(summary.passed) / 21)


def test_batches_seeds_and_later_samples(sampled: Settings, tmp_path: Path) -> None:
    """Samples depend on neither the batch nor how many there are; another seed gives others."""
    _, samples, _ = finished(sampled)
    one_row = replace(sampled, output_dir=tmp_path / "one", max_batch_size=1, n=1, ks=(1,), limit=3)
    assert finished(one_row)[1] == {key: samples[key] for key in samples if key[1] == 0 and key[0] < "HumanEval/3"}
    more = replace(sampled, output_dir=tmp_path / "one", max_batch_size=4)
    assert finished(more)[1] == samples
    other = replace(sampled, output_dir=tmp_path / "other", seed=6)
    assert finished(other)[1] != samples


def test_generated_first_and_executed_later(sampled: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = finished(replace(sampled, output_dir=tmp_path / "whole"))
    unmarked = run(sampled, None)
    assert unmarked is not None
    assert (unmarked.passed, unmarked.estimates, unmarked.reasons) == (None, {}, {})
    assert "not executed: --allow_code_execution" in unmarked.format()
    monkeypatch.setattr("codellama.evaluation.run._build", lambda _: pytest.fail("no sample is missing"))
    later = finished(sampled)
    assert (later[0].passed, *later[1:]) == (whole[0].passed, *whole[1:])


def test_a_longer_timeout_needs_no_new_samples(sampled: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    run(sampled, None)
    samples = written(sampled, "samples")
    monkeypatch.setattr("codellama.evaluation.run._build", lambda _: pytest.fail("no sample is missing"))
    longer = replace(sampled, timeout=30.0)
    summary, *_ = finished(longer)  # nothing was run with the shorter one
    with pytest.raises(EvaluationError, match=r"timeout 30\.0 \(now 10\.0\).*remove results\.jsonl.*the samples stay"):
        finished(sampled)
    (sampled.output_dir / "results.jsonl").unlink()
    assert finished(sampled)[0].passed == summary.passed
    assert written(sampled, "samples") == samples
    with pytest.raises(EvaluationError, match=r"seed .* timeout .* another --output_dir to begin anew"):
        finished(replace(longer, seed=99))


class BrokenError(Exception):
    """Stands for whatever ends a run."""


def test_a_run_that_fails_in_the_middle_is_gone_on_with(sampled: Settings, tmp_path: Path) -> None:
    whole = finished(replace(sampled, output_dir=tmp_path / "whole"))
    programs: list[str] = []

    def fail_at_ninth(source: str) -> Outcome:
        programs.append(source)
        if len(programs) == 9:
            raise BrokenError
        return execute_by_hash(source)

    with pytest.raises(BrokenError):
        run(replace(sampled, max_batch_size=2), fail_at_ninth)
    assert len(written(sampled, "results")) >= 8
    assert len(written(sampled, "samples")) >= 9
    later = finished(sampled)
    assert (later[0].passed, *later[1:]) == (whole[0].passed, *whole[1:])


def test_a_killed_process_is_gone_on_with(tmp_path: Path) -> None:
    """SIGKILL in the middle of 164 problems and a torn line: the samples are those of a run that was left alone."""
    write_lines(tmp_path / "problems", problems.humaneval())
    settings = settings_for(
        tmp_path, max_gen_len=24, max_seq_len=512, max_batch_size=1, dtype="float32", device="cpu"
    )  # fmt: skip
    command = [sys.executable, "-m", "codellama", "evaluate", "humaneval", "--data", str(settings.data)]
    command += ["--output_dir", str(settings.output_dir), "--max_gen_len", "24", "--max_seq_len", "512"]
    command += ["--max_batch_size", "1", "--dtype", "float32", "--device", "cpu"]
    samples = settings.output_dir / "samples.jsonl"
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: samples.exists() and samples.stat().st_size)
            process.send_signal(signal.SIGSTOP)
            n_before = samples.read_bytes().count(b"\n")
        finally:
            process.kill()
    assert 0 < n_before < 164
    with samples.open("ab") as file:
        file.write(b'{"task_id": "HumanEval/163", "index": 0, "comple')
    n = n_before + 5
    again, whole = replace(settings, limit=n), replace(settings, limit=n, output_dir=tmp_path / "whole")
    summary, resumed, _ = finished(again)
    expected, alone, _ = finished(whole)
    assert resumed == alone
    assert len(resumed) == n
    assert (summary.passed, summary.reasons, summary.n_cut) == (expected.passed, expected.reasons, expected.n_cut)


def test_a_file_that_changed_is_noticed(sampled: Settings) -> None:
    finished(replace(sampled, limit=1))
    write_lines(sampled.data, problems.humaneval(6))
    with pytest.raises(EvaluationError, match="were made with data"):
        run(sampled, None)


def test_results_of_lost_samples_are_not_believed(sampled: Settings) -> None:
    whole = finished(replace(sampled, limit=1))
    (sampled.output_dir / "samples.jsonl").unlink()
    with pytest.raises(EvaluationError, match=r"results\.jsonl has results of samples that .*samples\.jsonl lacks"):
        run(replace(sampled, limit=1), execute_by_hash)
    (sampled.output_dir / "results.jsonl").unlink()
    again = finished(replace(sampled, limit=1))
    assert (again[0].passed, *again[1:]) == (whole[0].passed, *whole[1:])


def test_what_cannot_be_asked_is_said_before_the_first_sample(sampled: Settings) -> None:
    tight = replace(sampled, max_seq_len=80)
    with pytest.raises(PromptError, match=r"the prompt of HumanEval/\d has \d+ tokens, but max_seq_len is 80"):
        run(tight, None)
    assert (sampled.output_dir / "samples.jsonl").read_text() == ""
    finished(sampled)  # the folder is not spoiled
    with pytest.raises(EvaluationError, match="humaneval has no gaps to fill: leave --suffix_first out"):
        run(replace(sampled, suffix_first=True), None)


def test_a_gap_can_be_asked_in_both_orders_but_not_in_a_chat(sampled: Settings, tmp_path: Path) -> None:
    write_lines(sampled.data, problems.infilling(3))
    plain = replace(sampled, task="humaneval-infilling", n=1, ks=(1,), temperature=0, output_dir=tmp_path / "plain")
    _, psm, _ = finished(plain)
    _, spm, _ = finished(replace(plain, suffix_first=True, output_dir=tmp_path / "suffix_first"))
    assert psm.keys() == spm.keys()
    assert psm != spm
    with pytest.raises(EvaluationError, match="humaneval-infilling cannot be asked in a chat: leave --chat out"):
        run(replace(plain, chat=True), None)


def test_the_bar_has_a_running_score(sampled: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    summary = run(sampled, execute_by_hash, progress=True)
    assert summary is not None
    assert summary.passed is not None
    last = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert "100%" in last
    assert "21/21" in last
    assert f"passed {sum(summary.passed) / 21:.1%}" in last
    run(sampled, execute_by_hash, progress=False)
    assert "sample" not in capsys.readouterr().err


def run_on_a_rank(settings: Settings) -> tuple[list[int] | None, str]:
    """What a run returns, and what one with a prompt that is too long says."""
    summary = run(settings, execute_by_hash)
    with pytest.raises(PromptError) as caught:
        run(replace(settings, max_seq_len=80, output_dir=settings.output_dir / "tight"), None)
    return None if summary is None else summary.passed, str(caught.value)


@pytest.mark.parametrize("model_parallel_size", [1, 2])
def test_two_processes_write_what_one_writes(model_parallel_size: int, sampled: Settings, tmp_path: Path) -> None:
    """As two replicas, and as two halves of one."""
    alone, samples, results = finished(sampled)
    spread = replace(sampled, output_dir=tmp_path / "spread", model_parallel_size=model_parallel_size)
    (first, said), (second, repeated) = run_ranks(2, run_on_a_rank, spread)
    assert (first, second) == (alone.passed, None)
    assert said == repeated
    assert "max_seq_len is 80" in said
    assert written(spread, "samples") == samples
    assert written(spread, "results") == results


def test_a_run_that_fails_leaves_no_program_running(sampled: Settings) -> None:
    def slow(source: str) -> Outcome:
        time.sleep(0.05)
        raise BrokenError

    with pytest.raises(BrokenError):
        run(sampled, slow)
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("sandbox")] == []
