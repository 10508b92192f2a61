"""Triton kernels for distillation losses: raw tensors in, raw tensors out."""
