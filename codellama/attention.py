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
        if cache is None:
            return
        if on_device is None:
            on_device = positions.shape[1] == 1 and positions.device.type != "cpu"
        if on_device:
            assert positions.shape[1] == 1, "longer steps are planned on the host"
            self._slots, self._padded = Slots.on_device(positions), False
            length = cache.keys[0].shape[2]
            hidden = _seen(positions, length).logical_not()
            kind = cache.keys[0].dtype if cache.scales is None else torch.float32
            mask = torch.zeros(
                hidden.shape, dtype=kind, device=hidden.device
            )  # a boolean one is converted in each layer
            self._groups = [(_ALL, length, mask.masked_fill_(hidden, -torch.inf))]
            return
        self._slots = Slots.find(positions)
        spans = self._slots.spans or ()
        self._whole = all(start == 0 for _, start, _ in spans)
        self._padded = sum(stop - start for _, start, stop in spans) < positions.numel()  # some of it is nobody's
        if positions.shape[1] == 1:
            self._groups = _group(self._slots, positions, cache)

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
            keys, values = cache.read(layer, _ALL, _ALL, slice(query.shape[1]), kind)
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
        B, _, H, D = query.shape
        K = cache.keys[layer].shape[1]
        kind = _number_kind(query, cache, H // K) if cache.scales is None else torch.float32
        converted = kind != cache.keys[layer].dtype
        grouped = query.view(B, K, H // K, D).to(kind)  # the heads that share a key become the rows of its query
        if len(self._groups) == 1 and not converted:
            rows, length, mask = self._groups[0]
            if grouped[rows].shape[0] == B:
                keys, values = cache.read(layer, rows, _ALL, slice(length), kind)
                return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask).view(query.shape)
        mixed = torch.zeros_like(grouped) if self._padded else torch.empty_like(grouped)
        for rows, length, mask in self._groups:
            size = len(range(*rows.indices(B)))
            if mask is not None and mask.is_floating_point():
                mask = mask.to(kind)
            for heads, tiles in _tiles(K, length, size * D, kind, converted, whole=mask is not None):
                part = grouped[rows, heads]
                if len(tiles) == 1:
                    keys, values = self._read(layer, rows, heads, tiles[0], kind)
                    mixed[rows, heads] = F.scaled_dot_product_attention(part, keys, values, attn_mask=mask)
                    continue
                assert mask is None, "what is masked is read at once"
                sums: tuple[Tensor, Tensor] | None = None
                for tile in tiles:
                    found = _partial(part, *self._read(layer, rows, heads, tile, kind), causal=False)
                    sums = found if sums is None else _merge(sums, found)
                assert sums is not None, "every token sees at least itself"
                mixed[rows, heads] = sums[0]
        return mixed.view(query.shape).type_as(query)

    def _attend_chunk(self, layer: int, row: int, start: int, query: Tensor, mixed: Tensor, kind: torch.dtype) -> None:
        """Mix one row's tokens from position start on: `[t, H, D]`, into a tensor of the same shape."""
        cache = self._cache
        assert cache is not None, "rows are rows of a cache"
        t, D, K = query.shape[0], query.shape[2], cache.keys[layer].shape[1]
        grouped = query.view(t, K, -1, D).permute(1, 2, 0, 3)  # [K, G, t, D]
        G = grouped.shape[1]
        result = mixed.view(t, K, G, D).permute(1, 2, 0, 3)
        rows = slice(row, row + 1)
        for heads, tiles in _tiles(K, start, D, kind, converted=kind != cache.keys[layer].dtype):
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
        """A part of the cache, `[b, heads, positions, D]`; what is converted goes to one place for all layers."""
        cache = self._cache
        assert cache is not None, "rows are rows of a cache"
        held = cache.keys[layer]
        if held.dtype != kind:
            size = held[rows, heads, tile].numel()
            if self._scratch is None or self._scratch.shape[1] < size or self._scratch.dtype != kind:
                self._scratch = torch.empty(2, size, dtype=kind, device=held.device)
        return cache.read(layer, rows, heads, tile, kind, self._scratch)


def _number_kind(query: Tensor, cache: KVCache, queries: int) -> torch.dtype:
    """The dtype to attend in: float32 on a CPU for few queries, where 16-bit attention is several times slower."""
    if query.device.type != "cpu" or query.dtype not in (torch.bfloat16, torch.float16):
        return query.dtype
    if queries < _MANY or torch.compiler.is_compiling():  # which cannot ask the machine
        return torch.float32
    computes = query.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return query.dtype if computes else torch.float32


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
    if 8 * B * length * D > READ_BYTES and cache.keys[0].dtype != torch.float32:
        return [(slice(row, row + 1), stop, None) for row, _, stop in spans]
    return [(_ALL, length, mask)]


def _tiles(
    n_heads: int, length: int, head_dim: int, kind: torch.dtype, converted: bool, whole: bool = False
) -> Iterator[tuple[slice, list[slice]]]:
    """Heads, and the positions of each tile of theirs; numbers that are converted come in tiles of READ_BYTES.

    A tile of a `whole` has all positions, and so at least one head, whatever it takes.
    """
    fitting = max(1, READ_BYTES // (2 * head_dim * kind.itemsize)) if converted else max(1, n_heads * length)
    size = max(1, length) if whole else min(max(1, length), fitting)
    step = max(1, fitting // size) if converted else n_heads
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
