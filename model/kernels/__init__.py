"""Triton kernels for the memory-bound operators, and the choice between them and PyTorch's own.

Callers use `dispatch`; only `dispatch` imports `triton`, and only for CUDA tensors.
To add a kernel: a function in `triton.py` with the signature of its PyTorch twin, which the tests compare it with.
"""
