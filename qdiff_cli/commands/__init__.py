"""One module for each command; `qdiff_cli.main` and the files in `scripts/` call their `main`."""
