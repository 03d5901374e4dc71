"""Evidence for kernels of GPUs that are not here: each level is a check that can fail.

Level 0 (:mod:`.formats`) and level 1 (:mod:`.packing`) compare codes and bytes with CUTLASS's own
host code. Level 2 (:mod:`.launch`, :mod:`.contract`) runs a compiled kernel's host code with a
runtime that records what a GPU would be asked for, level 3 (:mod:`.disassembly`,
:mod:`.machine_code`, :mod:`.descriptor`) reads its machine code. Level 5 (:mod:`.golden`) says what
a tensor core must return, bit for bit, and level 6 (:mod:`.second_compiler`) asks another compiler.
:func:`fpcompiler.codegen.proof.prove.prove` goes through all of them for one kernel.
"""
