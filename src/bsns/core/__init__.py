"""The nouns everybody shares: ids, block ranges, errors. No I/O, no torch, no clocks."""
