"""FP8 training for any PyTorch model. `convert` is here; layers, recipes and optimizers are imported from their modules.

What is named here is imported when it is first asked for: `import nvfp8.hardware` should not wait for torch's distributed tensors.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nvfp8.conversion import Report, convert, load_scaling_state, scaling_state

__all__ = ["Report", "convert", "load_scaling_state", "scaling_state"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nvfp8 import conversion

    return getattr(conversion, name)
