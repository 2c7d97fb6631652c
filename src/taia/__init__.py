"""taia: keep what fine-tuning taught, drop what it broke.

    import taia

    print(taia.plan("base/", "tuned/", keep="attention").totals)
    taia.splice("base/", "tuned/", "out/", keep="attention")
    taia.verify("out/")

Names are loaded when they are first used, so that `import taia` costs nothing and never
imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taia.attach import Live, attach
    from taia.errors import TaiaError, VerificationError
    from taia.evaluation.harness import evaluate
    from taia.experiment import run
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
    "Kind",
    "Live",
    "Plan",
    "Receipt",
    "Selection",
    "TaiaError",
    "VerificationError",
    "attach",
    "classify",
    "evaluate",
    "finetune",
    "plan",
    "report",
    "run",
    "slice_adapter",
    "splice",
    "verify",
]

_HOME = {
    "PRESETS": "selection",
    "Address": "kinds",
    "Kind": "kinds",
    "Live": "attach",
    "Plan": "plan",
    "Receipt": "receipt",
    "Selection": "selection",
    "TaiaError": "errors",
    "VerificationError": "errors",
    "attach": "attach",
    "classify": "kinds",
    "evaluate": "evaluation.harness",
    "finetune": "training.finetune",
    "plan": "plan",
    "report": "report",
    "run": "experiment",
    "slice_adapter": "slicing",
    "splice": "splice",
    "verify": "verify",
}
"""The module of each public name."""


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'taia' has no attribute {name!r}")
    value = getattr(import_module(f"taia.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
