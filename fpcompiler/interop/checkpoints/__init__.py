"""Quantized checkpoints of Hugging Face folders: compressed-tensors and ModelOpt.

Codes and scales are carried as they are stored; nothing is quantized again.

=================  ================================================================================
``files``          a folder: ``config.json`` and tensors in safetensors files, read and written
``layouts``        how each format stores one weight: a row each
``arguments``      how a config describes what a layer is quantized to
``config``         which layers the configs of both tools say are quantized, and how
``reading``        a folder as a checked :class:`Checkpoint`
``structure``      whether the tensors of a layer have the types, shapes and values of its format
``plausibility``   whether they can be the values of a weight: what structure does not show
``original``       whether they are near the weights that were quantized
``layers``         the quantized layers of an artifact, as a checkpoint would store them
``compressed``     writes a compressed-tensors folder
``dense``          the model of a folder, its weights dequantized
=================  ================================================================================
"""
