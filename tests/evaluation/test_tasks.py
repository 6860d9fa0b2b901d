"""What each benchmark makes of its file: exact prompt, question, stop strings, program; and each fault of a file."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from codellama import Llama
from codellama.errors import EvaluationError
from codellama.evaluation.answers import code_in
from codellama.evaluation.tasks import TASKS
from tests.support import problems
from tests.support.problems import write_lines

ONE = {
    "task_id": "HumanEval/0",
    "prompt": 'def one():\n    """Return {1}."""\n',
    "entry_point": "one",
    "canonical_solution": "    return 1\n",
    "test": "def check(candidate):\n    assert candidate() == 1\n",
}


def mbpp_record(id: int, **changes: Any) -> problems.Json:
    record = {
        "text": f"Write f{id}. ", "code": f"def f{id}():\r\n\treturn {id}\r\n", "task_id": id, "test_setup_code": "",
        "test_list": [f"assert f{id}() == {id}", f"assert f{id}() < {id + 1}"], "challenge_test_list": [],
    }  # fmt: skip
    return record | changes


def test_humaneval(tmp_path: Path) -> None:
    (problem,) = TASKS["humaneval"].read(write_lines(tmp_path / "a", [ONE]))
    assert problem.prompt == 'def one():\n    """Return {1}."""\n'
    assert (problem.task_id, problem.suffix) == ("HumanEval/0", None)
    assert problem.program("    return 1\n") == (
        'def one():\n    """Return {1}."""\n    return 1\n\n'
        "def check(candidate):\n    assert candidate() == 1\n\ncheck(one)\n"
    )
    assert problem.dialog == [
        {
            "role": "user",
            "content": "You are an expert Python programmer, and here is your task: complete this function.\n\n"
            'def one():\n    """Return {1}."""\n\n'
            "Your code should start with a [PYTHON] tag and end with a [/PYTHON] tag.",
        }
    ]
    assert TASKS["humaneval"].STOP == ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


def test_infilling(tmp_path: Path) -> None:
    record = ONE | {"prompt": "def one():\n    x = ", "suffix": "\n    return x\n", "canonical_solution": "1"}
    (problem,) = TASKS["humaneval-infilling"].read(write_lines(tmp_path / "a", [record]))
    assert (problem.prompt, problem.suffix) == ("def one():\n    x = ", "\n    return x\n")
    assert problem.program("1") == (
        "def one():\n    x = 1\n    return x\n\ndef check(candidate):\n    assert candidate() == 1\n\ncheck(one)\n"
    )
    assert TASKS["humaneval-infilling"].STOP == ()


def test_mbpp(tmp_path: Path) -> None:
    """The three examples are tasks 2, 3 and 4, wherever they stand; only tasks 11 to 510 are asked."""
    order = [510, 4, 1, 2, 3, 5, 10, 511, 11]
    records = [mbpp_record(id) for id in order]
    records[-1]["test_setup_code"] = "import math\r\nx = f11"
    last, first = TASKS["mbpp"].read(write_lines(tmp_path / "a", records))
    assert (first.task_id, last.task_id) == (11, 510)
    shots = "".join(
        f"You are an expert Python programmer, and here is your task: Write f{id}. Your code should pass these tests:"
        f"\n\nassert f{id}() == {id}\nassert f{id}() < {id + 1}\n[BEGIN]\ndef f{id}():\n\treturn {id}\n[DONE]\n"
        for id in (2, 3, 4)
    )
    assert first.prompt == (
        f"{shots}You are an expert Python programmer, and here is your task: Write f11. Your code should pass these "
        f"tests:\n\nassert f11() == 11\nassert f11() < 12\n[BEGIN]\n"
    )
    assert TASKS["mbpp"].STOP == ("[DONE]",)
    assert first.program("def f11():\n    return 11\n") == (
        "def f11():\n    return 11\n\nimport math\nx = f11\nassert f11() == 11\nassert f11() < 12\n"
    )
    assert [message["role"] for message in first.dialog] == ["user", "assistant"] * 3 + ["user"]
    assert first.dialog[1]["content"] == "[PYTHON]\ndef f2():\n\treturn 2\n[/PYTHON]"
    assert first.dialog[-1]["content"] == (
        "You are an expert Python programmer, and here is your task: Write f11.\n"
        "Your code should pass these tests:\n\nassert f11() == 11\nassert f11() < 12\n"
        "Your code should start with a [PYTHON] tag and end with a [/PYTHON] tag."
    )


def test_sanitized_mbpp_asks_the_same(tmp_path: Path) -> None:
    plain = TASKS["mbpp"].read(write_lines(tmp_path / "a", map(mbpp_record, [2, 3, 4, 20])))
    path = tmp_path / "b"
    path.write_text(
        json.dumps(
            [
                {
                    "prompt": record["text"], "task_id": record["task_id"], "code": record["code"],
                    "test_imports": ["import math"], "test_list": record["test_list"], "source_file": "x",
                }
                for record in map(mbpp_record, [2, 3, 4, 20])
            ],
            indent=1,
        )
    )  # fmt: skip
    (one,) = TASKS["mbpp"].read(path)
    assert (one.prompt, one.dialog) == (plain[0].prompt, plain[0].dialog)
    assert one.program("x") == "x\nimport math\nassert f20() == 20\nassert f20() < 21\n"


def test_what_a_file_is_is_told_from_its_content(tmp_path: Path) -> None:
    """Plain and compressed lines, and a list, under names that say something else; an empty line, and U+2028."""
    odd = [record | {"note": "a\u2028b"} for record in problems.humaneval(3)]
    expected = TASKS["humaneval"].read(write_lines(tmp_path / "a.jsonl", problems.humaneval(3)))
    packed = write_lines(tmp_path / "b.gz", odd)
    packed.rename(tmp_path / "b.json")
    (tmp_path / "c.gz").write_text("\n  " + json.dumps(odd))
    (tmp_path / "d").write_text("\n".join(json.dumps(record, ensure_ascii=False) + "\n" for record in odd))
    for name in ("b.json", "c.gz", "d"):
        assert TASKS["humaneval"].read(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("humaneval", b"", "holds no problem"),
        ("humaneval", b"{", r"a, line 1 is not JSON"),
        ("humaneval", b"[1,", r"a is not JSON"),
        ("humaneval", b"\n1\n", r"line 2 is 1; a JSON object was expected"),
        ("humaneval", b"[{}, 2]", r"entry 2 is 2; a JSON object was expected"),
        ("humaneval", b"\x1f\x8bnot", "begins like a gzip file, but cannot be decompressed"),
        ("humaneval", gzip.compress(bytes(range(99)))[:-30] + bytes(22), "begins like a gzip file"),
        ("humaneval", b"\xff\xfe", "is not text in UTF-8"),
        ("humaneval", json.dumps(ONE | {"prompt": 3}), r"line 1: prompt is 3; a string was expected"),
        ("humaneval", json.dumps({**ONE, "suffix": ""}), "so this is a file for humaneval-infilling"),
        ("humaneval", "\n".join([json.dumps(ONE)] * 2), "has 'HumanEval/0' 2 times"),
        ("humaneval", json.dumps({"prompt": "x"}), "there is no task_id; the fields are prompt"),
        ("humaneval-infilling", json.dumps(ONE), "there is no suffix; the fields are task_id, prompt"),
        ("mbpp", json.dumps(mbpp_record(2)), "lacks task 3, 4; the examples of the prompt are tasks 2, 3 and 4"),
        ("mbpp", "\n".join(json.dumps(mbpp_record(id)) for id in (2, 3, 4, 10, 511)), "holds no task from 11 to 510"),
        ("mbpp", json.dumps(mbpp_record(2, task_id="2")), "task_id is '2'; an integer was expected"),
        (
            "mbpp",
            "\n".join(json.dumps(mbpp_record(id, test_list=[id])) for id in (2, 3, 4, 11)),
            r"line 1: test_list is \[2\]; a list of strings was expected",
        ),
        ("mbpp", "\n".join(json.dumps(mbpp_record(id)) for id in (2, 3, 4, 11, 11)), "has 11 2 times"),
    ],
)
def test_faults_of_a_file_are_named(task: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(EvaluationError, match=message):
        TASKS[task].read(path)


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("Sure:\n[PYTHON]\ndef f():\n    pass\n[/PYTHON] Done.", "def f():\n    pass\n"),
        ("[PYTHON] def f(): pass", "def f(): pass"),
        ("Text\n```python\ndef f():\n    pass\n```\nand ```x```", "def f():\n    pass\n"),
        ("[PYTHON]\n```py\nx = 1\n```\n[/PYTHON]", "x = 1\n"),
        ("```\nx = 1\ncut", "x = 1\ncut"),
        ("def f(): pass", "def f(): pass"),
    ],
)
def test_code_is_found_in_an_answer(answer: str, code: str) -> None:
    assert code_in(answer) == code


def test_stop_strings_cut_a_completion(llama: Llama, tmp_path: Path) -> None:
    """The stop string and what follows are no part of the completion; one inside the prompt does not count."""
    stop = TASKS["humaneval"].STOP
    script = llama.tokenizer.encode_infilling("    return 1\n\ndef g():\n    pass\n")
    prompt = llama.tokenizer.encode("def f():\n", bos=True, eos=False)

    def follow(ids: Any, logits: Any) -> Any:
        logits[:] = -1e9
        logits[script[len(ids) - len(prompt)]] = 0
        return logits

    options: dict[str, Any] = {"temperature": 0, "max_gen_len": len(script), "logits_processor": follow}
    (result,) = llama.text_completion(["def f():\n"], stop=stop, **options)
    assert (result["generation"], result["finish_reason"]) == ("    return 1\n", "stop")
