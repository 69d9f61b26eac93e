// One AdamW step of one range of one tensor, for any instruction set. See scalar.h for the unnamed namespace.
//
// A block of 256 elements (128 of 4-bit codes) goes through five stages whose arrays stay in the first-level cache: load the
// gradient, decode both moments, update, encode both moments, store the parameter. Each byte of memory is read once and
// written once. The arithmetic is that of kernels/reference/adamw.py, rounding by rounding, so that every instruction
// set gives the same bits; a last vector that is not full is padded with zeros, which change no maximum.
//
// Lanes is the instruction set: `width` floats F and as many integers I.
#pragma once

#include "adamw_nibbles.h"
#include "optimizer.h"
#include "scalar.h"

namespace halfbyte {
namespace {

// How far ahead memory is asked for, in elements. The hardware's prefetch stops at the end of a page, which holds 1,024
// floats, and starts again with the first miss in the next one; with several streams and this much arithmetic between
// their lines nothing hides those misses. Addresses behind a tensor's end may be asked for: nothing is read.
constexpr int64_t kAhead = 512;

// A random 32-bit number for element i of a tensor in a step: a hash of a counter, so that it depends on nothing else.
// The two multipliers are those of lowbias32 (Chris Wellons), the first one is 2^32 divided by the golden ratio.
constexpr uint32_t kHash1 = 0x9e3779b1, kHash2 = 0x7feb352d, kHash3 = 0x846ca68b;

// What a stage works on; padded to whole vectors of any width.
struct Buffers {
    alignas(64) float param[kAdamWBlock], grad[kAdamWBlock];
    struct Moments {
        alignas(64) float first[kAdamWBlock], second[kAdamWBlock];
    } moments[2];
    alignas(64) float scale[kAdamWBlock];
    alignas(64) uint8_t codes[kAdamWBlock];
};

template <class Lanes>
struct AdamWStep {
    using F = typename Lanes::F;
    using I = typename Lanes::I;
    static constexpr int64_t kWidth = Lanes::width;
    using Nibbles = FourBits<Lanes>;

    static int64_t padded(int64_t count) { return (count + kWidth - 1) / kWidth * kWidth; }

    // x [count] of `dtype` as floats: where they lie when nothing has to be converted or padded, else in `buffer`.
    static const float *floats(const void *x, int dtype, int64_t at, int64_t count, float *buffer) {
        if (dtype == HB_FLOAT32) {
            const float *source = static_cast<const float *>(x) + at;
            if (count % kWidth == 0) return source;
            std::memcpy(buffer, source, size_t(count) * 4);
        } else {
            const uint16_t *source = static_cast<const uint16_t *>(x) + at;
            int64_t i = 0;
            for (; i + kWidth <= count; i += kWidth) Lanes::store(buffer + i, Lanes::load_bf16(source + i));
            if (count % kWidth == 0) return buffer;
            for (; i < count; ++i) buffer[i] = to_float(bfloat16{source[i]});
        }
        for (int64_t i = count; i < padded(count); ++i) buffer[i] = 0;
        return buffer;
    }

    // The numbers of a step, each in a register: where they lie they would be read again for every vector, since a store
    // of codes may have changed them as far as the compiler knows.
    struct Numbers {
        F grad_scale, beta1, weight1, beta2, weight2, eps, correction2, inverse2, step_size, decay;
        bool near;  // the first moment moves less than half of the way to the gradient

        explicit Numbers(const hb_adamw_options &o)
            : grad_scale(Lanes::set(o.grad_scale)), beta1(Lanes::set(o.beta1)), weight1(Lanes::set(o.weight1)),
              beta2(Lanes::set(o.beta2)), weight2(Lanes::set(o.weight2)), eps(Lanes::set(o.eps)),
              correction2(Lanes::set(o.correction2)), inverse2(Lanes::set(o.inverse2)),
              step_size(Lanes::set(o.step_size)), decay(Lanes::set(o.decay)), near(o.weight1 < 0.5f) {}
    };

    // The second moment's update, alone because 4-bit states need it twice.
    static F second(const Numbers &o, F moment2, F grad) {
        return Lanes::fma(Lanes::mul(grad, o.weight2), grad, Lanes::mul(moment2, o.beta2));
    }

