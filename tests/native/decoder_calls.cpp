#include <algorithm>
#include <cmath>
#include <cstring>

#include "calls.h"

namespace {

// The C structs of a decoder and the memory that they point to.
struct Decoder {
    std::vector<Buffer> buffers;
    std::vector<std::unique_ptr<hb_weight>> packed;
    std::vector<std::vector<hb_lora>> loras;
    std::vector<hb_layer> layers;
    hb_decoder fields = {};
    int64_t adapters = 0;

    const float *numbers(Random &random, int64_t count, float factor) {
        buffers.push_back(floats(random, kTypes[0], count, Values::kSmooth, factor));
        return buffers.back()->data<float>();
    }

    // W [n, k]: packed where the products take it, else dense; each adapter has a rank of its own on it, or none.
    hb_matrix matrix(Random &random, int64_t n, int64_t k) {
        hb_matrix m = {};
        m.n = n, m.k = k;
        const int64_t block = int64_t(32) << random.below(3);
        if (k % std::max<int64_t>(64, block) || random.one_in(6)) {
            const Type &type = kTypes[random.below(2)];
            buffers.push_back(floats(random, type, n * k, Values::kSmooth, 0x1p-3f));
            m.dense = buffers.back()->data(), m.dense_dtype = type.number;
        } else {
            const Weight w = weight(random, random.below(kInt8), block, 0, n * k, true);
            buffers.insert(buffers.end(), w.buffers.begin(), w.buffers.end());
            packed.push_back(std::make_unique<hb_weight>(w.fields));
            m.packed = packed.back().get();
        }
        m.bias = random.one_in(3) ? numbers(random, n, 1) : nullptr;
        if (!adapters || random.one_in(4)) return m;
        loras.emplace_back();
        for (int64_t i = 0; i < adapters; ++i) {
            const Type &type = kTypes[random.below(3)];
            hb_lora lora = {};
            lora.rank = random.one_in(4) ? 0 : random.size(5), lora.dtype = type.number, lora.scaling = random.smooth();
            buffers.push_back(floats(random, type, lora.rank * k, Values::kSmooth, 0x1p-4f));
            lora.a = buffers.back()->data();
            buffers.push_back(floats(random, type, n * lora.rank, Values::kSmooth, 0x1p-2f));
            lora.b = buffers.back()->data();
            loras.back().push_back(lora);
        }
        m.loras = loras.back().data();  // the outer vector moves its vectors, and those keep their memory
        return m;
    }

    hb_layer layer(Random &random) {
        const hb_decoder &d = fields;
        const int64_t queries = d.heads * d.head_dim, keys = d.kv_heads * d.head_dim;
        hb_layer l = {};
        l.query = matrix(random, queries, d.hidden), l.key = matrix(random, keys, d.hidden);
        l.value = matrix(random, keys, d.hidden), l.output = matrix(random, d.hidden, queries);
        l.gate = matrix(random, d.ffn, d.hidden), l.up = matrix(random, d.ffn, d.hidden);
        l.down = matrix(random, d.hidden, d.ffn);
        l.attention_norm = numbers(random, d.hidden, 1), l.mlp_norm = numbers(random, d.hidden, 1);
        l.query_norm = random.one_in(3) ? numbers(random, d.head_dim, 1) : nullptr;
        l.key_norm = random.one_in(3) ? numbers(random, d.head_dim, 1) : nullptr;
        l.window = random.one_in(3) ? random.between(1, d.positions) : 0;
        return l;
    }

    explicit Decoder(Random &random) {
        hb_decoder &d = fields;
        adapters = random.one_in(2) ? 0 : random.between(1, 3);
        d.hidden = random.one_in(3) ? random.size(7) : 64 * random.between(1, 3);
        d.ffn = random.one_in(3) ? random.size(7) : 64 * random.between(1, 3);
        d.kv_heads = random.between(1, 3), d.heads = d.kv_heads * random.between(1, 9);
        d.head_dim = 2 * random.size(5);
        d.slots = random.between(1, 3), d.positions = 16 * random.between(1, 10);
        d.eps = 0x1p-17f, d.attention_scale = 1 / std::sqrt(float(d.head_dim));
        d.cache_dtype = int(random.among({HB_FLOAT32, HB_BFLOAT16, HB_INT8}));
        d.activation = int(random.below(2));
        d.layer_count = random.between(1, 2);
        for (int64_t i = 0; i < d.layer_count; ++i) layers.push_back(layer(random));
        d.layers = layers.data();
        d.final_norm = numbers(random, d.hidden, 1);
        d.cosine = numbers(random, d.positions * d.head_dim, 1), d.sine = numbers(random, d.positions * d.head_dim, 1);
        d.head = matrix(random, random.between(1, 200), d.hidden);
        d.head.loras = nullptr;
    }
    Decoder(const Decoder &) = delete;
    Decoder &operator=(const Decoder &) = delete;
};

// The cache as a step finds it, and as many copies of it as there are steps at once.
struct Content {
    Buffer keys, values, key_scales, value_scales;

    Content(Random &random, const hb_decoder &d) {
        const int64_t vectors = d.layer_count * d.slots * d.kv_heads * d.positions, count = vectors * d.head_dim;
        for (Buffer *content : {&keys, &values}) {
            *content = d.cache_dtype == HB_INT8
                           ? random_bytes(random, count)
                           : floats(random, kTypes[d.cache_dtype == HB_BFLOAT16], count, Values::kSmooth, 1);
        }
        if (d.cache_dtype != HB_INT8) return;
        for (Buffer *scales : {&key_scales, &value_scales}) *scales = floats(random, kTypes[0], vectors, Values::kSmooth, 0x1p-7f);
    }

