"""The command line: options become checked jobs, jobs become files. Stands above `qdiff`, `ddim` and `ldm`."""
