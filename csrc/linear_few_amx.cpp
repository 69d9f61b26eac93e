// Products of 3 to 16 rows of bf16 with AMX: weights are decoded bare, and sums are scaled.
//
// What a product of few rows costs is decoding W, so a weight of 4 bits costs one lookup of 32 and one store:
//
// - Codes are not widened. 64 bytes of codes, 128 weights, are 32 words of four codes; vpermw reads the lowest 5 bits
//   of a word, and its table holds the 16 values twice. So four lookups at shifts of 0, 4, 8 and 12 decode them all,
//   and lookup `place` holds columns 4 j + (place ^ 1) in lane j. Shifts are multiplications, because a shift waits for
//   vpermw's port.
// - The table holds the bare values. A tile of sums has a column for each row of x *and block*: x is laid out with
//   zeros outside of the block that a column stands for, so that 16 rows of W times 2 blocks of 8 rows of x are summed
//   side by side. The scales are applied to the sums, one multiply-add for 16 of them.
//
// Decoding a step of 128 columns is interleaved with the products of the step before: a tile load that follows the
// stores of its tile waits for each of them.
#include <utility>

#include "amx.h"
#include "scratch.h"
#include "tiles.h"

namespace halfbyte {
namespace {

constexpr int64_t kStep = 128;  // columns decoded at a time
constexpr int64_t kPlaces = 4;  // codes of a word

constexpr TileConfig kConfig;

// How the 16 columns of a tile are shared by rows of x and blocks.
struct Layout {
    int64_t rows, k, block_size;
    int64_t padded;       // columns for one block: 4, 8 or 16
    int64_t tile_blocks;  // blocks that share a tile
    int64_t tiles;        // that the blocks of a step take: 1, 2 or 4

    Layout(int64_t rows, int64_t k, int64_t block_size)
        : rows(rows),
          k(k),
          block_size(block_size),
          padded(rows <= 4 ? 4 : rows <= 8 ? 8 : 16),
          tile_blocks(kTile / padded),
          tiles(std::max<int64_t>(1, kStep / block_size / tile_blocks)) {}
    int64_t steps() const { return (k + kStep - 1) / kStep; }
    int64_t bytes() const { return steps() * kPlaces * tiles * kTileWords * 2; }
    // Steps after which every column of the tiles has had its block, and the sums are taken out and scaled.
    int64_t chunk() const { return std::max(kStep, tile_blocks * block_size) / kStep; }
};

// 128 columns of x -> the 32 that stand at `place` in their words.
inline void choose(const uint16_t *x, int64_t place, uint16_t *out) {
    for (int64_t i = 0; i < 4; ++i) {  // the high nibble of a byte comes first
        const __m512i fours = _mm512_srl_epi64(_mm512_load_si512(x + 32 * i), _mm_cvtsi64_si128(16 * (place ^ 1)));
        _mm_store_si128(reinterpret_cast<__m128i *>(out + 8 * i), _mm512_cvtepi64_epi16(fours));
    }
}

int64_t scratch_bytes(const hb_weight &w, int64_t rows, int64_t k) { return Layout(rows, k, w.block_size).bytes(); }

// x -> [step][place][tile][16 pairs of columns][16 columns of the tile][2].
void prepare(const hb_weight &w, const void *x, int, int64_t rows, int64_t k, void *scratch) {
    const Layout l(rows, k, w.block_size);
    alignas(64) uint16_t columns[kStep], chosen[2 * kTile];
    std::memset(scratch, 0, size_t(l.bytes()));
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t step = 0; step < l.steps(); ++step) {
            const int64_t some = std::min(kStep, k - step * kStep);
            if (some < kStep) std::fill(columns, columns + kStep, uint16_t(0));
            std::memcpy(columns, static_cast<const uint16_t *>(x) + row * k + step * kStep, size_t(some) * 2);
            for (int64_t place = 0; place < kPlaces; ++place) {
                choose(columns, place, chosen);
                uint16_t *const to = static_cast<uint16_t *>(scratch) + (step * kPlaces + place) * l.tiles * kTileWords;
                for (int64_t pair = 0; pair < kTile; ++pair) {
                    const int64_t block = (step * kStep + pair * 8) / l.block_size;
                    const int64_t tile = block / l.tile_blocks % l.tiles;
                    const int64_t lane = block % l.tile_blocks * l.padded + row;
                    std::memcpy(to + tile * kTileWords + pair * 32 + lane * 2, chosen + 2 * pair, 4);
                }
            }
        }
    }
}

// The intrinsics take literal numbers; these take template arguments.
template <int Tile>
inline void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
}
template <int Tile>
inline void tile_load(const void *from) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(kRowBytes), "i"(Tile) : "memory");
}
template <int Tile>
inline void tile_store(void *to) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(kRowBytes), "i"(Tile) : "memory");
}
template <int Sum, int A, int B>
inline void tile_product() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(A), "i"(B));
}

