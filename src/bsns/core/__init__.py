"""The nouns everybody shares: ids, block ranges, nodes, routes, errors. No I/O, no torch, no clocks."""
