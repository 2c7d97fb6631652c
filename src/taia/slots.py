"""Keys and values of several texts that are being written at once, a row each.

Every row ends at the same column, so a row that leaves can be replaced by a prompt of any
length while the others go on: what stands left of a row's first token is masked, as with
padding on the left. The columns are set aside in blocks: a step writes one column in place,
where a growing cache would copy all of it.

On a CPU the attention of one new token is done by two batched products over these whole
blocks. torch's fused attention takes up to seven times as long for it, because it reads rows
of a longer buffer; for prompts it stays. `decoding` switches to it and back.

Limits: models whose layers keep keys and values for every token or for a sliding window
(`fits`); memory is that of the longest row times the rows, also in sliding layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import Cache, PreTrainedModel

__all__ = [
    "Slots",
    "decoding",
    "fits",
    "parameters_of",
    "rows_that_fit",
    "shortest_window",
    "steady_length",
    "tokens_at_once",
    "unwrapped",
]

BLOCK = 64
"""Columns that are set aside at once."""

TOKENS = {"cpu": 1024}
"""Tokens that are worth reading at once, with padding: on a processor more is no faster."""
MANY_TOKENS = 16384
"""The same on anything else."""

ROOM = 2 * 2**30
"""Bytes of keys and values in the memory of a processor, where nobody states a number of rows."""

ATTENTION = "taia_decoding"
"""The name under which transformers knows the attention of this file."""


class Slots:
    """The rows in work. All tensors: (rows, key-value heads, columns, size of a head)."""

    def __init__(self, rows: int) -> None:
        """Room for at most `rows` rows; columns are set aside when they are needed."""
        self.rows = rows
        self.lengths: list[int] = []
        """Tokens of every row that are in the cache."""
        self._end = 0
        self._columns = 0
        self._layers: list[_Layer] = []

    def append(self, cache: Cache, lengths: Sequence[int]) -> None:
        """Take in the rows of `cache` after those that are there.

        `lengths`: tokens of each; what a row holds behind them is padding.
        """
        from transformers.cache_utils import CacheLayerMixin

        parts = [(layer.keys, layer.values) for layer in cache.layers]
        if not self._layers:
            CacheLayerMixin.register(_Layer)
            self._layers = [_Layer(self.rows, *part) for part in parts]
        if not self.lengths:
            self._end = 0
        longest = max(lengths)
        if max(self._end, longest) >= self._columns or longest > self._end:
            self._make_room(max(self._end, longest))
        for layer, (keys, values) in zip(self._layers, parts, strict=True):
            layer.put(len(self.lengths), self._end, keys, values, lengths)
        self.lengths += lengths

    def drop(self, row: int) -> None:
        """Forget a row. The last row takes its place."""
        last = len(self.lengths) - 1
        if row != last:
            for layer in self._layers:
                layer.move(last, row)
        self.lengths[row] = self.lengths[last]
        del self.lengths[last]

    def inputs(self, tokens: Sequence[int], device: torch.device) -> dict[str, Any]:
        """What a model's forward takes to read the next token of every row."""
        import torch
        from transformers.cache_utils import Cache

        if self._end == self._columns:
            self._make_room(max(self.lengths))
        for layer in self._layers:
            layer.rows, layer.end = len(self.lengths), self._end
        lengths = torch.tensor(self.lengths, device=device)
        columns = torch.arange(self._end + 1, device=device)
        return {
            "input_ids": torch.tensor(tokens, device=device)[:, None],
            "position_ids": lengths[:, None],
            "attention_mask": (columns >= self._end - lengths[:, None]).long(),
            "past_key_values": Cache(layers=self._layers),
            "use_cache": True,
        }

    def advance(self) -> None:
        """The token of every row has been read."""
        self._end += 1
        self.lengths = [length + 1 for length in self.lengths]

    def _make_room(self, end: int) -> None:
        """Let the rows end at column `end`, with at least one free column behind it."""
        kept = max(self.lengths, default=0)
        self._columns = (end // BLOCK + 1) * BLOCK
        for layer in self._layers:
            layer.resize(len(self.lengths), self._end, kept, end, self._columns)
        self._end = end


@contextmanager
def decoding(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block, a model on a CPU reads single tokens by the attention of this file."""
    if model.device.type != "cpu" or model.config._attn_implementation != "sdpa":
        yield
        return
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, _mask)
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


def tokens_at_once(device: torch.device) -> int:
    """Tokens that are worth reading in one forward pass, with padding."""
    return TOKENS.get(device.type, MANY_TOKENS)


def rows_that_fit(cache: Cache, tokens: int) -> int:
    """Rows of `tokens` tokens that there is memory for; `cache` holds some tokens of the model.

    Of a CUDA device half of what is free is taken, elsewhere `ROOM`.
    """
    import torch

    keys = cache.layers[0].keys
    cuda = keys.device.type == "cuda"
    room = torch.cuda.mem_get_info(keys.device)[0] // 2 if cuda else ROOM
    token = sum(
        part.element_size() * part.shape[1] * part.shape[3]
        for layer in cache.layers
        for part in (layer.keys, layer.values)
    )
    return int(room // (token * tokens))


def shortest_window(cache: Cache) -> int:
    """Tokens that every layer of `cache` keeps, at least."""
    windows = [getattr(layer, "sliding_window", None) for layer in cache.layers]
    return min((int(window) - 1 for window in windows if window), default=2**63)


def fits(model: PreTrainedModel) -> bool:
    """Whether every layer of the model can keep its past in `Slots`."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    config = model.config.get_text_config()
    if not {"position_ids", "past_key_values"} <= parameters_of(model):
        return False
    if config.is_encoder_decoder or config._attn_implementation not in ("sdpa", "eager"):
        return False
    chunked = getattr(config, "attention_chunk_size", None) is not None
    if getattr(config, "alibi", False):  # Falcon's counts columns, of which here are more
        return False
    layers = DynamicCache(config=config).layers
    kinds = {type(layer) for layer in layers}
    return bool(layers) and not chunked and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}


def unwrapped(model: Any) -> Any:
    """The model itself, out of PEFT's wrapper if it is in one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def parameters_of(model: PreTrainedModel) -> set[str]:
    """What the model's forward takes by name."""
    return set(inspect.signature(model.forward).parameters)


def steady_length(model: PreTrainedModel) -> int:
    """Tokens up to which a model turns keys at the same frequencies, whatever else it reads.

    Beyond, longrope (Phi-3, MiniCPM) turns all that is read together at others, and keys that were
    kept from before stay as they are.
    """
    config = model.config.get_text_config()
    stated = getattr(config, "rope_parameters", None) or {}
    lengths = [
        one.get("original_max_position_embeddings", config.max_position_embeddings)
        for one in (stated, *stated.values())
        if isinstance(one, dict) and one.get("rope_type") == "longrope"
    ]
    return int(min(lengths, default=2**63))


class _Layer:
    """Keys and values of one layer of the model, zero where nothing has been written.

    It has what transformers' `Cache` asks of a layer (and is registered as one when used, because
    transformers takes seconds to import). `rows`: those in use; `end`: the column
    that the next token is written to.
    """

    is_initialized, is_sliding, is_compileable, is_croppable = True, False, False, False

    def __init__(self, rows: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.rows, self.end = 0, 0
        self.keys = keys.new_zeros(rows, keys.shape[1], 0, keys.shape[3])
        self.values = values.new_zeros(rows, values.shape[1], 0, values.shape[3])

    def put(
        self,
        first: int,
        end: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        lengths: Sequence[int],
    ) -> None:
        """Write rows from `first` on, such that their tokens end at column `end`."""
        for mine, theirs in ((self.keys, keys), (self.values, values)):
            for row, length in enumerate(lengths):
                kept = theirs[row, :, :length]  # all of it where a window has cut the beginning
                mine[first + row, :, end - kept.shape[1] : end] = kept

    def move(self, source: int, target: int) -> None:
        """Copy a row over another."""
        self.keys[target] = self.keys[source]
        self.values[target] = self.values[source]

    def resize(self, rows: int, end: int, kept: int, new_end: int, columns: int) -> None:
        """Set `columns` aside; the last `kept` of `rows` that end at `end` end at `new_end`."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(old.shape[0], old.shape[1], columns, old.shape[3])
            new[:rows, :, new_end - kept : new_end] = old[:rows, :, end - kept : end]
            setattr(self, name, new)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one column; the rows in use with all columns."""
        keys, values = self.keys[: self.rows], self.values[: self.rows]
        keys[:, :, self.end] = key_states[:, :, 0]
        values[:, :, self.end] = value_states[:, :, 0]
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002
        """Columns that a mask is for, and the first of them."""
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        """Columns before the next token's."""
        return self.end


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one token a row; heads that share a key are rows of one product.

    query: (rows, heads, 1, size); mask: (rows, 1, 1, columns), added to the scores. Everything
    else is left to transformers' own.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    rows, heads, tokens, size = query.shape
    if tokens > 1 or attention_mask is None or options.get("position_bias") is not None:
        done: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return done
    _, shared, columns, _ = key.shape
    group = heads // shared
    grouped = query.reshape(rows * shared, group, size)
    scores = torch.bmm(grouped, key.reshape(rows * shared, columns, size).transpose(1, 2))
    scores = scores.view(rows, shared, group, columns)
    scores = scores * (size**-0.5 if scaling is None else scaling) + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    read = torch.bmm(
        weights.view(rows * shared, group, columns),
        value.reshape(rows * shared, columns, value.shape[3]),
    )
    return read.view(rows, 1, heads, value.shape[3]), None


def _mask(*arguments: Any, q_length: int, **options: Any) -> torch.Tensor | None:
    """Transformers' masks: added to the scores of a single token, boolean for more."""
    from transformers.masking_utils import eager_mask, sdpa_mask

    make = eager_mask if q_length == 1 else sdpa_mask
    mask: torch.Tensor | None = make(*arguments, q_length=q_length, **options)
    return mask
