"""Files on disk to the engine's tensors, and back."""

from armt.checkpoint.checkpoint import CanonicalTensor, Checkpoint
from armt.checkpoint.describe import describe
from armt.checkpoint.export import export_folder
from armt.checkpoint.load import load_checkpoint

__all__ = ["CanonicalTensor", "Checkpoint", "describe", "export_folder", "load_checkpoint"]
