"""Stage 6: counters, accuracy and the register bank."""
