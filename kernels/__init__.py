"""Triton kernels and their launchers, one op a file. No autograd and no dispatch here: see ``fastgan.ops``."""
