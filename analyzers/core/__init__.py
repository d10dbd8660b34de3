"""The contract of an analyzer and the loop that runs one."""
