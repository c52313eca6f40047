"""Helpers without knowledge of quantization: files, downloads, noise, memory, processes, plots."""
