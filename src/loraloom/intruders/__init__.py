"""Intruder dimensions (2410.21228): found, and scaled down."""