    // Both moments and the parameter of one vector. kLerp: the first moment as torch's fused AdamW computes it
    // (m + (1 - beta1)(g - m)); otherwise as bitsandbytes does (beta1 m + (1 - beta1) g), and without a second division.
    template <bool kLerp>
    static F update(const Numbers &o, F param, F grad, F &moment1, F &moment2) {
        grad = Lanes::mul(grad, o.grad_scale);
        if (!kLerp) {
            moment1 = Lanes::fma(grad, o.weight1, Lanes::mul(moment1, o.beta1));
        } else if (o.near) {
            moment1 = Lanes::fma(o.weight1, Lanes::sub(grad, moment1), moment1);
        } else {
            moment1 = Lanes::fma(Lanes::sub(o.weight1, Lanes::set(1)), Lanes::sub(grad, moment1), grad);
        }
        moment2 = second(o, moment2, grad);
        const F root = kLerp ? Lanes::div(Lanes::sqrt(moment2), o.correction2)
                             : Lanes::mul(Lanes::sqrt(moment2), o.inverse2);
        const F step = Lanes::div(Lanes::mul(o.step_size, moment1), Lanes::add(root, o.eps));
        return Lanes::add(Lanes::mul(param, o.decay), step);
    }

    // Moments that are read where they lie, and moments that are decoded as they are needed: while the divider works on
    // one vector, the lookups of the next ones go on beside it.
    struct Stored {
        const float *moment1, *moment2;
        F first(int64_t i) const { return Lanes::load(moment1 + i); }
        F second(int64_t i) const { return Lanes::load(moment2 + i); }
        void ask_ahead(int64_t i) const {
            __builtin_prefetch(moment1 + i + kAhead, 1);
            __builtin_prefetch(moment2 + i + kAhead, 1);
        }
    };
    struct Coded {
        const uint8_t *codes1, *codes2;
        F absmax1, absmax2;
        void ask_ahead(int64_t i) const {
            if (i % 64) return;  // a line of codes
            __builtin_prefetch(codes1 + i + kAhead, 1);
            __builtin_prefetch(codes2 + i + kAhead, 1);
        }
        F first(int64_t i) const {
            return Lanes::mul(Lanes::gather(kScaleTable8, Lanes::load_bytes(codes1 + i)), absmax1);
        }
        F second(int64_t i) const {
            return Lanes::mul(Lanes::gather(kUnsignedDynamic, Lanes::load_bytes(codes2 + i)), absmax2);
        }
    };

    // A whole block of new moments whose codes are still to be written. That is done beside the update of the next
    // block, for the same reason.
    struct Pending {
        const float *moment1, *moment2;
        F factor1, factor2;
        uint8_t *codes1, *codes2;
        const int32_t *buckets1, *buckets2;
        void operator()(int64_t i) const {
            const F first = Lanes::mul(Lanes::load(moment1 + i), factor1);
            const F second = Lanes::mul(Lanes::load(moment2 + i), factor2);
            Lanes::store_bytes(codes1 + i, nearest<true>(buckets1, first));
            Lanes::store_bytes(codes2 + i, nearest<false>(buckets2, second));
        }
    };
    struct Nothing {
        void operator()(int64_t) const {}
    };

    // param, grad, moments [count, padded] -> the same; returns the largest magnitudes. `beside` is called for each
    // vector.
    template <bool kLerp, class Moments, class Beside = Nothing>
    static void update_all(const Numbers &o, int64_t count, const float *param, const float *grad,
                           const Moments &moments, float *param_out, float *moment1, float *moment2, float *largest1,
                           float *largest2, const Beside &beside = {}) {
        F most1 = Lanes::set(0), most2 = Lanes::set(0);
        for (int64_t i = 0; i < count; i += kWidth) {
            F m = moments.first(i), v = moments.second(i);
            const F p = update<kLerp>(o, Lanes::load(param + i), Lanes::load(grad + i), m, v);
            Lanes::store(param_out + i, p);
            Lanes::store(moment1 + i, m);
            Lanes::store(moment2 + i, v);
            most1 = Lanes::max(most1, Lanes::abs(m));
            most2 = Lanes::max(most2, v);
            __builtin_prefetch(param + i + kAhead, 1);
            __builtin_prefetch(grad + i + kAhead);
            moments.ask_ahead(i);
            beside(i);
        }
        *largest1 = Lanes::largest(most1);
        *largest2 = Lanes::largest(most2);
    }

