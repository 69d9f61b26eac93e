#include <algorithm>
#include <cmath>
#include <cstring>

#include "calls.h"

constexpr int64_t kStateBlock[] = {1, 256, 128};  // elements that share a scale, by kind of optimizer state

// One AdamW step of a tensor, all of whose changed buffers are outputs. Its numbers are finite: what comes of others
// is nobody's business, but it must stay inside the buffers, so then the results are wiped before they are compared.
Call adamw(Random &random) {
    const int kind = int(random.below(3));
    const bool matrix = kind == HB_STATE_4BIT && random.one_in(2), finite = !random.one_in(8);
    const int64_t columns = matrix ? random.size(9) : 0;
    const int64_t count = matrix ? columns * random.size(6) : random.size(random.one_in(10) ? 15 : 11);
    const Type &type = kTypes[random.below(2)], &grad_type = kTypes[random.below(2)];
    const bool master = type.number == HB_BFLOAT16 && random.one_in(2);
    const Values values = finite ? Values(random.below(5)) : Values::kAny;
    const int64_t blocks = ceil_div(count, kStateBlock[kind]), codes = packed_size(count, 8 / std::max(kind, 1));
    const Buffer grad = floats(random, grad_type, count, values, 0x1p-5f);
    std::vector<Buffer> begin = {floats(random, type, count, Values::kSmooth, 1)};
    Call call;
    call.text = described("adamw: state %d, count %d, columns %d, master %d, values %d, ", kind, count, columns, master,
                          int(values));
    call.text += std::string(type.name) + ", gradient " + grad_type.name;
    call.outputs = {{count * type.size, type.element}};
    const auto add = [&](Buffer buffer, Element element) {
        call.outputs.push_back({int64_t(buffer->size()), element});
        begin.push_back(buffer);
    };
    if (kind == HB_STATE_FLOAT32) {
        add(floats(random, kTypes[0], count, Values::kSmooth, 1), Element::kFloat32);
        add(positives(random, count), Element::kFloat32);
    } else {
        for (int i = 0; i < 2; ++i) add(random_bytes(random, codes), Element::kByte);
        add(positives(random, blocks), Element::kFloat32);
        add(positives(random, matrix ? count / columns : blocks), Element::kFloat32);
        if (matrix) add(positives(random, columns), Element::kFloat32);
    }
    if (master) add(floats(random, kTypes[0], count, Values::kSmooth, 1), Element::kFloat32);
    hb_adamw_tensor t = {};
    t.count = count, t.columns = columns, t.first = 256 * random.below(1000);
    t.key[0] = uint32_t(random.bits()), t.key[1] = uint32_t(random.bits());
    t.param_dtype = type.number, t.grad_dtype = grad_type.number, t.state = kind;
    const float beta1 = float(random.below(100)) / 100, beta2 = float(random.below(1000)) / 1000;
    const float correction = random.one_in(2) ? 1.0f : 0.0625f, decay = 1 - float(random.below(10)) / 1024;
    const hb_adamw_options o = {random.one_in(2) ? 1.0f : 0.3f, beta1, 1 - beta1, beta2, 1 - beta2, 0x1p-20f,
                                correction, 1 / correction, -0x1p-8f, decay};
    call.run = [=](int threads, void *const *out) {
        for (size_t i = 0; i < begin.size(); ++i) std::memcpy(out[i], begin[i]->data(), begin[i]->size());
        hb_adamw_tensor now = t;
        now.grad = grad->data();
        size_t next = 0;
        const auto take = [&] { return out[next++]; };
        now.param = take(), now.state1 = take(), now.state2 = take();
        if (kind != HB_STATE_FLOAT32) {
            now.scale1 = static_cast<float *>(take()), now.scale2 = static_cast<float *>(take());
            if (columns) now.scale2_columns = static_cast<float *>(take());
        }
        if (master) now.master = static_cast<float *>(take());
        const int failed = hb_adamw(threads, &now, 1, &o);
        for (size_t i = 0; i < begin.size() && !finite; ++i) std::memset(out[i], 0, begin[i]->size());
        return failed;
    };
    return call;
}

// The sums of squares of up to three gradients.
Call adamw_norms(Random &random) {
    const Type &type = kTypes[random.below(2)];
    const Values values = any_values(random);
    std::vector<Buffer> grads;
    std::vector<hb_adamw_tensor> tensors(size_t(random.between(1, 3)));
    for (hb_adamw_tensor &t : tensors) {
        t = {};
        t.count = random.size(14), t.grad_dtype = type.number;
        grads.push_back(floats(random, type, t.count, values, 1));
    }
    Call call;
    call.text = described("adamw_norms: tensors %d, first count %d, values %d, ", tensors.size(), tensors[0].count,
                          int(values));
    call.text += type.name;
    call.outputs = {{int64_t(8 * tensors.size()), Element::kByte}};
    call.run = [=](int threads, void *const *out) {
        std::vector<hb_adamw_tensor> now = tensors;
        std::vector<double> sums(now.size());
        for (size_t i = 0; i < now.size(); ++i) now[i].grad = grads[i]->data();
        const int failed = hb_adamw_norms(threads, now.data(), int64_t(now.size()), sums.data());
        for (double &sum : sums) sum = std::isnan(sum) ? 0 : sum;  // a NaN has many bits
        std::memcpy(out[0], sums.data(), 8 * sums.size());
        return failed;
    };
    return call;
}

