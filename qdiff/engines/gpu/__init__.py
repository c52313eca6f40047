"""Integer products on CUDA by Triton kernels."""
