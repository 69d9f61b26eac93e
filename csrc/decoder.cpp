// One step of a decoder: a token of each row through all layers, in one parallel region.
//
// At one row a layer's products take a few hundred microseconds in all, so what lies between them must cost next to
// nothing: no Python, no region entered and left, no tensor made. The phases of a layer:
//
//   norm -> prepare, adapters' A -> query, key, value -> rotate, store -> attend
//        -> prepare, A -> output, + residual -> norm -> prepare, A -> gate, up, activation -> prepare, A -> down, + residual
//
// Products are the few-row kernels of hb_linear; a matrix that they do not take is dense.
#include <algorithm>
#include <chrono>

#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace halfbyte {
namespace {

constexpr int64_t kColumns = 64;        // outputs that a thread takes at once, as in hb_linear
constexpr int64_t kPhasesOfLayer = 24;  // at most: 10 and, where members of a group are packed differently, 2 for each more
constexpr int64_t kMembers = 3;

int64_t pieces_of(int64_t n) { return (n + kColumns - 1) / kColumns; }

bool same_order(const hb_matrix &a, const hb_matrix &b) {  // of prepared activations; see Linear
    return a.packed && b.packed && a.packed->format == b.packed->format && a.packed->block_size == b.packed->block_size;
}

// Adds up the time that one thread, and so all of them, spends in each part of a step: a clock is read a dozen times a layer.
class Laps {
  public:
    explicit Laps(int64_t *nanoseconds) : to_(nanoseconds), at_(nanoseconds ? now() : 0) {}

    // What was done since the last call, or since the beginning, belongs to `part`.
    void lap(hb_part part) {
        if (!to_) return;
        const int64_t then = at_;
        at_ = now();
        to_[part] += at_ - then;
    }

  private:
    static int64_t now() {
        return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
    }
    int64_t *to_, at_;
};

class Step {
  public:
    Step(const hb_decoder &decoder, const hb_step &step)
        : d_(decoder), s_(step), ops_(*kernels().decoder), linear_(kernels().linear), lora_(*kernels().lora) {
        query_ = d_.heads * d_.head_dim, key_ = d_.kv_heads * d_.head_dim;
        widest_ = std::max({d_.hidden, d_.ffn, query_});
        entries_ = s_.mix ? s_.mix[s_.rows] : 0;
        for (int64_t i = 0; i < d_.layer_count; ++i) {
            const hb_layer &l = d_.layers[i];
            for (const hb_matrix *m : {&l.query, &l.key, &l.value, &l.output, &l.gate, &l.up, &l.down}) measure(*m);
        }
        measure(d_.head);
    }

    // All memory of a step in one piece: where each part begins, and how much there is in all.
    int64_t lay_out(char *memory) {
        int64_t at = 0;
        const auto take = [&](auto &pointer, int64_t bytes) {
            pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(memory ? memory + at : nullptr);
            at += (bytes + 63) / 64 * 64;
        };
        take(phases_, int64_t(sizeof(Crew::Phase)) * (d_.layer_count * kPhasesOfLayer + 4));
        take(x_, s_.rows * widest_ * 4);
        take(queries_, s_.rows * query_ * 4);
        take(keys_, s_.rows * key_ * 4);
        take(values_, s_.rows * key_ * 4);
        take(gates_, s_.rows * d_.ffn * 4);
        take(up_, s_.rows * d_.ffn * 4);
        take(sums_, s_.rows * d_.hidden * 4);
        take(rounded_, s_.rows * widest_ * 2);
        take(products_, s_.dtype == HB_FLOAT32 ? 0 : s_.rows * std::max(widest_, d_.head.n) * kMembers * 2);
        take(prepared_, prepared_size_);
        take(middles_, kMembers * entries_ * width_ * 4);
        return at;
    }

    int run(int threads) {
        const Scratch memory(lay_out(nullptr));
        if (!memory.data()) return 1;
        lay_out(static_cast<char *>(memory.data()));
        for (int64_t i = 0; i < d_.layer_count * kPhasesOfLayer + 4; ++i) new (phases_ + i) Crew::Phase;
        run_crew(threads, phases_, [this](Crew crew) {
            Laps laps(timed_.exchange(true) ? nullptr : s_.nanoseconds);
            for (int64_t i = s_.first_layer; i < s_.last_layer; ++i) layer(crew, laps, i);
            if (s_.wanted_count) head(crew);
            laps.lap(HB_PART_HEAD);
        });
        return failed_;
    }

  private:
    // A matrix, where its product goes, and what happens to each finished piece of it.
    struct Member {
        const hb_matrix &matrix;
        float *out;
    };

