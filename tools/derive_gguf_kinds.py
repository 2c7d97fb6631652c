"""Write src/taia/gguf_kinds.json: what llama.cpp's tensor names mean, and its types.

python tools/derive_gguf_kinds.py            writes the table, prints the counts
python tools/derive_gguf_kinds.py --check    says whether the shipped table is current

The gguf library names every tensor that llama.cpp knows (MODEL_TENSOR) and gives each the name
that it has in a file (TENSOR_NAMES). RULES below says which part of a model each of them is, by
the name in the enumeration; the first rule that fits holds, and a tensor that none fits is an
error. They follow the classes of tools/kind_rules.py, so that a selection means the same on a
GGUF file and on the checkpoint that it was made from: tests/test_gguf_kinds.py holds the two
together, by the library's own map from one name to the other.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from importlib.metadata import version
from pathlib import Path

from gguf.constants import (
    GGML_QUANT_SIZES,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    MODEL_TENSOR,
    MODEL_TENSORS,
    TENSOR_NAMES,
)
from shipped import write_or_check

OUT = Path(__file__).parents[1] / "src" / "taia" / "gguf_kinds.json"

RULES: tuple[tuple[str, str], ...] = (
    # the ends
    (r"TOKEN_EMBD|TOKEN_TYPES|POS_EMBD|PER_LAYER_TOKEN_EMBD", "embedding/"),
    (r"OUTPUT|CLS|CLS_OUT", "head/"),
    (r"CLS_NORM", "head/"),
    # layers behind the last one, and what is no part of a language model's layer
    (r"NEXTN_.*", "other/"),
    (r"DENSE_\d_OUT|CONV1D|CONVNEXT_.*|POSNET_.*", "other/"),
    (r"(PER_LAYER|ALTUP|LAUREL)_.*(?<!_NORM)|LAYER_OUT_SCALE", "other/"),
    # token mixers other than attention
    (r"SSM_.*|TIME_MIX_.*|SHORTCONV_.*", "mixer/"),
    (r"CHANNEL_MIX_.*", "ffn/"),
    # routers, wherever they stand; the gate of a shared expert chooses nothing
    (r"FFN_GATE_INP_SHEXP", "ffn/"),
    (r"FFN_GATE_INP|FFN_EXP_PROBS_B", "router/"),
    # norms inside a module belong to it
    (r"ATTN_(Q|K|Q_A|KV_A|SUB)_NORM|INDEXER_.*", "attention/"),
    (r"FFN_SUB_NORM", "ffn/"),
    (r".*_NORM(_\d|_EXP)?", "norm/"),
    # attention
    (r"(VISEXP_|DEC_|ENC_|DEC_CROSS_)?ATTN_QKV", "attention/qkv"),
    (r"(DEC_|ENC_|DEC_CROSS_)?ATTN_Q(_A|_B)?", "attention/q"),
    (r"ATTN_(KV_A_MQA|KV_B|K_B|V_B)", "attention/kv"),
    (r"(DEC_|ENC_|DEC_CROSS_)?ATTN_K", "attention/k"),
    (r"(DEC_|ENC_|DEC_CROSS_)?ATTN_V", "attention/v"),
    (r"(VISEXP_|DEC_|ENC_|DEC_CROSS_)?ATTN_OUT", "attention/o"),
    (r"ATTN_GATE", "attention/gate"),
    (r"ATTN_(ROT_EMBD|SINKS)|(DEC_|ENC_|DEC_CROSS_)ATTN_REL_B|ROPE_.*", "attention/"),
    # feed-forward
    (r"(DEC_|ENC_)?FFN_GATE(_EXP|_SHEXP|_CHEXP)?|VISEXP_GATE", "ffn/gate"),
    (r"(DEC_|ENC_)?FFN_UP(_EXP|_SHEXP|_CHEXP)?|VISEXP_UP", "ffn/up"),
    (r"(DEC_|ENC_)?FFN_DOWN(_EXP|_SHEXP|_CHEXP)?|VISEXP_DOWN", "ffn/down"),
    (r"FFN_GATE_UP_EXP", "ffn/gate_up"),
    (r"FFN_ACT|MOE_LATENT_(DOWN|UP)", "ffn/"),
)
"""Of the language tower: expression over the whole name -> kind/projection."""

TOWER_RULES: tuple[tuple[str, str], ...] = (
    (r"[VA]_.*(PER_DIM|ATTN_K_REL|ATTN_REL_POS|LINEAR_POS|POS_BIAS|ATTN_POS_).*", "attention/"),
    (r"[VA]_.*ATTN_[QK]_NORM|V_ENC_ATTN_O_NORM", "attention/"),
    (r"[VA]_.*(ATTN_QKV)", "attention/qkv"),
    (r"[VA]_.*ATTN_Q", "attention/q"),
    (r"[VA]_.*ATTN_K|V_RESMPL_KV", "attention/k"),
    (r"[VA]_.*ATTN_V", "attention/v"),
    (r"[VA]_.*(ATTN_O|ATTN_OUT)|A_ENC_OUTPUT", "attention/o"),
    (r"[VA]_.*(NORM|NORM_\d|NORM_PRE|NORM_MID|NORM_CONV)", "norm/"),
    (r"[VA]_.*FFN_UP(_1)?|V_SAM_MLP_LIN_1", "ffn/up"),
    (r"[VA]_.*FFN_GATE(_1)?", "ffn/gate"),
    (r"[VA]_.*FFN_DOWN(_1)?|V_SAM_MLP_LIN_2", "ffn/down"),
    (r"A_ENC_FFN_SCALE(_1)?", "ffn/"),
    (r"[VA]_.*(EMBD|EMBEDDING|_TOK_|QUERY).*", "embedding/"),
    (r"[VA]_.*", "other/"),
)
"""Of the towers of a multimodal model."""

MIXED: dict[str, tuple[str, ...]] = {
    "QWEN3NEXT": ("ATTN_QKV", "ATTN_GATE"),
    "QWEN35": ("ATTN_QKV", "ATTN_GATE"),
    "QWEN35MOE": ("ATTN_QKV", "ATTN_GATE"),
    "KIMI_LINEAR": ("ATTN_Q", "ATTN_K", "ATTN_V", "ATTN_OUT"),
}
"""Architectures that give a linear-attention mixer names of attention, in layers with SSM_A."""

FUSED = ("PHI3", "CHATGLM", "GLM4", "PLAMO2", "PLAMO3")
"""Architectures whose FFN_UP holds the rows of gate and up."""

PROJECTORS = re.compile(r"^(mm|resampler)\.|^a\.proj_")
LAYERS = re.compile(r"^((enc|dec|v|a|v\.sam|a\.proj)[._])?blk\.\{bid\}")


def tower_of(name: str) -> str:
    """The tower of a tensor, by how its name in a file starts."""
    if PROJECTORS.match(name):
        return "projector"
    first = name.partition(".")[0]
    return {"v": "vision", "a": "audio", "enc": "encoder"}.get(first, "language")


def row(tensor: MODEL_TENSOR) -> str:
    """kind/projection/tower/layered of one tensor. Raises LookupError where no rule fits."""
    name = TENSOR_NAMES[tensor]
    rules = TOWER_RULES if tensor.name[:2] in ("V_", "A_") else RULES
    for expression, part in rules:
        if re.fullmatch(expression, tensor.name):
            return f"{part}/{tower_of(name)}/{'layer' if LAYERS.match(name) else ''}"
    raise LookupError(f"{tensor.name} ({name}): no rule fits")


def table() -> dict[str, object]:
    """The whole table, from the installed library."""
    rows: dict[str, str] = {}
    for tensor in MODEL_TENSOR:
        name, told = TENSOR_NAMES[tensor].replace("{bid}", "*"), row(tensor)
        if rows.setdefault(name, told) != told:
            raise LookupError(f"{name}: {rows[name]} and {told}")
    by_row: dict[str, list[str]] = {}
    for name, told in rows.items():
        by_row.setdefault(told, []).append(name)
    mixed = {
        MODEL_ARCH_NAMES[MODEL_ARCH[arch]]: [
            TENSOR_NAMES[MODEL_TENSOR[name]].replace("{bid}", "*") for name in names
        ]
        for arch, names in MIXED.items()
    }
    for arch, names in MIXED.items():
        held = {tensor.name for tensor in MODEL_TENSORS[MODEL_ARCH[arch]]}
        assert held >= {*names, "SSM_A"}, arch
    return {
        "gguf": version("gguf"),
        "architectures": sorted(MODEL_ARCH_NAMES.values()),
        "types": {int(kind): [kind.name, *sizes] for kind, sizes in GGML_QUANT_SIZES.items()},
        "mixed": mixed,
        "fused": sorted(MODEL_ARCH_NAMES[MODEL_ARCH[arch]] for arch in FUSED),
        "tensors": {told: sorted(names) for told, names in sorted(by_row.items())},
    }


def main() -> int:
    """Write or check the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    made = table()
    text = json.dumps(made, indent=1) + "\n"
    print(f"{len(MODEL_TENSOR)} tensors of {len(MODEL_ARCH_NAMES)} architectures, 0 unclassified")
    return write_or_check(OUT, text, check=parser.parse_args().check)


if __name__ == "__main__":
    sys.exit(main())
