"""The tasks, as lm-eval YAML: one file a task, two shared ones, `utils.py` for the data.

Plain lm-eval runs the same files:
    lm_eval --model hf --model_args pretrained=DIR --include_path THIS_FOLDER \
        --tasks taia_arc_easy --metadata '{"data": "FOLDER_OF_JSON_LINES"}'
"""
