"""What the command line needs of the training, in one place."""

from armt.training.folder import new_folder, read_progress, write_model, write_progress
from armt.training.retrieval import Plan, Trainer, stages

__all__ = [
    "Plan",
    "Trainer",
    "new_folder",
    "read_progress",
    "stages",
    "write_model",
    "write_progress",
]
