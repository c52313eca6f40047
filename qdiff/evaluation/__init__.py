"""Evaluation: images in, features and figures of merit out, with a cache that knows what it was made from."""