    static Buffer copied(const Buffer &from) {
        if (!from) return nullptr;
        Buffer made = std::make_shared<Guarded>(int64_t(from->size()), true);
        std::memcpy(made->data(), from->data(), from->size());
        return made;
    }
    Content copy() const {
        Content made = *this;
        for (Buffer *buffer : {&made.keys, &made.values, &made.key_scales, &made.value_scales}) *buffer = copied(*buffer);
        return made;
    }
    bool intact() const {
        for (const Buffer &buffer : {keys, values, key_scales, value_scales}) {
            if (buffer && !buffer->intact()) return false;
        }
        return true;
    }
};

// Which tokens a step decodes.
struct Rows {
    Buffer hidden;
    std::vector<int64_t> slot, position, mix, adapter, wanted;
    std::vector<float> weight;

    Rows(Random &random, const Decoder &decoder) {
        const hb_decoder &d = decoder.fields;
        const int64_t most = std::min<int64_t>(d.slots * d.positions, random.one_in(4) ? int64_t(HB_STEP_ROWS) : 4);
        const int64_t rows = random.between(1, most), first = random.below(d.slots * d.positions);
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t at = (first + row) % (d.slots * d.positions);
            slot.push_back(at / d.positions), position.push_back(at % d.positions);
        }
        hidden = floats(random, kTypes[0], rows * d.hidden, Values::kSmooth, 1);
        for (int64_t row = 0; row < rows; ++row) {
            if (!random.one_in(4)) wanted.push_back(row);
        }
        if (!decoder.adapters) return;
        mix.push_back(0);
        for (int64_t row = 0; row < rows; ++row) {
            for (int64_t i = random.below(decoder.adapters + 1); i > 0; --i) {
                adapter.push_back(random.below(decoder.adapters)), weight.push_back(random.smooth());
            }
            mix.push_back(int64_t(adapter.size()));
        }
    }
    int64_t count() const { return int64_t(slot.size()); }
};

// In two parts, the second of which begins with layer `part`; with 0 in one.
int run_step(int threads, const Decoder &decoder, const Content &content, const Rows &rows, int64_t part, int dtype,
             float *hidden, float *logits) {
    const Content now = content.copy();
    hb_decoder d = decoder.fields;
    d.keys = now.keys->data(), d.values = now.values->data();
    d.key_scales = now.key_scales ? now.key_scales->data<float>() : nullptr;
    d.value_scales = now.value_scales ? now.value_scales->data<float>() : nullptr;
    std::memcpy(hidden, rows.hidden->data(), rows.hidden->size());
    hb_step step = {};
    step.hidden = hidden, step.logits = logits;
    step.slot = rows.slot.data(), step.position = rows.position.data();
    if (!rows.mix.empty()) {
        step.mix = rows.mix.data(), step.adapter = rows.adapter.data(), step.weight = rows.weight.data();
    }
    int64_t nanoseconds[HB_PARTS] = {};
    step.nanoseconds = threads % 2 ? nanoseconds : nullptr;
    step.rows = rows.count(), step.dtype = dtype;
    step.last_layer = part;
    if (part && hb_decode(threads, &d, &step)) return 1;
    step.first_layer = part, step.last_layer = d.layer_count;
    step.wanted = rows.wanted.data(), step.wanted_count = int64_t(rows.wanted.size());
    return hb_decode(threads, &d, &step) || !now.intact();
}

}  // namespace

// The exact numbers are those of plain C++ in float32, which tests/kernels/test_decoder.py compares with torch. What a
// result may differ by, relative to the largest, is measured: in 500 decoders 3.2e-7 where everything is float32, 4.9e-6
// where a cache is rounded, and 0.026 with bf16 activations; norms of two numbers make errors larger, so there is room.
// What it has to find are parts that are not computed, or not from their inputs.
Call decode(Random &random) {
    const auto decoder = std::make_shared<const Decoder>(random);
    const hb_decoder &d = decoder->fields;
    const Content content(random, d);
    const Rows rows(random, *decoder);
    const Type &type = kTypes[random.below(2)];
    const int64_t wanted = int64_t(rows.wanted.size()), part = random.below(d.layer_count + 1);
    const double tolerance = type.number == HB_BFLOAT16 ? 0.1 : d.cache_dtype == HB_FLOAT32 ? 1e-5 : 1e-3;
    Call call;
    call.text = described("decode: hidden %d, ffn %d, heads %d of %d, dim %d, ", d.hidden, d.ffn, d.heads, d.kv_heads,
                          d.head_dim) +
                described("layers %d, rows %d, adapters %d, cache %d, ", d.layer_count, rows.count(), decoder->adapters,
                          d.cache_dtype) +
                type.name;
    call.outputs = {{4 * rows.count() * d.hidden, Element::kFloat32}};
    if (wanted) call.outputs.push_back({4 * wanted * d.head.n, Element::kFloat32});
    hb_set_isa(HB_GENERIC);
    std::vector<float> hidden(size_t(rows.count() * d.hidden)), logits(size_t(wanted * d.head.n));
    run_step(1, *decoder, content, rows, 0, HB_FLOAT32, hidden.data(), logits.data());
    for (const std::vector<float> &exact : {hidden, logits}) {
        float most = 1;
        for (const float x : exact) most = std::max(most, std::fabs(x));
        for (const float x : exact) call.exact.push_back(double(x)), call.allowed.push_back(tolerance * double(most));
    }
    call.run = [=](int threads, void *const *out) {
        return run_step(threads, *decoder, content, rows, part, type.number, static_cast<float *>(out[0]),
                        wanted ? static_cast<float *>(out[1]) : nullptr);
    };
    return call;
}
