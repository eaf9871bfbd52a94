"""Products with int4, int8 and float8 weights on CUDA that read only their bytes.

A product with few rows takes as long as reading its weights. Triton kernels read them packed, and multiply in the rows'
type. One panel of outputs for each program leaves most processors idle where the weight is small, so the inputs are
split into parts, and a second kernel adds the parts in their order. The number of parts depends on the weight and the
device alone: a row gives the same numbers in whatever batch it is.

For many rows the weights are written out once a call, for cuBLAS: with them written and read in 16 bits that costs 4.6
bytes a weight in four bits and 5 in eight, where the kernel reads its own 0.6 or 1 again for every 32 rows.

The kernels depend on releases of Triton and on the device. A scheme whose kernels fail in a small case, or are wrong
there, is multiplied as dense weights, with a warning.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rapid.kernels.quantization import to_fp8, to_int4, to_int8

logger = logging.getLogger(__name__)

SCHEMES = ("int8", "fp8", "int4")
PANEL = 64  # outputs of a program
GROUP = 64  # inputs that share a scale and an offset in four bits; with 32 a quarter more instructions a weight
BLOCK = 64  # inputs that a program reads at once, in eight bits; in four it is two groups
MOST_ROWS = 128  # from here on the weights are written out
NUM_STAGES = 4  # blocks that are on their way from memory
PROGRAMS_PER_SM = 4  # together they keep enough reads on their way
_BLOCKS_PER_PART = 4  # at least: below that the sums cost more than the weights
COLUMNS = 512  # of one program that adds parts
_AT_ONCE = 64 * PANEL  # outputs that are packed at a time: it is float32 meanwhile


@dataclass(frozen=True)
class Packed:
    """A weight [num_outputs, num_inputs] as the kernels read it (`rapid.kernels.cuda.low_bit_kernels`).

    ``codes``: int8 [panels, blocks, PANEL, block]. ``scales``: float32 [panels, PANEL]; for int4 int32
    [panels, groups, PANEL].
    """

    scheme: str
    num_outputs: int
    num_inputs: int
    codes: Tensor
    scales: Tensor

    @property
    def num_panels(self) -> int:
        return self.codes.shape[0]

    @property
    def num_blocks(self) -> int:
        return self.codes.shape[1]

    @property
    def block(self) -> int:
        return self.codes.shape[3]

    @property
    def num_bytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def blocks_per_part(self, num_sms: int) -> int:
        """How many blocks of inputs one program multiplies, so that ``num_sms`` processors run all programs at once."""
        parts = min(PROGRAMS_PER_SM * num_sms // self.num_panels, self.num_blocks // _BLOCKS_PER_PART)
        return -(-self.num_blocks // max(1, parts))


def pack(weight: Tensor, scheme: str, group: int = GROUP) -> Packed:
    """Rounds ``weight`` [out, in] to a scheme of `SCHEMES`, and packs it; the same on every device."""
    parts = [_pack(part, scheme, group) for part in weight.split(_AT_ONCE)]
    codes, scales = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Packed(scheme, weight.shape[0], weight.shape[1], codes, scales)


def _pack(weight: Tensor, scheme: str, group: int) -> tuple[Tensor, Tensor]:
    span = 2 * group if scheme == "int4" else BLOCK
    weight = F.pad(weight, (0, -weight.shape[1] % span, 0, -weight.shape[0] % PANEL))
    if scheme == "int4":
        codes, *pair = to_int4(weight, group)
        scales, offsets = (part.view(torch.int16).int() for part in pair)
        first, second = codes.unflatten(1, (-1, 2, group)).unbind(2)
        codes = ((first | second << 4) ^ 128).flatten(1)
        words = offsets << 16 | (scales & 0xFFFF)
        return _panels(codes, group), words.view(-1, PANEL, words.shape[1]).transpose(1, 2).contiguous()
    codes, scales = to_int8(weight) if scheme == "int8" else to_fp8(weight)
    return _panels(codes, BLOCK), scales.view(-1, PANEL)


def _panels(codes: Tensor, block: int) -> Tensor:
    """[out, in] to int8 [panels, blocks, PANEL, block]."""
    return codes.view(torch.int8).view(-1, PANEL, codes.shape[1] // block, block).transpose(1, 2).contiguous()


def plain_weight(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] that ``packed`` stands for, by PyTorch's operators: what the kernels are compared with."""
    codes = packed.codes.transpose(1, 2)  # [panels, PANEL, blocks, block]
    if packed.scheme == "int4":
        both = codes.contiguous().view(torch.uint8) ^ 128
        numbers = torch.stack((both & 15, both >> 4), 3).flatten(2, 3)  # [panels, PANEL, groups, group]
        pairs = packed.scales.transpose(1, 2)[..., None]
        weight = numbers * (pairs << 16).view(torch.float32) + (pairs & -65536).view(torch.float32)
    else:
        numbers = codes.contiguous().view(torch.float8_e4m3fn) if packed.scheme == "fp8" else codes
        weight = numbers.float() * packed.scales[..., None, None]
    return weight.flatten(2).flatten(0, 1)[: packed.num_outputs, : packed.num_inputs].to(dtype)


