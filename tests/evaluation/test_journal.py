"""Files that a run goes on from: what was written is there, torn lines are not, and nothing is mixed."""

import json
from pathlib import Path

import pytest

from codellama.errors import EvaluationError
from codellama.evaluation.journal import Journal, agree_on_parameters
from codellama.evaluation.settings import sample_seed

KINDS = {"completion": str}
A, B = ({"task_id": id, "index": 0, "completion": "é\n\u2028"} for id in ("a", 7))


def test_every_entry_is_on_the_disk_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    with Journal(path, KINDS) as journal:
        journal.append([A])
        assert json.loads(path.read_text()) == A
        journal.append([B])
    with Journal(path, KINDS) as journal:
        assert journal.entries == {("a", 0): A, (7, 0): B}


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_last_line_is_cut_off(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    with Journal(path, KINDS) as journal:
        journal.append([A])
        whole = path.read_bytes()
        journal.append([B])
    path.write_bytes(path.read_bytes()[:-cut])
    with Journal(path, KINDS) as journal:
        assert journal.entries == {("a", 0): A}
        assert path.read_bytes() == whole
        journal.append([B])
    with Journal(path, KINDS) as journal:
        assert list(journal.entries.values()) == [A, B]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"task_id": "a", "ind', json.dumps(A)], "line 1 is .* with completion, task_id, index was expected"),
        ([json.dumps(A), "[]"], "line 2 is"),
        ([json.dumps({**A, "completion": None})], "line 1 is"),
        ([json.dumps({**A, "task_id": 1.5})], "line 1 is"),
        ([json.dumps(A), json.dumps(A)], "line 2 has sample 0 of 'a' again"),
    ],
)
def test_any_other_fault_is_refused(lines: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text("\n".join(lines) + "\n")
    before = path.read_bytes()
    with pytest.raises(EvaluationError, match=message):
        Journal(path, KINDS)
    assert path.read_bytes() == before
    path.write_text("")
    Journal(path, KINDS).close()  # the refused one let go of the file


def test_two_runs_do_not_share_a_file(tmp_path: Path) -> None:
    with (
        Journal(tmp_path / "samples.jsonl", KINDS),
        pytest.raises(EvaluationError, match="in use by another run; give this one another --output_dir"),
    ):
        Journal(tmp_path / "samples.jsonl", KINDS)


def test_samples_of_other_parameters_are_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "parameters.json"
    agree_on_parameters(path, {"seed": 1, "dtype": None}, has_samples=False)
    agree_on_parameters(path, {"seed": 0, "dtype": None}, has_samples=False)  # nothing was made with those
    agree_on_parameters(path, {"seed": 0, "dtype": None}, has_samples=True)
    with pytest.raises(EvaluationError, match=r"were made with seed 0 \(now 2\), new None \(now 'x'\)"):
        agree_on_parameters(path, {"seed": 2, "dtype": None, "new": "x"}, has_samples=True)
    path.unlink()
    with pytest.raises(EvaluationError, match=r"parameters\.json is missing or no JSON object"):
        agree_on_parameters(path, {"seed": 0}, has_samples=True)


def test_seeds_differ_by_each_of_the_three() -> None:
    seeds = [sample_seed(seed, id, index) for seed in (0, 1) for id in ("a", "b", 1, "1 0") for index in (0, 1, 10)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(0, "HumanEval/0", 0) == 8051074784820905931  # so that an old run can be gone on with
