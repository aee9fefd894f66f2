"""Blocks computed by our own kernels on a CPU, from packed weights.

library        the shared library: found, checked, its functions as typed calls
families       what each family keeps where, as data
architecture   a checkpoint's blocks described by such a row; what none covers is refused, with the reason
weights        a block's tensors packed into one arena of memory, straight from the mapped file
packed_cache   packed blocks kept on disk, so that the next start reads instead of packing
stage          a range of blocks, ready to run batches
projection     the end of a model: last norm and head
"""
