"""Instructions that Numba has no functions for, written as LLVM."""
