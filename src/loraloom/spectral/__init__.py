"""Spectra of low-rank updates and of the weights that they change: intruder dimensions (arXiv 2410.21228)."""
