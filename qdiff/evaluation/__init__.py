"""Evaluation: metrics of image sets, similarity to full precision, errors along trajectories, and cost."""
