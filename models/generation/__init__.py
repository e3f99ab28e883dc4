"""Text generation: chat template, cache, sampling, continuous batching."""
