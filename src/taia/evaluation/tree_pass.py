"""One forward pass over tries of tokens: attention to ancestors alone, words only where asked.

transformers takes a mask of four dimensions as it is, so a row can hold a tree; positions are
stated, so a token stands where it stands in its own sequence. What all rows begin with is read
once and its keys and values are lent to each row. Layers with a sliding window get a mask of
their own, which compares positions, so their cache may keep everything.

The vocabulary's layer reads only the places that are asked for: a hook picks them out of its
input, so whatever a model does with its logits afterwards (soft caps, scales) stays as it is.

Limits: attention by transformers' `sdpa` or `eager`, full or with a sliding window. Whether a
model obeys masks and positions is not believed but tried on a few tokens (`tree_pass`); others
(state-space layers, ALiBi, encoder-decoders) are read sequence by sequence.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from taia.evaluation.trie import Trie
from taia.slots import parameters_of, unwrapped

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["Encoded", "TreePass", "tree_pass"]

SHORT = 384
"""Tokens of rows that take plain attention on a processor, at most."""
EXACT = 1e-4
"""How far tried log-probabilities may lie from those of a plain pass, on average."""
ROUNDING = {"torch.bfloat16": 2e-2, "torch.float16": 5e-3}
"""The same for halves, in which the same numbers round differently from shape to shape."""
SHARE = 0.25
"""In halves also: as a share of what leaving out the first token changes."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Keys and values of a prefix: of each layer, (1, heads, length, size)."""

    length: int
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()


@dataclass(frozen=True, slots=True)
class TreePass:
    """A model that can read tries. `windows`: kind of layer -> its window, None for all.

    `plain_attention`: tokens up to which rows take transformers' `eager` attention, which on a
    processor is faster for them than the fused one under a mask (a tenth of the whole pass).
    """

    model: PreTrainedModel
    windows: Mapping[str, int | None]
    plain_attention: int = 0

    def encode(self, tokens: Sequence[int]) -> Encoded:
        """A prefix, read once. Empty for no tokens."""
        if not tokens:
            return Encoded(0)
        from transformers import DynamicCache

        trie = Trie()
        trie.insert(tokens)
        cache = DynamicCache()
        self._forward([trie], [0], Encoded(0), cache)
        layers = tuple((layer.keys, layer.values) for layer in cache.layers)
        return Encoded(len(tokens), layers)

    def logits(
        self, tries: Sequence[Trie], places: Sequence[tuple[int, int]], prefix: Encoded
    ) -> torch.Tensor:
        """What follows at (row, node) for each of `places`: (places, vocabulary), model's dtype."""
        longest = max(map(len, tries))
        flat = [row * longest + node for row, node in places]
        cache = None
        if prefix.length:
            from transformers import DynamicCache

            rows = len(tries)
            cache = DynamicCache(
                [(k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1)) for k, v in prefix.layers]
            )
        return self._forward(tries, flat, prefix, cache)[0]

    def _forward(
        self, tries: Sequence[Trie], places: Sequence[int], prefix: Encoded, cache: Any
    ) -> torch.Tensor:
        import torch

        device = self.model.device
        longest = max(map(len, tries))
        ids = np.zeros((len(tries), longest), dtype=np.int64)
        positions = np.zeros((len(tries), longest), dtype=np.int64)
        for row, trie in enumerate(tries):
            ids[row, : len(trie)] = trie.tokens
            positions[row, : len(trie)] = trie.depths
        positions += prefix.length
        short = prefix.length + longest <= self.plain_attention
        with (
            torch.inference_mode(),
            _words_at(self.model, torch.tensor(places, device=device)),
            _plain_attention(self.model) if short else contextlib.nullcontext(),
        ):
            logits: torch.Tensor = self.model(
                input_ids=torch.from_numpy(ids).to(device),
                position_ids=torch.from_numpy(positions).to(device),
                attention_mask=self._masks(tries, positions, prefix.length),
                past_key_values=cache,
                use_cache=cache is not None,
            ).logits
        return logits

    def _masks(self, tries: Sequence[Trie], positions: Any, before: int) -> Any:
        """What to add to attention scores, (rows, 1, longest, before + longest); a dict by kind."""
        import torch

        rows, longest = positions.shape
        seen = np.zeros((rows, longest, before + longest), dtype=np.bool_)
        seen[:, :, :before] = True
        seen[:, range(longest), range(before, before + longest)] = True  # padding sees itself
        for row, trie in enumerate(tries):
            seen[row, : len(trie), before : before + len(trie)] = trie.ancestors()
        earlier = np.broadcast_to(np.arange(before), (rows, before))
        keys = np.concatenate([earlier, positions], axis=1)
        dtype, device = self.model.dtype, self.model.device
        masks = {}
        for kind, window in self.windows.items():
            allowed = seen
            if window is not None:
                allowed = seen & (positions[:, :, None] - keys[:, None, :] < window)
            mask = torch.zeros(allowed.shape, dtype=dtype)
            mask.masked_fill_(torch.from_numpy(~allowed), torch.finfo(dtype).min)
            masks[kind] = mask[:, None].to(device)
        return masks if len(masks) > 1 else next(iter(masks.values()))


