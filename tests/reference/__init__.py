"""Plain float64 reference of ARMT and RMT: the oracle that the engine is compared with.

Written from the mathematics alone and independent of the engine. Typical use:

    model = load_folder(Path("case"))
    logits, state = forward(model, input_ids)      # state.A, state.z, state.memory_state
    new_ids, step_logits = generate(model, prompt_ids, 10)
"""

from .checkpoint import load_folder, load_hf_folder, model_from_tensors
from .generate import Decoding, generate, smallest_margin, start_generation, step
from .model import Model, State, empty_state, forward, run_segment

__all__ = [
    "Decoding",
    "Model",
    "State",
    "empty_state",
    "forward",
    "generate",
    "load_folder",
    "load_hf_folder",
    "model_from_tensors",
    "run_segment",
    "smallest_margin",
    "start_generation",
    "step",
]
