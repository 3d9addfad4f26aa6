"""What torch raises where a density is not defined at a point, though it may be elsewhere."""

from __future__ import annotations

import torch

# Of indexing, in TorchScript too, which raises a RuntimeError of any error's text.
_OUT_OF_RANGE = (
    "is out of bounds for dimension",
    "index out of range",
    "out of range: tried to access",
    "out of DATA bounds",
)

ERRORS = (IndexError, RuntimeError)


def is_undefined(error: BaseException) -> bool:
    """Whether a factorisation failed, or an index computed from latents left its array."""
    if isinstance(error, torch.linalg.LinAlgError):
        return True
    return isinstance(error, ERRORS) and any(text in str(error) for text in _OUT_OF_RANGE)
