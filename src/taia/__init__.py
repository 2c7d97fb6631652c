"""taia: keep what fine-tuning taught, drop what it broke.

    import taia

    print(taia.plan("base/", "tuned/", keep="attention").totals)
    taia.splice("base/", "tuned/", "out/", keep="attention")
    taia.verify("out/")

Whatever needs torch is loaded when it is first used: `import taia` never imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Five functions share their names with their modules. They are imported here, at once, so that
# a later import of the module does not put the module in the function's place.
from taia.attach import Live, attach
from taia.errors import TaiaError, VerificationError
from taia.kinds import Address, Kind, classify
from taia.plan import Plan, plan
from taia.receipt import Receipt
from taia.report import report
from taia.selection import PRESETS, Selection
from taia.slicing import slice_adapter
from taia.splice import splice
from taia.verify import verify

if TYPE_CHECKING:
    from taia.evaluation.harness import evaluate
    from taia.experiment import run
    from taia.training.finetune import finetune

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

_LAZY = {"evaluate": "evaluation.harness", "finetune": "training.finetune", "run": "experiment"}
"""Name -> module, for what is loaded on first use."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'taia' has no attribute {name!r}")
    value = getattr(import_module(f"taia.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
