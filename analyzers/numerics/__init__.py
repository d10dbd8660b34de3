"""The mathematics: tensors and callables in, tensors out; imports nothing else of dynprobe."""
