"""Golden model of the device: the same file names as the RTL, plain Python and NumPy."""