template <class Body, int... I>
inline void unroll(Body body, std::integer_sequence<int, I...>) {
    (body(std::integral_constant<int, I>()), ...);
}
template <int Count, class Body>
inline void unroll(Body body) {
    unroll(body, std::make_integer_sequence<int, Count>());
}

inline __m512i shift_right(__m512i words, int count) {
    return _mm512_mulhi_epu16(words, _mm512_set1_epi16(short(1 << (16 - count))));
}

// Groups: of 16 rows of W that share x. Tiles: of x, in a step. Four sums: the unit is pipelined and wants as many.
template <int Groups, int Tiles>
struct Product {
    static constexpr int kRows = Groups * kTile;
    static constexpr int kSums = Groups * Tiles;
    static_assert(kSums == 4);
    // From the tiles of one place to those of the next. A load waits for an earlier store to the same offset in a page:
    // places begin on a page, and loads and stores of a moment go to different tiles (see multiply) or, where there are
    // but one or two of those, to buffers half a page apart.
    static constexpr int64_t kPlace = 4 * kTileWords;

    alignas(64) uint16_t weights[2][kPlaces * kPlace + (Groups <= 2 ? kPlace / 2 : 0)];  // [place][group][16 rows][32]
    alignas(64) float sums[2][kSums * kSum];                                             // [group][tile][16 rows][16]
    const uint8_t *codes[kRows];                                                         // of each row

    // Decodes 4 rows of a group's step.
    void decode(int64_t step, __mmask16 some, __m512i table, int group, int quarter) {
        uint16_t *out = weights[step & 1] + group * kTileWords + quarter * 4 * 32;
        for (int row = quarter * 4; row < quarter * 4 + 4; ++row, out += 32) {
            const __m512i words = _mm512_maskz_loadu_epi32(some, codes[group * kTile + row] + step * (kStep / 2));
            _mm512_store_si512(out, _mm512_permutexvar_epi16(words, table));
            _mm512_store_si512(out + kPlace, _mm512_permutexvar_epi16(shift_right(words, 4), table));
            _mm512_store_si512(out + 2 * kPlace, _mm512_permutexvar_epi16(shift_right(words, 8), table));
            _mm512_store_si512(out + 3 * kPlace, _mm512_permutexvar_epi16(shift_right(words, 12), table));
        }
    }

    // The sums in tiles 0 to 3 += the products of a step. In between, the next step is decoded where `Decode`.
    template <bool Decode>
    void multiply(int64_t step, __mmask16 some, __m512i table, const uint16_t *x) {
        const uint16_t *const from = weights[step & 1];
        unroll<kPlaces>([&](auto place) {
            unroll<Groups>([&](auto group) {
                constexpr int kW = 6 + (place * Groups + group) % 2;
                if (Decode) decode(step + 1, some, table, (group + Groups - 1) % Groups, place);
                tile_load<kW>(from + place * kPlace + group * kTileWords);
                unroll<Tiles>([&](auto tile) {
                    constexpr int kX = Tiles == 1 ? 4 + place % 2 : 4 + tile % 2;
                    if (group == 0) tile_load<kX>(x + (place * Tiles + tile) * kTileWords);
                    tile_product<group * Tiles + tile, kW, kX>();
                });
            });
        });
    }

    // totals [row][16] += the sums, each column times the scale of its block. `scales` [row][stride] begin with the
    // first block of the sums.
    static void add_scaled(const float *sums, const Layout &l, const float *scales, int64_t stride,
                           __m512i block_of_lane, float *totals) {
        for (int64_t row = 0; row < kRows; ++row) {
            __m512 total = _mm512_load_ps(totals + row * kTile);
            for (int64_t tile = 0; tile < Tiles; ++tile) {
                const float *const sum = sums + ((row / kTile * Tiles + tile) * kTile + row % kTile) * kTile;
                const __m512 some = _mm512_loadu_ps(scales + row * stride + tile * l.tile_blocks);
                const __m512 scale = _mm512_permutexvar_ps(block_of_lane, some);
                total = _mm512_fmadd_ps(_mm512_load_ps(sum), scale, total);
            }
            _mm512_store_ps(totals + row * kTile, total);
        }
    }
};

