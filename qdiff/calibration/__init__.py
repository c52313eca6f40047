"""Calibration: the set, the capture of activations, ranges, reconstruction, and the run over all units."""
