"""The tower that a part of a model belongs to, from what it reads and what stands beside it.

`TOWERS` states them in words; docs/kinds.md prints it.

A module that holds the token embedding is never a vision, audio, projector or generator
tower, whatever its family calls itself. A decoder is one only where an attribute says so.
Inside a tower nothing opens another one, but a projector may stand in a vision or audio
tower, and an encoder may hold a vision tower.
"""

from __future__ import annotations

import re
from typing import Any

from taia.derivation.names import bare_class

TOWERS: tuple[tuple[str, str], ...] = (
    ("language", "all that leads from the token embedding to the head."),
    (
        "encoder",
        "the encoder of an encoder-decoder over text: a child called encoder or text_encoder "
        "beside a decoder (or layers), unless it reads images or sound.",
    ),
    (
        "vision",
        "a model that says it reads images or video, or a class or attribute that says so "
        "(Vision, Siglip, CLIP, Image, Patch, VQ).",
    ),
    (
        "audio",
        "a model that says it reads sound, or a class that says so (Audio, Acoustic, Speech, "
        "Mimi, Codec); a codec as a whole.",
    ),
    (
        "projector",
        "what carries one tower's states into another, by class or attribute: projector, "
        "connector, aligner, merger, resampler, Q-Former, and query tokens and separators "
        "between towers. It has no layers.",
    ),
    (
        "generator",
        "what makes sound, images or actions out of the language tower's states: talkers, "
        "vocoders, depth decoders, diffusion and generation heads.",
    ),
)
"""Every tower that there is, in words."""

PROJECTOR = re.compile(
    r"Projector|Connector|Aligner|Merger|Q[Ff]ormer|Resampler|MultiModalProj|ImageToTextProjection"
    r"|MultimodalEmbedder|VisionProjection"
)
PROJECTOR_NAMES = re.compile(
    r"projector|connector|aligner|^merger|merger_list|resampler|qformer"
    r"|^((language|vision|visual|image|audio|speech|text|image_to_text)_proj(ection)?"
    r"|(audio_)?enc_to_dec_proj|proj)$"
)
PROJECTOR_LOOSE = re.compile(
    r"^(query_tokens|image_newline|view_separator|high_res_vision_alpha|latent_\w+_factor)$"
)
"""Parameters that a multimodal model owns itself, between its towers."""

GENERATOR_NAMES = re.compile(
    r"^(talker|token2wav|code2wav|code_predictor|depth_decoder|diffusion_head|dit"
    r"|generation_\w+|action_\w+|state_\w+|word_timestamp_\w+)$"
)
ENCODER_NAMES = {"encoder", "text_encoder", "protein_encoder"}
DECODER_NAMES = {"decoder", "text_decoder", "layers"}

VISION = re.compile(r"Vision|Siglip|CLIP|Image|^Patch|Sam[A-Z]|Radio|ViT|VQ|Timm")
VISION_NAMES = re.compile(r"^(vision|visual|image|vqmodel)")
AUDIO = re.compile(r"Audio|Acoustic|Speech|Mimi|Codec|Whisper|Encodec")
READS = {
    "pixel_values": "vision",
    "flattened_patches": "vision",
    "input_features": "audio",
    "input_values": "audio",
}
"""What the first input of a model is called."""

DECODES = re.compile(r"Decoder|Text|Language|ForCausalLM|LM$")


def tower_of(parent: Any, attribute: str, child: Any, tower: str, own: frozenset[int]) -> str:
    """The tower of a child of `parent`, which belongs to `tower`.

    own: the ids of the modules that are the language model or hold its token embedding.
    """
    name = bare_class(child, shortest=True)
    if tower in ("projector", "generator"):
        return tower
    foreign = None if id(child) in own else _foreign(attribute, child, name, tower)
    if foreign is not None or tower in ("vision", "audio"):
        return foreign or tower
    beside_decoder = attribute in ENCODER_NAMES and DECODER_NAMES & {*parent._modules}
    return "encoder" if beside_decoder else tower


def _foreign(attribute: str, child: Any, name: str, tower: str) -> str | None:
    if PROJECTOR.search(name) or PROJECTOR_NAMES.search(attribute):
        return "projector"
    if tower in ("vision", "audio"):
        return None
    if GENERATOR_NAMES.search(attribute):
        return "generator"
    return _reads(attribute, child, name)


def _reads(attribute: str, child: Any, name: str) -> str | None:
    """`vision` or `audio`, where the name or the model's own word says so."""
    if DECODES.search(name):
        return None
    if VISION.search(name) or VISION_NAMES.search(attribute):
        return "vision"
    if AUDIO.search(name):
        return "audio"
    if not hasattr(child, "main_input_name"):
        return None
    said = getattr(child, "input_modalities", None) or ()
    modalities = {said} if isinstance(said, str) else set(said)
    if modalities and modalities <= {"image", "video"}:
        return "vision"
    if modalities == {"audio"}:
        return "audio"
    return READS.get(child.main_input_name)
