"""BSNS: run models too large for one machine across the machines you already have."""

__version__ = "0.1.0"