def tree_pass(model: PreTrainedModel) -> TreePass | None:
    """The model as a reader of tries; None where it cannot be, which a few tokens show."""
    windows = _windows(model)
    if windows is None:
        return None
    found = TreePass(model, windows)
    if not _agrees(found):
        return None
    if model.device.type == "cpu":
        plain = TreePass(model, windows, SHORT)
        return plain if _agrees(plain) else found
    return found


def _windows(model: PreTrainedModel) -> dict[str, int | None] | None:
    """The window of each kind of layer; None where a layer is neither full nor sliding."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    arguments = parameters_of(unwrapped(model))
    config = model.config.get_text_config(decoder=True)
    if (
        not {"position_ids", "past_key_values", "attention_mask"} <= arguments
        or getattr(config, "is_encoder_decoder", False)
        or config._attn_implementation not in {"sdpa", "eager"}
        or model.get_output_embeddings() is None
    ):
        return None
    windows: dict[str, int | None] = {}
    for layer in DynamicCache(config=config).layers:
        if type(layer) is DynamicSlidingWindowLayer:
            windows["sliding_attention"] = layer.sliding_window
        elif type(layer) is DynamicLayer:
            windows["full_attention"] = None
        else:
            return None
    return windows or None


@contextlib.contextmanager
def _words_at(model: PreTrainedModel, places: torch.Tensor) -> Iterator[None]:
    """Within the block the vocabulary's layer reads (1, places, size) of (rows, longest, size)."""

    def pick(_: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = given[0]
        return hidden.reshape(-1, hidden.shape[-1])[places][None], *given[1:]

    handle = model.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within the block attention is transformers' `eager`; the layers share one config."""
    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


def _agrees(found: TreePass) -> bool:
    """Whether two short sequences after a prefix are read as they are read one by one."""
    with contextlib.suppress(RuntimeError, ValueError, TypeError, LookupError, AttributeError):
        return _compared(found)
    return False


def _compared(found: TreePass) -> bool:
    import torch

    model = found.model
    words = model.get_output_embeddings().weight.shape[0]
    prefix, ends = [504, 3003, 18, 5002], [[7, 400, 9], [7, 600], [1, 6, 4]]
    tries: list[Trie] = []
    places = []
    for row, chosen in enumerate((ends[:2], ends[2:])):
        tries.append(Trie())
        for end in chosen:
            places.append((row, tries[row].insert([number % words for number in end])[-1]))
    ours = (
        found.logits(tries, places, found.encode([number % words for number in prefix]))
        .float()
        .log_softmax(-1)
    )

    def plain(tokens: list[int]) -> torch.Tensor:
        ids = torch.tensor([[number % words for number in tokens]], device=model.device)
        with torch.inference_mode():
            logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        return logits[0, -1].float().log_softmax(-1)

    for end, line in zip(ends, ours, strict=True):
        right = plain([*prefix, *end])
        allowed = EXACT
        if str(model.dtype) in ROUNDING:
            wrong = float((plain([*prefix, *end][1:]) - right).abs().mean())
            allowed = max(ROUNDING[str(model.dtype)], SHARE * wrong)
        if not float((right - line).abs().mean()) < allowed:
            return False
    return True
