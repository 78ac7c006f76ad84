"""Spectra of low-rank updates and of the weights that they change."""
