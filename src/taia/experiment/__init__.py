"""A recipe carried out: its stages, its cells, here or on a Ray cluster."""

from taia.experiment.runs import preview_recipe, run, train_recipe

__all__ = ["preview_recipe", "run", "train_recipe"]
