"""The shape of the network. Pure: no I/O, no clocks, no torch.

distance     how far nodes lie apart, and a well spread sample of large swarms
persistence  clusters and loops, and at which distances they come and go; with the weight of slow and small nodes
diagrams     how far two persistence diagrams lie apart
summary      clusters and lasting loops, for people
signature    a swarm's shape, to tell which swarms are alike
plots        barcodes and diagrams as pictures
synthetic    random swarms of three shapes
"""
