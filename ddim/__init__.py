"""The pixel family: DDPM UNets, their schedule, samplers and public weights."""
