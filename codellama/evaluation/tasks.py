"""The benchmarks there are, by the name that the command takes. One more is a file of this folder and a line here."""

from codellama.evaluation import humaneval, infilling, mbpp
from codellama.evaluation.problems import Task

TASKS: dict[str, Task] = {
    "humaneval": humaneval,
    "mbpp": mbpp,
    "humaneval-infilling": infilling,
}