    // codes [count] of an 8-bit map -> floats [count, padded].
    static void decode8(const uint8_t *codes, const float *map, float absmax, int64_t count, float *out) {
        const F scale = Lanes::set(absmax);
        int64_t i = 0;
        for (; i + kWidth <= count; i += kWidth) {
            Lanes::store(out + i, Lanes::mul(Lanes::gather(map, Lanes::load_bytes(codes + i)), scale));
        }
        for (; i < count; ++i) out[i] = map[codes[i]] * absmax;
        for (; i % kWidth; ++i) out[i] = 0;
    }

    // x [count, padded] / absmax -> the nearest codes, of a block that is not whole: formats/blockwise.py says why it
    // is divided where a whole block (Pending) multiplies by the reciprocal.
    template <bool kSigned>
    static void encode8(const float *x, float absmax, int64_t count, uint8_t *codes) {
        const int32_t *buckets = kSigned ? signed_buckets() : unsigned_buckets();
        alignas(64) uint8_t last[kWidth];
        for (int64_t i = 0; i < count; i += kWidth) {
            Lanes::store_bytes(last, nearest<kSigned>(buckets, Lanes::div(Lanes::load(x + i), Lanes::set(absmax))));
            std::memcpy(codes + i, last, size_t(std::min(kWidth, count - i)));
        }
    }

    // The code of the nearest entry of a dynamic map; a tie goes to the lower value. See signed_buckets().
    template <bool kSigned>
    static I nearest(const int32_t *buckets, F x) {
        const I key = kSigned ? Lanes::ordered(x) : Lanes::as_integers(x);
        const I bucket = Lanes::template shift_right<kSigned ? kSignedShift : kUnsignedShift>(key);
        return Lanes::template shift_right<24>(Lanes::addi(Lanes::gather(buckets, bucket), key));
    }

    // The updated parameters of elements [at, at + count), from `updated` to where they live.
    static void store_param(const hb_adamw_tensor &t, const float *updated, int64_t at, int64_t count) {
        if (t.master) {
            std::memcpy(t.master + at, updated, size_t(count) * 4);
            bfloat16 *target = static_cast<bfloat16 *>(t.param) + at;
            for (int64_t i = 0; i < count; ++i) store(target + i, updated[i]);
        } else if (t.param_dtype == HB_FLOAT32) {
            float *target = static_cast<float *>(t.param) + at;
            if (target != updated) std::memcpy(target, updated, size_t(count) * 4);
        } else {
            round_stochastically(t, updated, at, count);
        }
    }

    // float -> bfloat16, up with the probability of the fraction that is cut off. A number that is not finite, or that
    // rounding up would make infinite, is cut.
    static void round_stochastically(const hb_adamw_tensor &t, const float *x, int64_t at, int64_t count) {
        uint16_t *target = static_cast<uint16_t *>(t.param) + at;
        for (int64_t i = 0; i < count; ++i) {
            uint32_t hash = (uint32_t(t.first + at + i) * kHash1) ^ t.key[0];
            hash = (hash ^ hash >> 16) * kHash2;
            hash = (hash ^ hash >> 15 ^ t.key[1]) * kHash3;
            const uint32_t bits = bits_of(x[i]), magnitude = bits & 0x7fffffff;
            const uint32_t noise = magnitude >= 0x7f7f0000 ? 0 : hash >> 16;
            target[i] = uint16_t((bits + noise) >> 16);
        }
    }

    static const float *params(const hb_adamw_tensor &t, int64_t at, int64_t count, float *buffer) {
        if (t.master) return floats(t.master, HB_FLOAT32, at, count, buffer);
        return floats(t.param, t.param_dtype, at, count, buffer);
    }

    // Where an update may be written at once: in place, unless it has to be rounded or the last vector is padded.
    static float *param_target(const hb_adamw_tensor &t, int64_t at, int64_t count, float *buffer) {
        const bool direct = !t.master && t.param_dtype == HB_FLOAT32 && count % kWidth == 0;
        return direct ? static_cast<float *>(t.param) + at : buffer;
    }

