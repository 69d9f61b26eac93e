"""Kernels written in Triton, for CUDA; `TRITON_INTERPRET=1` runs them on the CPU in the tests."""
