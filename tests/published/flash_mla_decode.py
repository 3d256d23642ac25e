"""Dense MLA decode, as a script of FlashMLA's users would have it."""

import flash_mla
import torch

from hal.reference import mla as reference
from hal.spec.limits import DENSE_LSE, DENSE_OUT

torch.manual_seed(0)
batch, s_q, h_q, page, longest = 4, 2, 16, 64, 300
lengths = torch.tensor([longest, 7, 0, 130], dtype=torch.int32)
blocks = -(-longest // page)
table = torch.randperm(batch * blocks).int().view(batch, blocks)
cache = (torch.randn(batch * blocks, page, 1, 576) / 10).clamp(-1, 1).bfloat16()
for b, n in enumerate(lengths.tolist()):
    table[b, -(-n // page) :] = 2147480000
q = (torch.randn(batch, s_q, h_q, 576) / 10).clamp(-1, 1).bfloat16()

metadata, splits = flash_mla.get_mla_metadata(lengths, s_q * h_q, 1)
wanted, wanted_lse = reference.mla_decode(q, cache, table, lengths, causal=True)
for schedule in ((metadata, splits), flash_mla.get_mla_metadata()):
    for _ in range(2):
        out, lse = flash_mla.flash_mla_with_kvcache(q, cache, table, lengths, 512, *schedule, causal=True)
        assert out.shape == (batch, s_q, h_q, 512) and lse.shape == (batch, h_q, s_q)
        torch.testing.assert_close(out.double(), wanted.double(), rtol=DENSE_OUT.relative, atol=DENSE_OUT.absolute)
        torch.testing.assert_close(lse.double(), wanted_lse.double(), rtol=DENSE_LSE.relative, atol=DENSE_LSE.absolute)
print("passed")
