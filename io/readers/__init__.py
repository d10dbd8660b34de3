"""A file here is a checkpoint format: `sniff()` and `open()`."""
