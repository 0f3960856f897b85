"""The ops in C++ for CPU tensors: callers of the operators of the extension ``fastgan/_C``."""