def multiply_rows(x: Tensor, packed: Packed, bias: Tensor | None, num_sms: int) -> Tensor:
    """``x`` [rows, in] times the packed weight, plus ``bias`` [out]: [rows, out] in the type of ``x``."""
    from rapid.kernels.cuda.low_bit_kernels import add_parts, multiply

    num_rows = len(x)
    if x.stride(1) != 1:
        x = x.contiguous()
    per_part = packed.blocks_per_part(num_sms)
    parts = -(-packed.num_blocks // per_part)
    rows = 16 if num_rows <= 16 else 32
    output = x.new_empty(num_rows, packed.num_outputs)
    sums = output if parts == 1 else output.new_empty((parts, *output.shape), dtype=torch.float32)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        multiply[-(-num_rows // rows), packed.num_panels, parts](
            x,
            packed.codes,
            packed.scales,
            x if bias is None else bias,
            sums,
            num_rows,
            packed.num_inputs,
            packed.num_outputs,
            x.stride(0),
            packed.num_blocks,
            per_part,
            SCHEME=packed.scheme,
            ROWS=rows,
            PANEL=PANEL,
            BLOCK=packed.block,
            WITH_BIAS=bias is not None and parts == 1,
            num_warps=4,
            num_stages=NUM_STAGES,
        )
        if parts > 1:
            add_parts[num_rows, -(-packed.num_outputs // COLUMNS)](
                sums,
                x if bias is None else bias,
                output,
                parts,
                num_rows,
                packed.num_outputs,
                COLUMNS=COLUMNS,
                WITH_BIAS=bias is not None,
            )
    return output


def unpacked(packed: Packed, dtype: torch.dtype) -> Tensor:
    """`plain_weight`, in one pass over memory."""
    from rapid.kernels.cuda.low_bit_kernels import unpack

    weight = torch.empty(packed.num_outputs, packed.num_inputs, dtype=dtype, device=packed.codes.device)
    with torch.cuda.device_of(weight):
        unpack[packed.num_blocks, packed.num_panels](
            packed.codes,
            packed.scales,
            weight,
            packed.num_inputs,
            packed.num_outputs,
            packed.num_blocks,
            SCHEME=packed.scheme,
            PANEL=PANEL,
            BLOCK=packed.block,
        )
    return weight


class LowBitLinear:
    """The product with a packed weight (+ ``bias`` [out]) as a function of rows [rows, in]."""

    def __init__(self, packed: Packed, bias: Tensor | None) -> None:
        self._packed, self._bias = packed, bias
        self._num_sms = _num_sms(packed.codes.device)

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) <= MOST_ROWS:
            return multiply_rows(x, self._packed, self._bias, self._num_sms)
        return F.linear(x, unpacked(self._packed, x.dtype), self._bias)


def low_bit_linear(weight: Tensor, bias: Tensor | None, scheme: str) -> Callable[[Tensor], Tensor]:
    """The product with ``weight`` [out, in], rounded to ``scheme``.

    It reads the packed bytes, or where that is not right on this device the rounded weight in its own type.
    """
    packed = pack(weight, scheme)
    if _fault(scheme, weight.device, weight.dtype) is None:
        return LowBitLinear(packed, bias)
    rounded = plain_weight(packed, weight.dtype)
    return lambda rows: F.linear(rows, rounded, bias)


@functools.cache
def _num_sms(device: torch.device) -> int:
    """The device's processors. Where there are none, in Triton's interpreter, the number only cuts the work."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def _fault(scheme: str, device: torch.device, dtype: torch.dtype) -> str | None:
    reason = fault(scheme, device, dtype)
    if reason is not None:
        logger.warning("%s weights are multiplied as dense ones on %s: %s", scheme, device, reason)
    return reason


# (outputs, inputs): one part, and several; the last panel and the last block are not full
_SHAPES = ((100, 48), (72, 1000))
_ROW_COUNTS = (1, 5, 33, MOST_ROWS + 1)  # each size of a program, several, and the weights written out
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3}  # of the largest output; bfloat16 has eight bits
_TOLERANCE_BFLOAT16 = 1e-2


@torch.inference_mode()
def fault(scheme: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with the kernels of ``scheme``: an error, or how far they are from float32. None if nothing is."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    tolerance = _TOLERANCE.get(dtype, _TOLERANCE_BFLOAT16)
    for num_outputs, num_inputs in _SHAPES:
        packed, bias = pack(random(num_outputs, num_inputs), scheme), random(num_outputs)
        weight = plain_weight(packed, torch.float32)
        product = LowBitLinear(packed, bias)
        for num_rows in _ROW_COUNTS:
            rows = random(num_rows, num_inputs)
            try:
                output = product(rows)
                if output.is_cuda:
                    torch.cuda.synchronize(device)  # an error of the kernel is raised here, not later
            except Exception as error:  # a compiler's errors are of any kind
                return f"{type(error).__name__}: {error}".splitlines()[0]
            expected = F.linear(rows.float(), weight, bias.float())
            distance = ((output.float() - expected).abs().max() / expected.abs().max()).item()
            if not distance <= tolerance:  # NaN is not below any tolerance
                return f"{num_rows} rows are {distance:.2g} from float32 where {tolerance:.2g} is allowed"
    return None
