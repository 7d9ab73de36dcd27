"""CuPy on NVIDIA GPUs: products by cuBLAS, and the kernels of `kernels.cu`."""