    static void block_float(const hb_adamw_tensor &t, const Numbers &numbers, int64_t at, int64_t count, Buffers &b) {
        float *const m = static_cast<float *>(t.state1) + at, *const v = static_cast<float *>(t.state2) + at;
        Buffers::Moments &moments = b.moments[0];
        const bool direct = count % kWidth == 0;
        float *const target = param_target(t, at, count, b.param), unused1, unused2;
        const Stored stored{floats(m, HB_FLOAT32, 0, count, moments.first),
                            floats(v, HB_FLOAT32, 0, count, moments.second)};
        update_all<true>(numbers, count, params(t, at, count, b.param),
                         floats(t.grad, t.grad_dtype, at, count, b.grad), stored, target,
                         direct ? m : moments.first, direct ? v : moments.second, &unused1, &unused2);
        if (!direct) {
            std::memcpy(m, moments.first, size_t(count) * 4);
            std::memcpy(v, moments.second, size_t(count) * 4);
        }
        store_param(t, target, at, count);
    }

    // A whole block but for its codes: those are returned.
    template <class Beside>
    static Pending block8(const hb_adamw_tensor &t, const Numbers &numbers, int64_t at, Buffers &b,
                          Buffers::Moments &next, const Beside &beside) {
        uint8_t *const codes1 = static_cast<uint8_t *>(t.state1) + at;
        uint8_t *const codes2 = static_cast<uint8_t *>(t.state2) + at;
        float &absmax1 = t.scale1[at / kAdamWBlock], &absmax2 = t.scale2[at / kAdamWBlock];
        float *const target = param_target(t, at, kAdamWBlock, b.param);
        const Coded coded{codes1, codes2, Lanes::set(absmax1), Lanes::set(absmax2)};
        update_all<false>(numbers, kAdamWBlock, params(t, at, kAdamWBlock, b.param),
                          floats(t.grad, t.grad_dtype, at, kAdamWBlock, b.grad), coded, target, next.first,
                          next.second, &absmax1, &absmax2, beside);
        store_param(t, target, at, kAdamWBlock);
        return Pending{next.first,
                       next.second,
                       Lanes::set(1.0f / std::max(absmax1, kTiny)),
                       Lanes::set(1.0f / std::max(absmax2, kTiny)),
                       codes1,
                       codes2,
                       signed_buckets(),
                       unsigned_buckets()};
    }

    // The last block of a tensor, when it is not whole.
    static void part8(const hb_adamw_tensor &t, const Numbers &numbers, int64_t at, int64_t count, Buffers &b) {
        uint8_t *const codes1 = static_cast<uint8_t *>(t.state1) + at;
        uint8_t *const codes2 = static_cast<uint8_t *>(t.state2) + at;
        float &absmax1 = t.scale1[at / kAdamWBlock], &absmax2 = t.scale2[at / kAdamWBlock];
        float *const target = param_target(t, at, count, b.param);
        float *const m = b.moments[0].first, *const v = b.moments[0].second;
        decode8(codes1, kScaleTable8, absmax1, count, m);
        decode8(codes2, kUnsignedDynamic, absmax2, count, v);
        update_all<false>(numbers, count, params(t, at, count, b.param),
                          floats(t.grad, t.grad_dtype, at, count, b.grad), Stored{m, v}, target, m, v, &absmax1,
                          &absmax2);
        absmax1 = std::max(absmax1, kTiny);
        absmax2 = std::max(absmax2, kTiny);
        encode8<true>(m, absmax1, count, codes1);
        encode8<false>(v, absmax2, count, codes2);
        store_param(t, target, at, count);
    }

    static void range8(const hb_adamw_tensor &t, const Numbers &numbers, int64_t at, int64_t count, Buffers &b) {
        const int64_t end = at + count, part = end - count % kAdamWBlock;
        if (at < part) {
            Pending pending = block8(t, numbers, at, b, b.moments[0], Nothing{});
            for (int turn = 1; (at += kAdamWBlock) < part; turn ^= 1) {
                pending = block8(t, numbers, at, b, b.moments[turn], pending);
            }
            for (int64_t i = 0; i < kAdamWBlock; i += kWidth) pending(i);
        }
        if (part < end) part8(t, numbers, part, end - part, b);
    }

