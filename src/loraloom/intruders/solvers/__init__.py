"""Spectra of adapted weights without a dense decomposition where one can be avoided."""
