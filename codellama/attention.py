"""Attention, planned once per forward: what all layers have in common is found before the first of them.

A plan knows which tokens are real, where they go in the cache, what each of them sees, and how far its pairs turn. It
knows nothing of weights, norms or requests. Nothing is masked but where only the device knows the positions: what comes
before a chunk is seen by all of it, and the chunk itself is causal, so the two are computed apart and merged by the
logarithms of their sums of exponentials.

Source: rotary embedding (arXiv 2104.09864); partial results merged as in FlashAttention (arXiv 2205.14135, section 3).

Shapes: B batch rows, T new tokens per row, S cache length, H query heads here, K key/value heads here, G = H / K query
heads that share one, D head_dim. "Here" is on this model-parallel rank.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from codellama.cache import KVCache, Slots
from codellama.config import ModelArgs
from codellama.memory import QUERY_TILE, READ_BYTES

_ALL = slice(None)
_TURN_TILE = 64  # tokens whose float32 copy exists at once: it stays in the processor's cache
_MANY = 4  # queries for a key head from which 16-bit attention is as fast as conversion to float32
_SHARED = 8  # query heads for a key head up to which values are cheaper summed than multiplied
_SMALL_BYTES = 2**18  # of keys and values, up to which one call costs less than several that read faster
_SLICE_BYTES = 3 * 2**17  # of keys and values that are read in the time that one more call takes


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position · theta^(-2i/D) for each pair i of a head.

    Computed in float64: in float32 an angle near 100,000 is off by up to 0.004.

    Args:
        positions: `[B, T]`.
        head_dim: D.
        theta: base of the frequencies.

    Returns:
        Two float32 tensors `[B, T, 1, D/2]`.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions[:, :, None, None].double() * theta**-exponents
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the adjacent pairs (x0, x1), (x2, x3), … of every head by their angle.

    For gradients and compilers. `turn` gives the same bits, but for the last one where heads are smaller than 16.

    Args:
        x: `[B, T, heads, D]`.
        cos: `[B, T, 1, D/2]`, and sin alike.
    """
    even, odd = x.float().view(*x.shape[:-1], -1, 2).unbind(-1)  # [B, T, heads, D/2] each
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).type_as(x)


