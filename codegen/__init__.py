"""From a lowered program to what the runtime executes.

``emit_plan`` writes the plan, ``package`` the kernels of GPUs beside it. Only the first needs the
compiler's IR: kernels can be compiled again from an artifact without it, so nothing is imported
here.
"""
