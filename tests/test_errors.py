"""The exception tree, and that each exception survives the journey between ranks."""

import copy
import pickle

import pytest

from codellama import errors

CLASSES = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]


def make(kind: type[Exception]) -> Exception:
    if kind is errors.ContextLengthError:
        return errors.ContextLengthError(70, 64, "prompt 3")
    return kind("found 1, expected 2: do this")


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_exceptions_can_be_pickled(kind: type[Exception], protocol: int) -> None:
    error = make(kind)
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is kind
    assert str(again) == str(error)
    assert again.args == error.args
    assert vars(again) == vars(error)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_exceptions_can_be_copied(kind: type[Exception]) -> None:
    error = make(kind)
    assert str(copy.copy(error)) == str(error)
    assert vars(copy.deepcopy(error)) == vars(error)


def test_all_classes_are_here() -> None:
    """So that a new class is added to the tree below."""
    assert {kind.__name__ for kind in CLASSES} == {
        "CodeLlamaError",
        "CheckpointError",
        "ParallelSizeError",
        "PromptError",
        "ContextLengthError",
        "EvaluationError",
        "GrammarError",
        "MemoryBudgetError",
        "NumericalError",
        "QuantizationError",
        "RankError",
        "SafetyError",
    }


@pytest.mark.parametrize(
    ("kind", "parents"),
    [
        (errors.CodeLlamaError, {Exception}),
        (errors.CheckpointError, {errors.CodeLlamaError}),
        (errors.ParallelSizeError, {errors.CheckpointError, ValueError}),
        (errors.PromptError, {errors.CodeLlamaError, ValueError}),
        (errors.ContextLengthError, {errors.PromptError, errors.CodeLlamaError, ValueError}),
        (errors.GrammarError, {errors.PromptError, errors.CodeLlamaError, ValueError}),
        (errors.EvaluationError, {errors.CodeLlamaError, ValueError}),
        (errors.MemoryBudgetError, {errors.CodeLlamaError, MemoryError}),
        (errors.NumericalError, {errors.CodeLlamaError, ArithmeticError}),
        (errors.QuantizationError, {errors.CodeLlamaError, ValueError}),
        (errors.RankError, {errors.CodeLlamaError, RuntimeError}),
        (errors.SafetyError, {errors.CodeLlamaError}),
    ],
)
def test_tree(kind: type[Exception], parents: set[type[Exception]]) -> None:
    assert [parent for parent in parents if not issubclass(kind, parent)] == []
    assert kind.__name__ in str(errors.__doc__)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_one_except_catches_all(kind: type[Exception]) -> None:
    with pytest.raises(errors.CodeLlamaError):
        raise make(kind)


@pytest.mark.parametrize("kind", [errors.CodeLlamaError, errors.CheckpointError])
def test_what_is_no_value_error(kind: type[Exception]) -> None:
    assert not issubclass(kind, ValueError)


def test_context_length_error_carries_both_numbers() -> None:
    error = errors.ContextLengthError(70, 64)
    assert (error.prompt_length, error.max_seq_len) == (70, 64)
    assert str(error) == (
        "the prompt has 70 tokens, but max_seq_len is 64 and at least one token must be left to generate: "
        "shorten it, or build with max_seq_len > 70"
    )


def test_context_length_error_says_which_prompt() -> None:
    assert str(errors.ContextLengthError(70, 64, "prompt 3")).startswith("prompt 3 has 70 tokens")
