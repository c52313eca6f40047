"""The pixel family: the UNets of DDPM, their schedule, samplers and public weights."""
