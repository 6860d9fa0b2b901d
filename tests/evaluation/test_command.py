"""The command: wrong flags before anything is loaded, the table, and nothing executed unless it is allowed."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from codellama import cli
from codellama.evaluation.pass_at_k import wilson
from codellama.evaluation.settings import Settings
from codellama.evaluation.summary import Summary
from tests.support import problems
from tests.support.problems import write_lines


def evaluate(*words: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run `codellama evaluate`; return why it ended, or nothing."""
    monkeypatch.setattr(sys, "argv", ["codellama", "evaluate", *words])
    try:
        cli.main()
    except SystemExit as end:
        return str(end.code)
    return ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["humaneval-x"], "humaneval-x is no benchmark; there are humaneval, mbpp, humaneval-infilling"),
        (["mbpp", "--n", "0"], "n is 0; at least 1 was expected"),
        (["mbpp", "--limit", "0"], "limit is 0; at least 1"),
        (["mbpp", "--max_gen_len", "0"], "max_gen_len is 0; at least 1"),
        (["mbpp", "--n_workers", "0"], "n_workers is 0; at least 1"),
        (["mbpp", "--n", "5"], "n is 5, but greedy samples are all the same: give --temperature 0.8"),
        (["mbpp", "--n", "5", "--temperature", "1", "--top_p", "0"], "greedy samples are all the same"),
        (["mbpp", "--k", "10"], "k is 10, but there are 1 samples of each problem: k goes from 1 to n"),
        (["mbpp", "--k", "1,x"], "k is 1,x; integers with commas between, such as 1,10,100, were expected"),
        (["mbpp", "--k", ""], "integers with commas between"),
        (["mbpp", "--k", "0,1"], "k goes from 1 to n"),
        (["mbpp", "--model", "7b"], "model and variant go together"),
        (["mbpp", "--model", "8b", "--variant", "base"], "model is 8b; one of 7b, 13b, 34b, 70b was expected"),
        (["mbpp", "--model", "7b", "--variant", "x"], "variant is x; one of base, python, instruct"),
        (["mbpp", "--timeout", "0"], "timeout is 0; seconds above 0"),
        (["mbpp", "--temperature", "-1"], "temperature is -1"),
        (["mbpp", "--max_seq_len", "0"], "max_seq_len is 0"),
        (["mbpp", "--chat", "--suffix_first"], "chat and suffix_first exclude each other"),
        (["mbpp"], "No such file or directory: 'absent'"),
    ],
)
def test_wrong_flags(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("codellama.evaluation.run._build", lambda _: pytest.fail("a model was loaded"))
    assert message in evaluate(*words, "--data", "absent", monkeypatch=monkeypatch)
    assert list(tmp_path.iterdir()) == []


def test_the_data_must_be_given(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("mbpp", monkeypatch=monkeypatch) == "2"
    assert "evaluate needs --data" in capsys.readouterr().err


def test_nothing_is_executed_unless_it_is_allowed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Samples are written without; with it, the programs go to the sandbox with the timeout that was asked for."""
    ran: list[tuple[str, float]] = []

    class Passed:
        passed, reason = True, "passed"

    def run_program(source: str, *, timeout: float) -> Passed:
        ran.append((source, timeout))
        return Passed()

    sandbox: Any = ModuleType("codellama.evaluation.execution")
    sandbox.run_program, sandbox.isolation = run_program, lambda: "none of it is real"
    monkeypatch.setitem(sys.modules, "codellama.evaluation.execution", sandbox)
    data = write_lines(tmp_path / "problems", problems.humaneval(3))
    words = ["humaneval", "--data", str(data), "--ckpt_dir", str(tiny_folder), "--max_gen_len", "8", "--device", "cpu"]
    words += ["--max_seq_len", "512", "--output_dir", str(tmp_path / "out"), "--timeout", "3.5", "--limit", "2"]
    assert evaluate(*words, monkeypatch=monkeypatch) == ""
    out = capsys.readouterr().out
    assert out.startswith("humaneval: 2 problems, 1 sample each, greedy\nnot executed: --allow_code_execution")
    assert ran == []
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [line["task_id"] for line in lines] == ["HumanEval/0", "HumanEval/1"]
    flags = ["--allow_code_execution", "--model", "13b", "--variant", "python"]
    assert evaluate(*words, *flags, monkeypatch=monkeypatch) == ""
    first, second, third, *_ = capsys.readouterr().out.splitlines()
    assert first == "humaneval: 2 problems, 1 sample each, greedy"
    assert second.split("  ")[-1].strip() == "paper, 13b python"
    assert third.split() == ["pass@1", "100.0", "%", "34.2", "to", "100.0", "43.3", "%"]
    records = problems.humaneval(2)
    programs = [
        record["prompt"] + line["completion"] + f"\n{record['test']}\ncheck({record['entry_point']})\n"
        for record, line in zip(records, lines, strict=True)
    ]
    assert sorted(ran) == sorted((program, 3.5) for program in programs)


def test_the_table() -> None:
    settings = Settings("mbpp", Path("a"), Path("b"), n=10, ks=(1, 5), temperature=0.8, model="7b", variant="base")
    drawn = Summary(settings, 4, [0, 0, 0, 0], {"failed": 39, "timeout": 1}, 1)
    assert drawn.format().splitlines() == [
        "mbpp: 4 problems, 10 samples each, temperature 0.8, top_p 0.95",
        "           this run    95 % interval   paper, 7b base",
        "pass@1        0.0 %      0.0 to 49.0                -",
        "pass@5        0.0 %      0.0 to 49.0                -",
        "39 failed, 1 timeout",
        "1 of 40 samples reached max_gen_len (512) or the end of the context (2048)",
    ]
    greedy = replace(settings, n=1, ks=(1,), temperature=0)
    summary = Summary(greedy, 3, [0, 1, 0], {"failed": 2, "passed": 1}, 0)
    low, high = wilson(1, 3)
    assert summary.describe()["pass_at_k"] == {"1": {"value": 1 / 3, "low": low, "high": high, "published": 0.414}}
    assert summary.format().splitlines()[2].split()[-2:] == ["41.4", "%"]
    unnamed = Summary(replace(greedy, model=None, variant=None), 3, [0, 1, 0], {"failed": 2, "passed": 1}, 0)
    assert unnamed.format().splitlines()[1:] == [
        "           this run    95 % interval",
        "pass@1       33.3 %      6.1 to 79.2",
        "2 failed, 1 passed",
    ]
    infilling = Summary(replace(greedy, task="humaneval-infilling"), 3, [0, 1, 0], {}, 0)
    assert infilling.published(1) is None
