"""Activations in fewer bits, for the wire (spec §9).

plain   the codecs in numpy, as they are defined
rows    encode and decode rows: by our own kernels where they are, otherwise as `plain` does, with the same bits
"""
