"""The command line: everything a user types, reads and sees."""
