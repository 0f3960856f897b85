"""One update of a GAN: eager, captured, or replayed as a CUDA graph."""
