"""ONNX files of compiled models, in two styles that differ in how a quantized value is expressed.

``trace`` records a plan with four operations of our own in place of what is quantized
(``symbols``), and torch's exporter writes the rest; ``lower`` then expresses them in operations
of ONNX, as the style says (``standard``, ``portable``). ``read`` gives back the weights of a file.
"""
