"""Engines: what a quantized network runs on. `qdiff.engines.select.apply_engine` chooses one."""