Call swiglu(Random &random) {
    const Type &type = kTypes[random.below(3)];
    const int64_t count = random.size(13);
    const Values values = any_values(random);
    const Buffer gate = floats(random, type, count, values, 0x1p3f), up = floats(random, type, count, values, 1);
    const Buffer grad = random.one_in(2) ? nullptr : floats(random, type, count, values, 1);
    Call call;
    call.text = described("swiglu: count %d, backward %d, values %d, ", count, !!grad, int(values)) + type.name;
    call.outputs.assign(grad ? 2 : 1, {count * type.size, type.element});
    call.run = [=](int threads, void *const *out) {
        if (grad) {
            hb_swiglu_grad(threads, grad->data(), gate->data(), up->data(), type.number, count, out[0], out[1]);
        } else {
            hb_swiglu(threads, gate->data(), up->data(), type.number, count, out[0]);
        }
        return 0;
    };
    return call;
}

Call rotary(Random &random) {
    const Type &type = kTypes[random.below(3)];
    const int64_t angles = random.size(5), tokens = angles * random.size(2), heads = random.size(3);
    const int64_t dim = 2 * random.size(6), inverse = random.below(2);
    const Values values = any_values(random);
    const Buffer x = floats(random, type, tokens * heads * dim, values, 1);
    const Buffer cosine = floats(random, type, angles * dim, Values::kSmooth, 1);
    const Buffer sine = floats(random, type, angles * dim, Values::kSmooth, 1);
    Call call;
    call.text = described("rotary: tokens %d, angles %d, heads %d, dim %d, ", tokens, angles, heads, dim) + type.name;
    call.outputs = {{tokens * heads * dim * type.size, type.element}};
    call.run = [=](int threads, void *const *out) {
        hb_rotary(threads, x->data(), cosine->data(), sine->data(), type.number, tokens, angles, heads, dim,
                  int(inverse), out[0]);
        return 0;
    };
    return call;
}

// A float32 sum of n terms of one sign errs by at most n float32 eps of itself, its root by half of that.
Call rms_norm(Random &random) {
    const Type &type = kTypes[random.below(3)];
    const int64_t rows = random.size(4), n = random.size(10);
    constexpr float eps = 0x1p-17f;
    const Buffer x = floats(random, type, rows * n, Values::kSmooth, 1);
    const Buffer weight = floats(random, type, n, Values::kSmooth, 1);
    Call call;
    call.text = described("rms_norm: rows %d, n %d, ", rows, n) + type.name;
    call.outputs = {{rows * n * type.size, type.element}};
    for (int64_t row = 0; row < rows; ++row) {
        double sum = 0;
        for (int64_t i = 0; i < n; ++i) sum += std::pow(to_double(x->data(), type.element, row * n + i), 2);
        for (int64_t i = 0; i < n; ++i) {
            const double exact = to_double(x->data(), type.element, row * n + i) / std::sqrt(sum / double(n) + eps) *
                                 to_double(weight->data(), type.element, i);
            call.exact.push_back(exact);
            // Three more float32 roundings (rstd, x rstd, times the weight), and one to the dtype.
            call.allowed.push_back(std::fabs(exact) * (double(n + 2) * 0x1p-23 + type.eps / 2) +
                                   type.eps / 2 * type.smallest_normal);
        }
    }
    call.run = [=](int threads, void *const *out) {
        const Guarded rstd(4 * rows, true), gradient(rows * n * type.size, true);
        hb_rms_norm(threads, x->data(), weight->data(), type.number, rows, n, eps, out[0], rstd.data<float>());
        hb_rms_norm_grad(threads, x->data(), x->data(), weight->data(), rstd.data<float>(), type.number, rows, n,
                         gradient.data());
        return int(!rstd.intact() || !gradient.intact());
    };
    return call;
}

// As above for the sum of exponentials, whose logarithm errs absolutely by what the sum errs relatively: by its length,
// 2 for an exponential, and half the size of its argument, which is at most twice the largest logit. The loss itself, at
// most twice the largest logit and log(vocabulary) < 8, is rounded once.
Call cross_entropy(Random &random) {
    const Type &type = kTypes[random.below(3)];
    const int64_t rows = random.size(4), vocabulary = random.size(11), gradient = random.below(2);
    const Buffer logits = floats(random, type, rows * vocabulary, Values::kSmooth, 0x1p3f);
    const Buffer labels = buffer(random, 8 * rows);
    Call call;
    call.text = described("cross_entropy: rows %d, size %d, gradient %d, ", rows, vocabulary, gradient) + type.name;
    call.outputs = {{4 * rows, Element::kFloat32}};
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t label = labels->data<int64_t>()[row] = random.below(vocabulary);
        double sum = 0, largest = 0;
        for (int64_t i = 0; i < vocabulary; ++i) {
            const double logit = to_double(logits->data(), type.element, row * vocabulary + i);
            sum += std::exp(logit), largest = std::max(largest, std::fabs(logit));
        }
        call.exact.push_back(std::log(sum) - to_double(logits->data(), type.element, row * vocabulary + label));
        call.allowed.push_back((double(vocabulary) + 2 + 4 + 2 * largest) * 0x1p-23);
    }
    call.run = [=](int threads, void *const *out) {
        const Guarded copy(int64_t(logits->size()), true);
        std::memcpy(copy.data(), logits->data(), logits->size());
        hb_cross_entropy(threads, copy.data(), type.number, rows, vocabulary, labels->data<int64_t>(), int(gradient),
                         static_cast<float *>(out[0]));
        return int(!copy.intact());
    };
    return call;
}