def turn(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the adjacent pairs of every head as complex numbers: several times faster.

    Args:
        x: `[B, T, heads, D]`, the last axis contiguous.
        turns: cosine and sine as complex64 `[B, T, 1, D/2]`.
    """
    if x.shape[1] <= _TURN_TILE or x.dtype == torch.float32:
        pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns).flatten(-2).type_as(x)
    turned = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for start in range(0, x.shape[1], _TURN_TILE):
        tokens = slice(start, start + _TURN_TILE)
        turned[:, tokens] = turn(x[:, tokens], turns[:, tokens])
    return turned


class AttentionPlan:
    """How the tokens of one forward attend, the same in every layer.

    Positions of -1 are padding behind a row's tokens, or a whole row that runs along: nothing is written for them, and
    what is computed for them is finite and nobody's.
    """

    def __init__(
        self, positions: Tensor, args: ModelArgs, cache: KVCache | None, on_device: bool | None = None
    ) -> None:
        """Plan a forward.

        Args:
            positions: `[B, T]`; in each row they rise by one, and -1 may follow. From 0 where there is no cache.
            args: the architecture.
            cache: the view that is written to and attended over.
            on_device: never look at the positions on the host, for one token per row; None does so on a GPU.
        """
        self.rotary = rotary_angles(positions, args.head_dim, args.rope_theta)
        plain = torch.is_grad_enabled() or torch.compiler.is_compiling()  # which knows little of complex numbers
        self._turns = None if plain else torch.complex(*self.rotary)
        self._cache = cache
        self._scratch: Tensor | None = None
        self._groups: list[tuple[slice, int, Tensor | None]] = []
        self._lines: dict[tuple[tuple[int, ...], tuple[int, int]], tuple[Tensor, Tensor]] = {}
        if cache is None:
            return
        if on_device is None:
            on_device = positions.shape[1] == 1 and positions.device.type != "cpu"
        if on_device:
            assert positions.shape[1] == 1, "longer steps are planned on the host"
            self._slots, self._padded = Slots.on_device(positions), False
            length = cache.keys[0].shape[2]
            self._groups = [(_ALL, length, _seen(positions, length))]
            return
        self._slots = Slots.find(positions)
        spans = self._slots.spans or ()
        self._whole = all(start == 0 for _, start, _ in spans)
        self._padded = sum(stop - start for _, start, stop in spans) < positions.numel()  # some of it is nobody's
        if positions.shape[1] == 1:
            self._groups = _group(self._slots, positions, cache)
        if positions.device.type == "cpu" and cache.keys[0].dtype != torch.float32:
            size = min(READ_BYTES // 8, cache.keys[0].numel())  # keys or values, so a half
            self._scratch = torch.empty(size)  # for all layers: new memory costs more than conversion

    def rotate(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Turn `[B, T, heads, D]` by their positions."""
        if self._turns is None:
            return rotate(query, *self.rotary), rotate(key, *self.rotary)
        return turn(query, self._turns), turn(key, self._turns)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Write the new keys and values to the cache, then mix over the positions that each token sees.

        Neither keys nor values are repeated for grouped heads.

        Args:
            layer: index of the layer.
            query: `[B, T, H, D]`, rotated.
            key: `[B, T, K, D]`, rotated.
            value: `[B, T, K, D]`.

        Returns:
            `[B, T, H, D]`.
        """
        cache = self._cache
        if cache is None:
            return _causal(query, key.transpose(1, 2), value.transpose(1, 2))
        cache.write_(layer, self._slots, key, value)
        if query.shape[1] == 1:
            return self._attend_one(layer, query)
        kind = _number_kind(query, cache, query.shape[1] * (query.shape[2] // key.shape[2]))
        if self._whole:  # padding is behind all that is real, so no real token sees it
            keys, values = self._read(layer, _ALL, _ALL, slice(query.shape[1]), kind)
            return _causal(query.to(kind), keys, values).type_as(query)
        mixed = torch.zeros_like(query) if self._padded else torch.empty_like(query)
        for row, start, stop in self._slots.spans or ():
            for first in range(0, stop - start, QUERY_TILE):
                last = min(first + QUERY_TILE, stop - start)
                self._attend_chunk(layer, row, start + first, query[row, first:last], mixed[row, first:last], kind)
        return mixed

    def _attend_one(self, layer: int, query: Tensor) -> Tensor:
        """Mix one token of each row: `[B, 1, H, D]`."""
        cache = self._cache
        assert cache is not None, "rows are rows of a cache"
        held = cache.keys[layer]
        B, _, H, D = query.shape
        K = held.shape[1]
        grouped = query.view(B, K, H // K, D)  # the heads that share a key become the rows of its query
        kind = _number_kind(query, cache, H // K)
        mixed = torch.zeros_like(grouped) if self._padded else torch.empty_like(grouped)
        for rows, length, mask in self._groups:  # _ALL is the only one then
            part = grouped[rows]
            small = query.device.type != "cpu" or 2 * part.shape[0] * length * K * D * held.itemsize <= _SMALL_BYTES
            native = kind == held.dtype
            if small and native and rows is _ALL:
                keys, values = self._read(layer, rows, _ALL, slice(length), kind)
                return F.scaled_dot_product_attention(grouped, keys, values, mask).view(query.shape)
            if not small and not (native and (H // K > _SHARED or held.itemsize == 2)):
                mixed[rows] = self._sum_values(layer, rows, self._weigh(layer, rows, length, part, mask))
                continue
            for heads, _ in _tiles(K, length, part.shape[0] * D * kind.itemsize, kind != held.dtype, whole=True):
                keys, values = self._read(layer, rows, heads, slice(length), kind)
                some = part[:, heads].to(kind)
                mixed[rows, heads] = F.scaled_dot_product_attention(some, keys, values, mask).type_as(query)
        return mixed.view(query.shape)

    def _weigh(self, layer: int, rows: slice, length: int, query: Tensor, mask: Tensor | None) -> Tensor:
        """The weights of so many positions for queries `[b, K, G, D]`: float32 `[b, K, G, length]`.

        Keys times a column runs at the memory's speed on a CPU, a row times keys at a quarter of it.
        """
        cache = self._cache
        assert cache is not None, "rows are rows of a cache"
        b, K, G, D = query.shape
        columns = query.float().mul_(D**-0.5) if query.dtype != torch.float32 else query * D**-0.5
        columns = columns.transpose(2, 3)  # [b, K, D, G]
        converted = cache.keys[layer].dtype != torch.float32
        scores = query.new_empty((b, K, length, G), dtype=torch.float32)
        for heads, tiles in _tiles(K, length, 4 * b * D, converted):
            for tile in tiles:
                keys = cache.read_keys(layer, rows, heads, tile, torch.float32, self._scratch)
                scores[:, heads, tile] = keys @ columns[:, heads]
        weights = scores.transpose(2, 3).contiguous() if G > 1 else scores.view(b, K, 1, length)
        if mask is not None:
            weights.masked_fill_(~mask, -torch.inf)
        return torch.softmax(weights, dim=-1)

    def _sum_values(self, layer: int, rows: slice, weights: Tensor) -> Tensor:
        """Values summed with weights `[b, K, G, length]`: `[b, K, G, D]`.

        That is what an embedding bag does, with rows of the cache as its table, twice to four times as fast on a CPU as
        a product of one row.
        """
        cache = self._cache
        assert cache is not None, "rows are rows of a cache"
        held = cache.values[layer]
        b, K, G, length = weights.shape
        D = held.shape[3]
        if cache.scales is None:
            part = held[rows]
            strides = part.stride(0) // D, part.stride(1) // D
            n_lines = (b - 1) * strides[0] + (K - 1) * strides[1] + length
            table = part.as_strided((n_lines, D), (D, 1))
            return self._bag(table, weights.to(held.dtype), strides).view(b, K, G, D)
        mixed = weights.new_zeros((b, K, G, D))
        for heads, tiles in _tiles(K, length, 4 * b * D, converted=True):
            for tile in tiles:
                values = cache.read_values(layer, rows, heads, tile, torch.float32, self._scratch)
                strides = values.stride(0) // D, values.stride(1) // D
                part = weights[:, heads, :, tile].contiguous()
                mixed[:, heads] += self._bag(values.view(-1, D), part, strides).view((*part.shape[:-1], D))
        return mixed

    def _bag(self, table: Tensor, weights: Tensor, strides: tuple[int, int]) -> Tensor:
        """Sum lines of a table `[n, D]`: row r and head h begin at line r · strides[0] + h · strides[1]."""
        key = (tuple(weights.shape), strides)
        if key not in self._lines:
            b, k, G, length = weights.shape
            rows = torch.arange(b, dtype=torch.int32) * strides[0]
            heads = torch.arange(k, dtype=torch.int32) * strides[1]
            firsts = (rows[:, None] + heads)[:, :, None, None]  # [b, k, 1, 1]
            lines = (firsts + torch.arange(length, dtype=torch.int32)).expand(-1, -1, G, -1).reshape(-1)
            self._lines[key] = lines, torch.arange(b * k * G, dtype=torch.int32) * length
        lines, offsets = self._lines[key]
        return torch.embedding_bag(table, lines, offsets, False, 0, False, weights.view(-1))[0]

    def _attend_chunk(self, layer: int, row: int, start: int, query: Tensor, mixed: Tensor, kind: torch.dtype) -> None:
        """Mix one row's tokens from position start on: `[t, H, D]`, into a tensor of the same shape."""
        cache = self._cache
        assert cache is not None, "rows are rows of a cache"
        t, D, K = query.shape[0], query.shape[2], cache.keys[layer].shape[1]
        grouped = query.view(t, K, -1, D).permute(1, 2, 0, 3)  # [K, G, t, D]
        G = grouped.shape[1]
        result = mixed.view(t, K, G, D).permute(1, 2, 0, 3)
        rows = slice(row, row + 1)
        converted = kind != cache.keys[layer].dtype
        for heads, tiles in _tiles(K, start, D * kind.itemsize, converted, own=t):
            part = grouped[heads].to(kind)  # [k, G, t, D]
            flat = part.reshape(1, part.shape[0], G * t, D)  # heads that share a key are rows of its query
            keys, values = self._read(layer, rows, heads, slice(start, start + t), kind)
            keys, values = (own[0][:, None].expand(-1, G, -1, -1) for own in (keys, values))  # [k, G, t, D]
            sums = _partial(part, keys, values, causal=True)
            for tile in tiles:
                out, weight = _partial(flat, *self._read(layer, rows, heads, tile, kind), causal=False)
                sums = _merge(sums, (out.view(part.shape), weight.view(part.shape[:-1])))
            result[heads] = sums[0]

    def _read(self, layer: int, rows: slice, heads: slice, tile: slice, kind: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of a part of a layer, `[b, heads, positions, D]` each."""
        cache = self._cache
        assert cache is not None, "rows are rows of a cache"
        return (
            cache.read_keys(layer, rows, heads, tile, kind), cache.read_values(layer, rows, heads, tile, kind)
        )  # fmt: skip


def _number_kind(query: Tensor, cache: KVCache, queries: int) -> torch.dtype:
    """The dtype to attend in: on a CPU float32 for few queries, where 16-bit attention is slower, and for codes."""
    if query.device.type != "cpu" or query.dtype not in (torch.bfloat16, torch.float16):
        return query.dtype
    if queries < _MANY or torch.compiler.is_compiling():  # which cannot ask the machine
        return torch.float32
    computes = query.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return query.dtype if computes and cache.scales is None else torch.float32


def _seen(positions: Tensor, length: int) -> Tensor:
    """What one token of each row sees of so many positions, `[B, 1, 1, length]`; position 0 where it is nobody's."""
    columns = torch.arange(length, device=positions.device)
    return (columns <= positions.clamp(min=0)[:, :, None])[:, None]


def _group(slots: Slots, positions: Tensor, cache: KVCache) -> list[tuple[slice, int, Tensor | None]]:
    """Rows that are read together, how far, and what is masked, for one token of each row.

    Rows of one length need no mask. Others are read each to its own end, unless that spares less than the calls cost.
    """
    spans = slots.spans
    assert spans is not None, "the host knows the positions"
    B, K, _, D = cache.keys[0].shape
    if not spans:
        return []
    length = max(stop for _, _, stop in spans)
    if slots.together:
        mask = None
    else:
        spared = B * length - sum(stop for _, _, stop in spans)
        if 2 * spared * K * D * cache.keys[0].itemsize > (len(spans) - 1) * _SLICE_BYTES:
            return [(slice(row, row + 1), stop, None) for row, _, stop in spans]
        mask = _seen(positions, length)
    return [(_ALL, length, mask)]


def _tiles(
    n_heads: int, length: int, position_bytes: int, converted: bool, *, own: int = 0, whole: bool = False
) -> Iterator[tuple[slice, list[slice]]]:
    """Heads, and the tiles of their positions that are read at once.

    Args:
        n_heads: key/value heads.
        length: positions.
        position_bytes: of a key, or of a value, of one head at one position, of all rows that are read together.
        converted: numbers that are converted come in tiles of READ_BYTES; others are read where they are.
        own: positions that are read at once beside them.
        whole: all positions of a head have to be read at once, since they are masked.
    """
    fitting = max(1, READ_BYTES // (2 * position_bytes)) if converted else n_heads * max(length, own)
    size = max(1, length if whole else min(length, fitting))
    step = max(1, fitting // max(size, own))
    for first in range(0, n_heads, step):
        yield (
            slice(first, min(first + step, n_heads)),
            [slice(start, min(start + size, length)) for start in range(0, length, size)],
        )


def _causal(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend from the beginning: queries `[B, T, H, D]`, keys and values `[B, K, T, D]`."""
    shared = query.shape[2] > keys.shape[1]
    mixed = F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, is_causal=True, enable_gqa=shared)
    return mixed.transpose(1, 2)


def _partial(query: Tensor, keys: Tensor, values: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Attend to a part of the positions, `[b, h, t, D]` over `[b, h, s, D]`.

    Returns:
        The result, and the logarithm of its sum of exponentials, float32 `[b, h, t]`.
    """
    if query.device.type == "cpu":
        mixed, weight = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, keys, values, 0.0, causal)
        return mixed, weight
    return _partial_on_gpu(query, keys, values, causal)


def _partial_on_gpu(query: Tensor, keys: Tensor, values: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """The same with the kernels of a GPU, which want heads of a multiple of 8."""
    size, scale = query.shape[-1], query.shape[-1] ** -0.5
    if size % 8:
        query, keys, values = (F.pad(tensor, (0, -size % 8)) for tensor in (query, keys, values))
    if query.dtype == torch.float32:
        found = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, keys, values, None, True, 0.0, causal, scale=scale
        )
    else:
        found = torch.ops.aten._scaled_dot_product_flash_attention(query, keys, values, 0.0, causal, False, scale=scale)
    return found[0][..., :size], found[1][..., : query.shape[2]]  # the logarithms may be padded to a multiple of 32


def _merge(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merge two parts: results `[b, h, t, D]` and the logarithms of their sums `[b, h, t]`, in float32."""
    share = torch.sigmoid(other[1] - one[1])
    return torch.lerp(one[0].float(), other[0].float(), share[..., None]), torch.logaddexp(one[1], other[1])