// totals of 16 rows of W -> out[:, column .. last), after the columns of a row's blocks are added up.
inline void write_rows(float *totals, const Layout &l, int64_t n, const uint16_t *bias, uint16_t *out, int64_t column,
                       int64_t last) {
    if (column >= last) return;
    const __mmask16 some = __mmask16((1u << std::min(kTile, last - column)) - 1);
    for (int64_t row = 0; row < kTile; ++row) {
        __m512 sum = _mm512_load_ps(totals + row * kTile);
        if (l.padded <= 8) sum = _mm512_add_ps(sum, _mm512_shuffle_f32x4(sum, sum, 0x4e));
        if (l.padded <= 4) sum = _mm512_add_ps(sum, _mm512_shuffle_f32x4(sum, sum, 0xb1));
        _mm512_store_ps(totals + row * kTile, sum);
    }
    __m512 shift = _mm512_setzero_ps();
    if (bias) {
        const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, bias + column));
        shift = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    }
    const __m512i rows = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                            _mm512_set1_epi32(int(kTile)));
    for (int64_t row = 0; row < l.rows; ++row) {
        const __m512 y = _mm512_add_ps(_mm512_i32gather_ps(rows, totals + row, 4), shift);
        _mm256_mask_storeu_epi16(out + row * n + column, some, (__m256i)_mm512_cvtneps_pbh(y));
    }
}

template <int Groups, int Tiles>
bool run_product(const hb_weight &w, int64_t n, const Layout &l, const uint16_t *x, const uint16_t *bias, uint16_t *out,
                 int64_t first, int64_t last) {
    using P = Product<Groups, Tiles>;
    // Scales are read 16 at a time, past the row's end too; those are zero.
    const int64_t blocks = l.k / w.block_size, stride = (blocks + kTile - 1) / kTile * kTile + kTile;
    const Scratch memory(int64_t(sizeof(P)) + P::kRows * (stride + kTile) * int64_t(sizeof(float)));
    if (!memory.data()) return false;
    P &product = *static_cast<P *>(memory.data());
    float *const totals = reinterpret_cast<float *>(&product + 1), *const scales = totals + P::kRows * kTile;
    std::fill(scales, scales + P::kRows * stride, 0.0f);

    const __m512i table = full_table(_mm512_load_ps(kCodebooks[w.format].values), 1.0f);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i block_of_lane = _mm512_srl_epi32(lanes, _mm_cvtsi32_si128(__builtin_ctz(unsigned(l.padded))));
    const int64_t steps = l.steps(), chunk = l.chunk();
    const auto mask = [&](int64_t step) { return __mmask16(step + 1 == steps && l.k % kStep ? 0x00ff : 0xffff); };

    for (int64_t column = first; column < last; column += P::kRows) {
        for (int64_t r = 0; r < P::kRows; ++r) {  // rows past the end repeat the last one and are not written
            const int64_t row = std::min(column + r, last - 1);
            product.codes[r] = w.codes + row * l.k / 2;
            decode_scales(w, row * blocks, blocks, scales + r * stride);
        }
        std::fill(totals, totals + P::kRows * kTile, 0.0f);
        for (int i = 0; i < Groups * 4; ++i) product.decode(0, mask(0), table, i / 4, i % 4);
        // Sums are scaled while the next ones are made: what a tile store has just written cannot be read at once.
        int64_t stored = 0, block = 0;
        const auto add_scaled = [&] {
            P::add_scaled(product.sums[stored & 1], l, scales + block, stride, block_of_lane, totals);
        };
        for (int64_t begin = 0; begin < steps; begin += chunk) {
            unroll<P::kSums>([](auto sum) { tile_zero<sum>(); });
            for (int64_t step = begin; step < std::min(begin + chunk, steps); ++step) {
                const uint16_t *const from = x + step * kPlaces * Tiles * kTileWords;
                if (step + 1 < steps) {
                    product.template multiply<true>(step, mask(step + 1), table, from);
                } else {
                    product.template multiply<false>(step, 0, table, from);
                }
            }
            float *const sums = product.sums[(stored + 1) & 1];
            unroll<P::kSums>([=](auto sum) { tile_store<sum>(sums + sum * kSum); });
            if (stored) add_scaled();
            ++stored, block = begin * kStep / w.block_size;
        }
        add_scaled();
        for (int64_t group = 0; group < Groups; ++group) {
            write_rows(totals + group * kSum, l, n, bias, out, column + group * kTile, last);
        }
    }
    return true;
}

bool run(const hb_weight &w, int64_t n, int64_t k, const void *scratch, int64_t rows, int, const void *bias, void *out,
         int64_t first, int64_t last) {
    const Layout l(rows, k, w.block_size);
    const auto product = l.tiles == 1 ? run_product<4, 1> : l.tiles == 2 ? run_product<2, 2> : run_product<1, 4>;
    _tile_loadconfig(&kConfig);
    const bool done = product(w, n, l, static_cast<const uint16_t *>(scratch), static_cast<const uint16_t *>(bias),
                              static_cast<uint16_t *>(out), first, last);
    _tile_release();
    return done;
}

}  // namespace

const Linear linear_few_amx = {scratch_bytes, prepare, run};

}  // namespace halfbyte
