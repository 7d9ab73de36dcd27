"""CuPy on NVIDIA GPUs: products by cuBLAS, and the kernels in `kernels/`."""
