"""Engines: the implementations that a quantized network can run on. `qdiff.engines.select.apply_engine` chooses one."""
