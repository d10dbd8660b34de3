"""Files to plain objects and back: checkpoint sequences, models, data, reports."""
