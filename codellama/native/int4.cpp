// Products with 4-bit weights in groups: w = (q - 8) * scale + zero, a scale and a zero for each group along K.
//
// Layout of a packed matrix: blocks of LANES outputs; in a block, group after group: LANES scales, LANES zeros (bfloat16),
// then the codes, in pieces of 8 inputs by LANES outputs. In a piece, byte i of lane n holds input i in its low nibble and
// input 4 + i in its high one. So a register is loaded, split in two, and each half meets four activations that all lanes
// share; a block is one stream in memory.
//
// Activations become signed bytes, in groups of 32 with a scale each:
//   sum of w x  =  scale * a * (sum of q xq - 8 * sum of xq)  +  zero * (sum of x)        with x = a * xq, rounded.

#include "vectors.h"

namespace {

constexpr int64_t PIECE = 4 * LANES;  // bytes for 8 inputs of a block
constexpr int64_t AHEAD = 2048;

int64_t group_bytes(int64_t group) { return LANES * 4 + group / 8 * PIECE; }

struct Term {  // of 32 activations: a, -8 * a * (sum of xq), sum of x
  float scale, offset, sum;
};

uint32_t spread(uint32_t nibbles) {  // four nibbles to four bytes
  nibbles = (nibbles | nibbles << 8) & 0x00ff00ffu;
  return (nibbles | nibbles << 4) & 0x0f0f0f0fu;
}

template <int ROWS>
void multiply(const uint8_t* block, const int8_t* codes, const Term* terms, void* out, bool bf16, int64_t n, int64_t k,
              int64_t group, int64_t first) {
  constexpr bool ASK = ROWS >= LEAST_ASKING;
  Floats sums[ROWS];
  for (int r = 0; r < ROWS; r++) sums[r] = zeros();
  const int64_t parts = k / 32;
  int64_t part = 0;
  while (part < parts) {
    if (ASK) ask_for(block + AHEAD);
    const Floats scale = load_bf16(reinterpret_cast<const uint16_t*>(block));
    const Floats zero = load_bf16(reinterpret_cast<const uint16_t*>(block) + LANES);
    block += 4 * LANES;
    for (const int64_t end = part + group / 32; part < end; part++) {
      // With few rows a second sum keeps one product from waiting for the other. Integers add up alike.
      Ints dots[ROWS], more[ROWS];
      Ints* const others = ROWS <= MOST_ROWS / 4 ? more : dots;
      for (int r = 0; r < ROWS; r++) dots[r] = more[r] = no_ints();
      for (int piece = 0; piece < 4; piece++, block += PIECE) {
        if (ASK) ask_for(block + AHEAD);
        const Ints both = load_ints(block), low = bits_and(both, all_ints(0x0f0f0f0f)), high = high_nibbles(both);
        for (int r = 0; r < ROWS; r++) {
          const Four* fours = reinterpret_cast<const Four*>(codes + (part * ROWS + r) * 32 + piece * 8);
          dots[r] = add_products(dots[r], low, all_ints(fours[0]));
          others[r] = add_products(others[r], high, all_ints(fours[1]));
        }
      }
      for (int r = 0; r < ROWS; r++) {
        const Term& term = terms[part * ROWS + r];
        if (others == more) dots[r] = add_sums(dots[r], more[r]);
        const Floats dot = times_add(to_floats(whole(dots[r])), all(term.scale), all(term.offset));
        sums[r] = times_add(scale, dot, sums[r]);
        sums[r] = times_add(zero, all(term.sum), sums[r]);
      }
    }
  }
  for (int r = 0; r < ROWS; r++) store_some(out, r * n + first, bf16, sums[r], n - first);
}

typedef void (*Multiply)(const uint8_t*, const int8_t*, const Term*, void*, bool, int64_t, int64_t, int64_t, int64_t);
constexpr Multiply MULTIPLY[] = {
    nullptr, multiply<1>, multiply<2>, multiply<3>, multiply<4>,
#if WIDE
    multiply<5>, multiply<6>, multiply<7>, multiply<8>,
#endif
};

float bf16_to_float(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

}  // namespace

EXPORT int64_t packed_int4_bytes(int64_t n, int64_t k, int64_t group) {
  return (n + LANES - 1) / LANES * (k / group) * group_bytes(group);
}

EXPORT void pack_int4(const uint8_t* codes, const uint16_t* scales, const uint16_t* zeros, uint8_t* packed, int64_t n,
                          int64_t k, int64_t group, int threads) {
  const int64_t groups = k / group, bytes = group_bytes(group);
  over_parts((n + LANES - 1) / LANES, threads, [&](int64_t start, int64_t stop) {
    memset(packed + start * groups * bytes, 0, size_t((stop - start) * groups * bytes));
    for (int64_t row = start * LANES; row < smaller(stop * LANES, n); row++) {
      const int64_t block = row / LANES, lane = row % LANES;
      for (int64_t g = 0; g < groups; g++) {
        uint8_t* to = packed + (block * groups + g) * bytes;
        memcpy(to + 2 * lane, scales + row * groups + g, 2);
        memcpy(to + 2 * (LANES + lane), zeros + row * groups + g, 2);
        const uint8_t* from = codes + (row * k + g * group) / 2;
        for (int64_t piece = 0; piece < group / 8; piece++) {
          uint32_t eight;
          memcpy(&eight, from + 4 * piece, 4);
          eight = spread(eight & 0xffff) | spread(eight >> 16) << 4;
          memcpy(to + 4 * LANES + piece * PIECE + 4 * lane, &eight, 4);
        }
      }
    }
  });
}

EXPORT void int4_linear(const void* x, int bf16, const uint8_t* packed, void* out, int64_t rows, int64_t n, int64_t k,
                            int64_t group, int threads) {
  const int64_t parts = k / 32, bytes = k / group * group_bytes(group);
  Scratch code_memory(rows * k), term_memory(rows * parts * int64_t(sizeof(Term)));
  int8_t* codes = static_cast<int8_t*>(code_memory.data);
  Term* terms = static_cast<Term*>(term_memory.data);
  for_groups(rows, parts, [&](int64_t from, int64_t to) {
    const Rounded rounded = round_group(x, from * 32, bf16, codes + to * 32);
    terms[to] = {rounded.scale, -8.0f * rounded.scale * float(rounded.code_sum), rounded.sum};
  });
  over_parts((n + LANES - 1) / LANES, threads, [&](int64_t start, int64_t stop) {
    for (int64_t block = start; block < stop; block++)
      for (int64_t row = 0; row < rows; row += MOST_ROWS) {
        char* to = static_cast<char*>(out) + row * n * (bf16 ? 2 : 4);
        MULTIPLY[smaller(rows - row, MOST_ROWS)](packed + block * bytes, codes + row * k, terms + row * parts, to, bf16, n,
                                                 k, group, block * LANES);
      }
  });
}

EXPORT void unpack_int4(const uint8_t* packed, void* out, int bf16, int64_t k, int64_t group, int64_t first,
                            int64_t last, int threads) {
  const int64_t groups = k / group, bytes = group_bytes(group);
  const int64_t from = first / LANES, to = (last + LANES - 1) / LANES;
  over_parts(to - from, threads, [&](int64_t start, int64_t stop) {
    for (int64_t block = from + start; block < from + stop; block++)
      for (int64_t g = 0; g < groups; g++) {
        const uint8_t* head = packed + (block * groups + g) * bytes;
        const uint16_t* scales = reinterpret_cast<const uint16_t*>(head);
        for (int64_t part = 0; part < group / 32; part++)
          for (int half = 0; half < LANES / 8; half++) {
            const uint8_t* piece = head + 4 * LANES + part * 4 * PIECE + half * 32;
            __m256i eight[8];
            for (int i = 0; i < 4; i++, piece += PIECE) {
              const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(piece));
              eight[2 * i] = _mm256_and_si256(both, _mm256_set1_epi8(15));
              eight[2 * i + 1] = _mm256_and_si256(_mm256_srli_epi16(both, 4), _mm256_set1_epi8(15));
            }
            transpose(eight);
            for (int lane = 0; lane < 8; lane++) {
              const int64_t row = block * LANES + half * 8 + lane;
              if (row < first || row >= last) continue;
              uint8_t codes[32];
              memcpy(codes, &eight[lane], 32);
              const Floats scale = all(bf16_to_float(scales[half * 8 + lane]));
              const Floats zero = all(bf16_to_float(scales[LANES + half * 8 + lane]));
              const int64_t at = (row - first) * k + g * group + part * 32;
              Floats weights[32 / LANES];
              for (int i = 0; i < 32 / LANES; i++) {
                const Ints centred = minus(widen_unsigned(codes + i * LANES), all_ints(8));
                weights[i] = times_add(to_floats(centred), scale, zero);
              }
              store_weights(out, at, bf16, weights);
            }
          }
      }
  });
}
