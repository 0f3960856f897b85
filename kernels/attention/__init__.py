"""Fused attention: forward, backward and double backward."""

from fastgan.kernels.attention.launch import attention_bwd, attention_bwd_bwd, attention_fwd, empty_stats

__all__ = ["attention_bwd", "attention_bwd_bwd", "attention_fwd", "empty_stats"]
