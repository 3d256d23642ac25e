"""Hugging Face's DeepSeek-V3 (and V2), decoding through the HAL; run it with ``python -m examples.deepseek_v3``.

The model is transformers' own code with two modules of a layer exchanged: attention becomes absorbed MLA over a paged
latent cache (`attention`, `cache`), the routed experts become dispatch, local experts and combine (`experts`).
Everything else, the router and the shared experts included, stays. A small continuous-batching engine (`scheduler`,
`engine`) runs it over any number of processes (`ranks`), and `check` compares with the untouched model.

A step is always the same number of token rows, some of them empty, so that every matrix product of the model has one
shape whatever is in the batch. With a batch-invariant attention and a combine of fixed order this makes a prompt's bits
independent of its company and of the number of processes, which the run verifies.
"""
