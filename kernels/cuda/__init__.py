"""CUDA kernels: one source file (`*.cu`) and one Python module an operation.

The modules take and return CuPy arrays and have the signatures of their NumPy twins; callers go
through `tensorray.kernels`, which picks by the arrays' device. A module names the sets of
constants its sources are compiled with in `CONSTANT_SETS`: `{file name: [constants, ...]}`.
"""
