"""taia: keep what fine-tuning taught, drop what it broke.

    import taia

    print(taia.plan("base/", "tuned/", keep="attention").totals)
    taia.splice("base/", "tuned/", "out/", keep="attention")
    taia.verify("out/")

Everything is loaded when it is first used: `import taia` imports none of it, and never torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taia.attach import Live, attach
    from taia.errors import TaiaError, VerificationError
    from taia.evaluation.advise import Advice, advise
    from taia.evaluation.compare import Comparison, compare_runs
    from taia.evaluation.harness import evaluate
    from taia.experiment import run
    from taia.explain import Explanation, explain
    from taia.extract import extract
    from taia.kinds import Address, Kind, classify
    from taia.plan import Plan, plan
    from taia.receipt import Receipt
    from taia.report import report
    from taia.selection import PRESETS, Selection
    from taia.slicing import slice_adapter
    from taia.splice import splice
    from taia.training.finetune import finetune
    from taia.verify import verify

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Address",
    "Advice",
    "Comparison",
    "Explanation",
    "Kind",
    "Live",
    "Plan",
    "Receipt",
    "Selection",
    "TaiaError",
    "VerificationError",
    "advise",
    "attach",
    "classify",
    "compare_runs",
    "evaluate",
    "explain",
    "extract",
    "finetune",
    "plan",
    "report",
    "run",
    "slice_adapter",
    "splice",
    "verify",
]

_HOMES = {
    "PRESETS": "selection",
    "Address": "kinds",
    "Advice": "evaluation.advise",
    "Comparison": "evaluation.compare",
    "Explanation": "explain",
    "Kind": "kinds",
    "Live": "attach",
    "Plan": "plan",
    "Receipt": "receipt",
    "Selection": "selection",
    "TaiaError": "errors",
    "VerificationError": "errors",
    "advise": "evaluation.advise",
    "attach": "attach",
    "classify": "kinds",
    "compare_runs": "evaluation.compare",
    "evaluate": "evaluation.harness",
    "extract": "extract",
    "explain": "explain",
    "finetune": "training.finetune",
    "plan": "plan",
    "report": "report",
    "run": "experiment",
    "slice_adapter": "slicing",
    "splice": "splice",
    "verify": "verify",
}
"""Name -> the module that it is loaded from on first use."""


class _Package(ModuleType):
    """Keeps a function in its place when the module of the same name is imported.

    Python binds an imported submodule to its name in the package: `import taia.plan` would
    put the module where `taia.plan(...)`, the function, belongs.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'taia' has no attribute {name!r}")
    value = getattr(import_module(f"taia.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