    static void fill(float value, int64_t count, float *out) {
        for (int64_t i = 0; i < padded(count); ++i) out[i] = value;
    }

    // Calls segment(row, column, index, length) for the pieces of rows that elements [at, at + count) consist of.
    template <class Segment>
    static void for_each_row(int64_t columns, int64_t at, int64_t count, Segment segment) {
        for (int64_t i = 0; i < count;) {
            const int64_t row = (at + i) / columns, column = (at + i) % columns;
            const int64_t length = std::min(columns - column, count - i);
            segment(row, column, i, length);
            i += length;
        }
    }

    // The scales of second moments [at, at + count): the smaller of row's and column's, or the block's.
    template <class Scale>
    static void second_scales(const hb_adamw_tensor &t, const Scale *rows, const Scale *columns, int64_t at,
                              int64_t count, float *out) {
        fill(0, count, out);
        for_each_row(t.columns, at, count, [=](int64_t row, int64_t column, int64_t i, int64_t length) {
            const float of_row = as_float(rows[row]);
            for (int64_t k = 0; k < length; ++k) out[i + k] = std::min(of_row, as_float(columns[column + k]));
        });
    }
    static float as_float(float x) { return x; }
    static float as_float(uint32_t x) { return float_of(x); }

    // Second moments [at, at + count) as they are stored -> b.moments[0].second, by way of b.scale and b.codes.
    static void decode_second4(const hb_adamw_tensor &t, int64_t at, int64_t count, Buffers &b) {
        if (t.columns) {
            second_scales(t, t.scale2, t.scale2_columns, at, count, b.scale);
        } else {
            fill(t.scale2[at / kAdamWBlock4], count, b.scale);
        }
        Nibbles::unpack(t.state2, at, count, b.codes);
        for (int64_t i = count; i < padded(count); ++i) b.codes[i] = 0;
        for (int64_t i = 0; i < count; i += kWidth) {
            const F value = Lanes::lookup16(kLinear4, Lanes::load_bytes(b.codes + i));
            Lanes::store(b.moments[0].second + i, Lanes::mul(value, Lanes::load(b.scale + i)));
        }
        for (int64_t i = count; i < padded(count); ++i) b.moments[0].second[i] = 0;
    }

    static void block4(const hb_adamw_tensor &t, const Numbers &numbers, const RankOne &next, int64_t at,
                       int64_t count, Buffers &b) {
        float &absmax1 = t.scale1[at / kAdamWBlock4];
        Nibbles::unpack(t.state1, at, count, b.codes);
        decode8(b.codes, kDynamic4, absmax1, count, b.moments[0].first);
        decode_second4(t, at, count, b);
        float *const target = param_target(t, at, count, b.param);
        float largest1, largest2;
        float *const m = b.moments[0].first, *const v = b.moments[0].second;
        update_all<false>(numbers, count, params(t, at, count, b.param),
                          floats(t.grad, t.grad_dtype, at, count, b.grad), Stored{m, v}, target, m, v, &largest1,
                          &largest2);
        absmax1 = largest1;
        fill(largest1, count, b.scale);
        Nibbles::encode(b.moments[0].first, b.scale, kDynamic4Thresholds, count, b.codes);
        Nibbles::pack(b.codes, 7, at, count, t.state1);  // entry 7 is zero
        if (t.columns) {
            second_scales(t, next.rows, next.columns, at, count, b.scale);
        } else {
            t.scale2[at / kAdamWBlock4] = largest2;
            fill(largest2, count, b.scale);
        }
        Nibbles::encode(b.moments[0].second, b.scale, kLinear4Thresholds, count, b.codes);
        Nibbles::pack(b.codes, 0, at, count, t.state2);
        store_param(t, target, at, count);
    }