    auto add_to_hidden(const float *product) {
        return [this, product](int64_t first, int64_t last) {
            for (int64_t row = 0; row < s_.rows; ++row) {
                const int64_t from = row * d_.hidden + first;
                ops_.add(product + from, last - first, s_.hidden + from);
            }
        };
    }

    void measure(const hb_matrix &m) {
        for (const int64_t rows : {s_.rows, s_.wanted_count}) {  // fewer rows may take a kernel that needs more
            if (m.packed && rows) prepared_size_ = std::max(prepared_size_, linear_.scratch_size(*m.packed, rows, m.k));
        }
        for (int64_t i = 0; m.loras && i < entries_; ++i) {
            width_ = std::max(width_, lora_width(m.loras[s_.adapter[i]].rank));
        }
    }

    void layer(Crew &crew, Laps &laps, int64_t number) {
        const hb_layer &l = d_.layers[number];
        const int64_t heads = s_.rows * d_.kv_heads, group = d_.heads / d_.kv_heads;
        normalize(crew, l.attention_norm);
        laps.lap(HB_PART_NORMS);
        multiply<3>(crew, {{l.query, queries_}, {l.key, keys_}, {l.value, values_}}, x_, s_.rows, nothing);
        laps.lap(HB_PART_PRODUCTS);
        const auto at = [&](int64_t piece) {
            const int64_t row = piece / d_.kv_heads;
            return HeadAt{d_, l, number, s_.slot[row], s_.position[row], piece % d_.kv_heads};
        };
        crew.phase(heads, [&](int64_t i) {
            ops_.enter(at(i), queries_ + i * group * d_.head_dim, keys_ + i * d_.head_dim, values_ + i * d_.head_dim);
        });
        crew.phase(heads, [&](int64_t i) {
            const int64_t first = i * group * d_.head_dim;
            ops_.attend(at(i), queries_ + first, x_ + first);
            if (s_.dtype == HB_BFLOAT16) ops_.round(x_ + first, group * d_.head_dim, rounded_ + first);
        });
        laps.lap(HB_PART_ATTENTION);
        multiply<1>(crew, {{l.output, sums_}}, x_, s_.rows, add_to_hidden(sums_));
        laps.lap(HB_PART_PRODUCTS);
        normalize(crew, l.mlp_norm);
        laps.lap(HB_PART_NORMS);
        multiply<2>(crew, {{l.gate, gates_}, {l.up, up_}}, x_, s_.rows, [&](int64_t first, int64_t last) {
            for (int64_t row = 0; row < s_.rows; ++row) {
                const int64_t from = row * d_.ffn + first;
                ops_.gate(d_.activation, gates_ + from, up_ + from, last - first, gates_ + from);
                if (s_.dtype == HB_BFLOAT16) ops_.round(gates_ + from, last - first, rounded_ + from);
            }
        });
        multiply<1>(crew, {{l.down, sums_}}, gates_, s_.rows, add_to_hidden(sums_));
        laps.lap(HB_PART_PRODUCTS);
    }

    void head(Crew &crew) {
        crew.phase(s_.wanted_count, [&](int64_t i) { normalize_row(s_.wanted[i], d_.final_norm, i); });
        multiply<1>(crew, {{d_.head, s_.logits}}, x_, s_.wanted_count, nothing);
    }

    static void nothing(int64_t, int64_t) {}

    void normalize(Crew &crew, const float *weight) {  // x = norm(hidden)
        crew.phase(s_.rows, [&](int64_t row) { normalize_row(row, weight, row); });
    }

    void normalize_row(int64_t row, const float *weight, int64_t to) {
        float *const x = x_ + to * d_.hidden;
        ops_.rms_norm(s_.hidden + row * d_.hidden, weight, d_.hidden, d_.eps, x);
        if (s_.dtype == HB_BFLOAT16) ops_.round(x, d_.hidden, rounded_ + to * d_.hidden);
    }

    // Products of matrices that share x [rows, k]; then `after(first, last)` for each piece of outputs, which with two
    // members means the same outputs of both.
    template <int N, class After>
    void multiply(Crew &crew, const Member (&members)[N], const float *x, int64_t rows, After after) {
        for (int begin = 0; begin < N;) {
            int end = begin + 1;
            while (end < N && (same_order(members[begin].matrix, members[end].matrix) ||
                               (!members[begin].matrix.packed && !members[end].matrix.packed))) {
                ++end;
            }
            prepare(crew, members + begin, end - begin, x, rows);
            const bool together = N == 2 && end - begin == N;
            int64_t total = 0;
            for (int i = begin; i < end; ++i) total = together ? pieces_of(members[i].matrix.n) : total + pieces_of(members[i].matrix.n);
            crew.phase(total, [&](int64_t piece) {
                if (together) {
                    for (int i = 0; i < N; ++i) finish(members[i], i, x, rows, piece);
                } else {
                    int i = begin;
                    while (piece >= pieces_of(members[i].matrix.n)) piece -= pieces_of(members[i++].matrix.n);
                    finish(members[i], i - begin, x, rows, piece);
                }
                if (together || N != 2) after(piece * kColumns, std::min((piece + 1) * kColumns, members[0].matrix.n));
            });
            if (N == 2 && !together && end == N) {
                crew.phase(pieces_of(members[0].matrix.n), [&](int64_t piece) {
                    after(piece * kColumns, std::min((piece + 1) * kColumns, members[0].matrix.n));
                });
            }
            begin = end;
        }
    }

