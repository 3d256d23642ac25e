"""Tensor-core MLA decode in Triton, for every vendor with a Triton compiler.

`kernels` is what runs on the device, `tuning` the sizes it is compiled with for each architecture, `mla` the host side.
Importing this package imports no compiler; `kernels` does.
"""