    static void raise(uint32_t *slot, float value) {
        const uint32_t bits = bits_of(value);
        uint32_t held = __atomic_load_n(slot, __ATOMIC_RELAXED);
        while (bits > held &&
               !__atomic_compare_exchange_n(slot, &held, bits, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
        }
    }

    // Raises a row's largest value, and the columns', by values [count] that are not negative. Columns only ever rise, so
    // a vector that is above none of them, as far as this thread has heard, needs no exchange: nearly all of them.
    static void raise_row_and_columns(uint32_t *row, uint32_t *columns, const float *values, int64_t count) {
        F most = Lanes::set(0);
        float rest = 0;
        int64_t i = 0;
        for (; i + kWidth <= count; i += kWidth) {
            const F value = Lanes::load(values + i);
            most = Lanes::max(most, value);
            if (!Lanes::any_greater(value, Lanes::load(reinterpret_cast<const float *>(columns + i)))) continue;
            for (int64_t k = i; k < i + kWidth; ++k) raise(columns + k, values[k]);
        }
        for (; i < count; ++i) {
            rest = std::max(rest, values[i]);
            raise(columns + i, values[i]);
        }
        raise(row, std::max(rest, Lanes::largest(most)));
    }

    static void rank_one(const hb_adamw_tensor &t, const hb_adamw_options &o, const RankOne &next, int64_t at,
                         int64_t count) {
        Buffers b;
        const Numbers numbers(o);
        for (const int64_t end = at + count; at < end; at += kAdamWBlock4) {
            const int64_t size = std::min(kAdamWBlock4, end - at);
            decode_second4(t, at, size, b);
            const float *grad = floats(t.grad, t.grad_dtype, at, size, b.grad);
            for (int64_t i = 0; i < size; i += kWidth) {
                const F scaled = Lanes::mul(Lanes::load(grad + i), numbers.grad_scale);
                Lanes::store(b.moments[0].second + i, second(numbers, Lanes::load(b.moments[0].second + i), scaled));
            }
            for_each_row(t.columns, at, size, [&](int64_t row, int64_t column, int64_t i, int64_t length) {
                raise_row_and_columns(next.rows + row, next.columns + column, b.moments[0].second + i, length);
            });
        }
    }

    // Elements [at, at + count) of a tensor; `at` is a multiple of a block.
    static void run(const hb_adamw_tensor &t, const hb_adamw_options &o, const RankOne &next, int64_t at,
                    int64_t count) {
        Buffers b;
        const Numbers numbers(o);
        if (t.state == HB_STATE_8BIT) return range8(t, numbers, at, count, b);
        const int64_t block = t.state == HB_STATE_4BIT ? kAdamWBlock4 : kAdamWBlock;
        for (const int64_t end = at + count; at < end; at += block) {
            const int64_t size = std::min(block, end - at);
            if (t.state == HB_STATE_4BIT) {
                block4(t, numbers, next, at, size, b);
            } else {
                block_float(t, numbers, at, size, b);
            }
        }
    }

    typedef float Singles __attribute__((vector_size(16 * sizeof(float))));
    typedef double Doubles __attribute__((vector_size(16 * sizeof(double))));

    // The sum of squares of grad [at, at + count), in float64: sixteen sums, one for each position modulo 16, are added in
    // a fixed order. The square of a float is exact in float64, so every instruction set gives the same sum.
    static double sum_of_squares(const hb_adamw_tensor &t, int64_t at, int64_t count) {
        Buffers b;
        Doubles total{};
        for (const int64_t end = at + count; at < end; at += kAdamWBlock) {
            const int64_t size = std::min(kAdamWBlock, end - at);
            const float *grad = floats(t.grad, t.grad_dtype, at, size, b.grad);
            int64_t i = 0;
            for (; i + 16 <= size; i += 16) {
                Singles x;
                std::memcpy(&x, grad + i, sizeof x);
                const Doubles wide = __builtin_convertvector(x, Doubles);
                total += wide * wide;
                __builtin_prefetch(grad + i + kAhead);
            }
            for (int j = 0; i + j < size; ++j) total[j] += double(grad[i + j]) * double(grad[i + j]);
        }
        double sums[16];
        std::memcpy(sums, &total, sizeof sums);
        for (int half = 8; half; half /= 2) {
            for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
        }
        return sums[0];
    }

    static constexpr AdamW table() { return {run, rank_one, sum_of_squares}; }
};

}  // namespace
}  // namespace halfbyte
