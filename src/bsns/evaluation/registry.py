"""Our own tasks by name: the paper's five, logical deduction in its three sizes, and perplexity."""

from __future__ import annotations

from bsns.evaluation.datafile import DataFile
from bsns.evaluation.tasks.bigbench import BigBench
from bsns.evaluation.tasks.hellaswag import HellaSwag
from bsns.evaluation.tasks.lambada import Lambada
from bsns.evaluation.tasks.perplexity import Perplexity
from bsns.evaluation.tasks.task import Task

# pip does not install it even with --no-deps: it refuses the addresses that the package gives for what it needs.
BIGBENCH = "pip install uv && uv pip install --no-deps bigbench==1.0.0"


def _bigbench(folder: str, sha256: str) -> BigBench:
    return BigBench(DataFile("bigbench", f"benchmark_tasks/{folder}/task.json", BIGBENCH, sha256))


TASKS: dict[str, Task] = {
    "hellaswag": HellaSwag(),
    "lambada": Lambada(),
    "causal_judgement": _bigbench(
        "causal_judgment", "72dea28a03226a15a6081c7bef3599569887258a90e7db923e98a8232d5d7c29"
    ),
    "disambiguation_qa": _bigbench(
        "disambiguation_qa", "118b6a250c6e1744384763d51cfd48c931467325dbe94d79ccb2103805fa4c6a"
    ),
    "logical_deduction_three": _bigbench(
        "logical_deduction/three_objects", "5e3f4a7569cb70bb1469374d3d34fb7883445a9d5743e1a81fd8dcdaf6fcb40f"
    ),
    "logical_deduction_five": _bigbench(
        "logical_deduction/five_objects", "552dec4d5067bdbe033e78e80fdf1f5a8061d17b385379b8ec5104fa17d07918"
    ),
    "logical_deduction_seven": _bigbench(
        "logical_deduction/seven_objects", "5e24146d600b1b2e2d8958e23851e7c958b1a7644a2540fa0de7fa3e51a68cf7"
    ),
    "perplexity": Perplexity(),
}
