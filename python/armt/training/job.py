"""What the command line needs of the training, in one place."""

from armt.training.folder import new_folder, read_progress, write_model, write_progress
from armt.training.recipe import read_recipe
from armt.training.trainer import Trainer

__all__ = [
    "Trainer",
    "new_folder",
    "read_progress",
    "read_recipe",
    "write_model",
    "write_progress",
]