    // Puts x into the order of the products, and computes x A^T of each row's adapters.
    void prepare(Crew &crew, const Member *members, int count, const float *x, int64_t rows) {
        const hb_matrix &first = members[0].matrix;
        const int64_t k = first.k;
        crew.phase(1 + count * entries_, [&](int64_t piece) {
            if (piece == 0) {
                const void *const from = s_.dtype == HB_FLOAT32 ? static_cast<const void *>(x) : rounded_;
                if (first.packed) linear_.prepare(*first.packed, from, s_.dtype, rows, k, prepared_);
                return;
            }
            const int64_t member = (piece - 1) / entries_, entry = (piece - 1) % entries_;
            const hb_matrix &m = members[member].matrix;
            if (!m.loras) return;
            const int64_t row = std::upper_bound(s_.mix, s_.mix + s_.rows, entry) - s_.mix - 1;
            const hb_lora lora = of_row(m, entry, row);
            float *const t = middle(member, entry);
            std::fill(t, t + width_, 0.0f);  // the rank is padded to whole vectors, with terms of zero
            for (int64_t rank = 0; rank < lora.rank; rank += kLoraRanks) {
                lora_.down(lora, x, HB_FLOAT32, k, t, rank, std::min(rank + kLoraRanks, lora.rank));
            }
        });
    }

    // The adapter of one entry of the mix, for its row.
    hb_lora of_row(const hb_matrix &m, int64_t entry, int64_t row) const {
        hb_lora lora = m.loras[s_.adapter[entry]];
        lora.first = row, lora.rows = 1, lora.scaling *= s_.weight[entry];
        return lora;
    }

    float *middle(int64_t member, int64_t entry) { return middles_ + (member * entries_ + entry) * width_; }

    // A piece of one product, with its bias and its adapters.
    void finish(const Member &member, int64_t number, const float *x, int64_t rows, int64_t piece) {
        const hb_matrix &m = member.matrix;
        const int64_t first = piece * kColumns, last = std::min(first + kColumns, m.n);
        if (!m.packed) {
            ops_.dense(m, x, rows, first, last, member.out);
        } else {
            uint16_t *const words = products_ + number * s_.rows * std::max(widest_, d_.head.n);
            void *const to = s_.dtype == HB_FLOAT32 ? static_cast<void *>(member.out) : words;
            if (!linear_.run(*m.packed, m.n, m.k, prepared_, rows, s_.dtype, nullptr, to, first, last)) failed_ = 1;
            for (int64_t row = 0; s_.dtype != HB_FLOAT32 && row < rows; ++row) {
                ops_.widen(words + row * m.n + first, last - first, member.out + row * m.n + first);
            }
        }
        for (int64_t row = 0; row < rows; ++row) {
            float *const out = member.out + row * m.n;
            if (m.bias) ops_.add(m.bias + first, last - first, out + first);
            if (!m.loras || !s_.mix) continue;
            for (int64_t entry = s_.mix[row]; entry < s_.mix[row + 1]; ++entry) {
                const hb_lora lora = of_row(m, entry, row);
                if (lora.rank) lora_.up(lora, middle(number, entry), m.n, HB_FLOAT32, member.out, first, last);
            }
        }
    }

    const hb_decoder &d_;
    const hb_step &s_;
    const DecoderOps &ops_;
    const Linear &linear_;
    const Lora &lora_;
    int64_t query_, key_, widest_, entries_, prepared_size_ = 0, width_ = 0;
    Crew::Phase *phases_;
    float *x_, *queries_, *keys_, *values_, *gates_, *up_, *sums_, *middles_;
    uint16_t *rounded_, *products_;
    void *prepared_;
    std::atomic<int> failed_{0};
    std::atomic<bool> timed_{false};  // by the thread that comes first
};

}  // namespace
}  // namespace halfbyte

int hb_decode(int threads, const hb_decoder *decoder, const hb_step *step) {
    return halfbyte::Step(*decoder, *step).run(threads);
}
