"""Fused attention: forward, backward and double backward."""
