"""What runs between a model's segments: each kernel with a NumPy twin of the same signature."""

from tensorray.kernels.native import native_available
from tensorray.kernels.threads import set_num_threads

__all__ = ["native_available", "set_num_threads"]
