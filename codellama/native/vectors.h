// Vectors of one register, spelled once for AVX-512 with VNNI and for AVX2: what the kernels share.
//
// Which of the two is decided by the flags of the build. Every arithmetic step is written out, and the build forbids the
// compiler to contract a product and a sum, so a row's bits depend on neither the number of rows nor that of threads.

#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

// OpenMP's entry points, which the PyTorch in this process has already loaded. Calling them by name instead of compiling
// with -fopenmp leaves the library without a runtime of its own, so that there are never two.
extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
extern "C" int omp_get_thread_num(void);
extern "C" int omp_get_num_threads(void);

#define EXPORT extern "C" __attribute__((visibility("default")))

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Have memory brought near before it is needed: across the end of a page, where the CPU does not look by itself.
// The work of a few rows is so short that the CPU's own look ahead keeps up, and asking only disturbs it.
constexpr int LEAST_ASKING = 4;
static inline void ask_for(const void* place) { _mm_prefetch(static_cast<const char*>(place), _MM_HINT_T0); }

// Call body(start, stop) on every thread, for equal parts of [0, count).
template <typename Body>
static void over_parts(int64_t count, int threads, const Body& body) {
  if (threads <= 1 || count <= 1) return body(0, count);
  struct Work {
    const Body* body;
    int64_t count;
  } work{&body, count};
  GOMP_parallel(
      [](void* data) {
        const Work& work = *static_cast<Work*>(data);
        const int64_t parts = omp_get_num_threads(), part = omp_get_thread_num();
        const int64_t start = work.count * part / parts, stop = work.count * (part + 1) / parts;
        if (start < stop) (*work.body)(start, stop);
      },
      &work, unsigned(smaller(threads, count)), 0);
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define WIDE 1
#else
#define WIDE 0
#endif

#if WIDE
constexpr int LANES = 16;
constexpr int MOST_ROWS = 8;  // rows of activations that fit the registers beside the rest
typedef __m512 Floats;
typedef __m512i Ints;

static inline Floats zeros() { return _mm512_setzero_ps(); }
static inline Floats all(float value) { return _mm512_set1_ps(value); }
static inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
static inline void store(float* to, Floats value) { _mm512_storeu_ps(to, value); }
static inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
static inline Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
static inline Floats times_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
static inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
static inline Floats magnitude(Floats a) { return _mm512_abs_ps(a); }
static inline float largest(Floats a) { return _mm512_reduce_max_ps(a); }
static inline Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
static inline Ints to_ints(Floats a) { return _mm512_cvtps_epi32(a); }
static inline Ints load_ints(const void* from) { return _mm512_loadu_si512(from); }
static inline Ints all_ints(int value) { return _mm512_set1_epi32(value); }
static inline Ints no_ints() { return _mm512_setzero_si512(); }
static inline Ints bits_and(Ints a, Ints b) { return _mm512_and_si512(a, b); }
static inline Ints high_nibbles(Ints a) { return bits_and(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15)); }
static inline Ints plus(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
static inline Ints minus(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
static inline Ints widen_unsigned(const uint8_t* from) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
static inline Ints widen_signed(const int8_t* from) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
static inline void store_bytes(int8_t* to, Ints value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtsepi32_epi8(value));
}
static inline Floats load_bf16(const uint16_t* from) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
static inline Floats load_fp16(const uint16_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
static inline void store_bf16(uint16_t* to, Floats value) {  // nearest, ties to even; a NaN stays one
  const Ints bits = _mm512_castps_si512(value);
  const Ints odd = bits_and(_mm512_srli_epi32(bits, 16), all_ints(1));
  const Ints rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, all_ints(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const Ints clean = _mm512_mask_mov_epi32(rounded, nan, all_ints(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(clean));
}
// Add to each lane four products of unsigned bytes a (at most 15) and signed bytes b; lanes are whole after `whole`.
static inline Ints add_products(Ints sum, Ints a, Ints b) { return _mm512_dpbusd_epi32(sum, a, b); }
static inline Ints add_sums(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
static inline Ints whole(Ints sum) { return sum; }
#else
constexpr int LANES = 8;
constexpr int MOST_ROWS = 4;
typedef __m256 Floats;
typedef __m256i Ints;

static inline Floats zeros() { return _mm256_setzero_ps(); }
static inline Floats all(float value) { return _mm256_set1_ps(value); }
static inline Floats load(const float* from) { return _mm256_loadu_ps(from); }
static inline void store(float* to, Floats value) { _mm256_storeu_ps(to, value); }
static inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
static inline Floats times(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
static inline Floats times_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
static inline Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
static inline Floats magnitude(Floats a) { return _mm256_andnot_ps(all(-0.0f), a); }
static inline float largest(Floats a) {
  float lanes[LANES];
  store(lanes, a);
  for (int i = 1; i < LANES; i++) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
  return lanes[0];
}
static inline Floats to_floats(Ints a) { return _mm256_cvtepi32_ps(a); }
static inline Ints to_ints(Floats a) { return _mm256_cvtps_epi32(a); }
static inline Ints load_ints(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
static inline Ints all_ints(int value) { return _mm256_set1_epi32(value); }
static inline Ints no_ints() { return _mm256_setzero_si256(); }
static inline Ints bits_and(Ints a, Ints b) { return _mm256_and_si256(a, b); }
static inline Ints high_nibbles(Ints a) { return bits_and(_mm256_srli_epi16(a, 4), _mm256_set1_epi8(15)); }
static inline Ints plus(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
static inline Ints minus(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
static inline Ints widen_unsigned(const uint8_t* from) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
static inline Ints widen_signed(const int8_t* from) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
static inline __m128i narrow(Ints value) {  // to eight 16-bit integers, as they stand in the low halves
  const __m256i packed = _mm256_packus_epi32(value, value);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 8));
}
static inline void store_bytes(int8_t* to, Ints value) {
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(value, value), 8);
  const __m128i half = _mm256_castsi256_si128(packed);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(half, half));
}
static inline Floats load_bf16(const uint16_t* from) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
static inline Floats load_fp16(const uint16_t* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
static inline void store_bf16(uint16_t* to, Floats value) {  // nearest, ties to even; a NaN stays one
  const Ints bits = _mm256_castps_si256(value);
  const Ints odd = bits_and(_mm256_srli_epi32(bits, 16), all_ints(1));
  const Ints rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, all_ints(0x7fff))), 16);
  const Ints nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), narrow(_mm256_blendv_epi8(rounded, all_ints(0x7fc0), nan)));
}
// The sums are of 16 bits until `whole`: eight times two products of at most 15 · 128 fit.
static inline Ints add_products(Ints sum, Ints a, Ints b) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b)); }
static inline Ints add_sums(Ints a, Ints b) { return _mm256_add_epi16(a, b); }
static inline Ints whole(Ints sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
#endif

static inline float total(Floats a) {  // in a fixed order
  float lanes[LANES];
  store(lanes, a);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
  return lanes[0];
}

// Activations and results are float32 or bfloat16; this says which at run time.
static inline Floats load_as(const void* from, int64_t at, bool bf16) {
  return bf16 ? load_bf16(static_cast<const uint16_t*>(from) + at) : load(static_cast<const float*>(from) + at);
}
static inline void store_as(void* to, int64_t at, bool bf16, Floats value) {
  if (bf16) store_bf16(static_cast<uint16_t*>(to) + at, value);
  else store(static_cast<float*>(to) + at, value);
}
static inline void store_some(void* to, int64_t at, bool bf16, Floats value, int64_t count) {
  if (count >= LANES) return store_as(to, at, bf16, value);
  float lanes[LANES];
  store_as(lanes, 0, bf16, value);
  const int64_t size = bf16 ? 2 : 4;
  memcpy(static_cast<char*>(to) + at * size, lanes, size_t(count * size));
}

// Store 32 finite weights. In bfloat16, those below 1e-38 may become zero: that is what the instruction for it does.
static inline void store_weights(void* to, int64_t at, bool bf16, const Floats weights[32 / LANES]) {
#if WIDE && defined(__AVX512BF16__)
  if (bf16) {
    const __m512bh both = _mm512_cvtne2ps_pbh(weights[1], weights[0]);
    memcpy(static_cast<uint16_t*>(to) + at, &both, 64);
    return;
  }
#endif
  for (int i = 0; i < 32 / LANES; i++) store_as(to, at + i * LANES, bf16, weights[i]);
}

// Memory of a call, aligned to a cache line.
struct Scratch {
  void* data;
  explicit Scratch(int64_t bytes) : data(aligned_alloc(64, size_t((bytes + 127) / 64 * 64))) {
    if (!data) abort();
  }
  ~Scratch() { free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

// The scale of 32 activations that become signed bytes, and their sum. A NaN or an infinity makes the scale a NaN, so
// that it is seen in the result.
struct Rounded {
  float scale, sum;
  int32_t code_sum;
};
static inline Rounded round_group(const void* x, int64_t at, bool bf16, int8_t* to) {
  Floats values[32 / LANES], most = zeros(), sum = zeros();
  for (int i = 0; i < 32 / LANES; i++) {
    values[i] = load_as(x, at + i * LANES, bf16);
    most = larger(most, magnitude(values[i]));
    sum = add(sum, values[i]);
  }
  const float top = largest(most), added = total(sum), inverse = top > 0 ? 127.0f / top : 0.0f;
  for (int i = 0; i < 32 / LANES; i++) store_bytes(to + i * LANES, to_ints(times(values[i], all(inverse))));
  int32_t code_sum = 0;
  for (int i = 0; i < 32; i++) code_sum += to[i];
  return {top / 127.0f + added * 0.0f, added, code_sum};
}

// Call body(from, to) for each group of 32 activations: its place among the rows, and its place where rows that are
// multiplied together stand together, a group of each row and then the next group of each.
template <typename Body>
static void for_groups(int64_t rows, int64_t parts, const Body& body) {
  for (int64_t head = 0; head < rows; head += MOST_ROWS) {
    const int64_t beside = smaller(rows - head, MOST_ROWS);
    for (int64_t r = 0; r < beside; r++)
      for (int64_t part = 0; part < parts; part++) body((head + r) * parts + part, head * parts + part * beside + r);
  }
}

typedef int32_t Four __attribute__((may_alias, aligned(4)));  // four activations, for all lanes

// Eight registers of eight 32-bit lanes, transposed.
static inline void transpose(__m256i a[8]) {
  __m256i b[8];
  for (int i = 0; i < 4; i++) {
    b[2 * i] = _mm256_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm256_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 2; j++) {
      a[4 * i + 2 * j] = _mm256_unpacklo_epi64(b[4 * i + j], b[4 * i + j + 2]);
      a[4 * i + 2 * j + 1] = _mm256_unpackhi_epi64(b[4 * i + j], b[4 * i + j + 2]);
    }
  for (int i = 0; i < 4; i++) {
    b[i] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x20);
    b[i + 4] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x31);
  }
  memcpy(a, b, sizeof(b));
}
