"""Evidence for kernels of GPUs that are not here: each level is a check that can fail.

Level 0 (:mod:`.formats`) and level 1 (:mod:`.packing`) compare codes and bytes with CUTLASS's own
host code; level 5 (:mod:`.golden`) says what a tensor core must return, bit for bit.
"""
