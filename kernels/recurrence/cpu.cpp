// The states of a GRU whose inputs' gates have been computed before; threads share out sequences.
//
// gates: [batch, length, 3 width], reset, update and new. begin: [batch, width]. weight: of the
// states' part, [3 width, width]. bias: [3 width]. states: [batch, length, width].
//
// Compiled by Inductor's own means (see cpu.py), whose first lines bring at::vec.

#include <algorithm>
#include <vector>

using Vector = at::vec::Vectorized<float>;
constexpr int64_t BLOCK = 6;

static Vector load(const float* from, int64_t left) {
    return left >= Vector::size() ? Vector::loadu(from) : Vector::loadu(from, left);
}

static Vector sigmoid(const Vector& x) {
    return Vector(1.0f) / (Vector(1.0f) + x.neg().exp());
}

extern "C" void kernel(
    const float* gates, const float* begin, const float* weight, const float* bias, float* states,
    int64_t batch, int64_t length, int64_t width, int64_t threads) {
    const int64_t three = 3 * width;
    // Columns are summed in blocks that fit the registers; those past the last one are zeros.
    const int64_t block = BLOCK * Vector::size(), padded = (three + block - 1) / block * block;
    std::vector<float> start(padded), columns(width * padded);
    std::copy(bias, bias + three, start.data());
    for (int64_t j = 0; j < three; ++j)
        for (int64_t k = 0; k < width; ++k)
            columns[k * padded + j] = weight[j * width + k];
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < batch; ++row) {
        std::vector<float> own(padded);
        const float* state = begin + row * width;
        for (int64_t step = 0; step < length; ++step) {
            const float* gate = gates + (row * length + step) * three;
            float* next = states + (row * length + step) * width;
            for (int64_t j = 0; j < padded; j += block) {
                Vector sums[BLOCK];
                for (int64_t i = 0; i < BLOCK; ++i)
                    sums[i] = Vector::loadu(start.data() + j + i * Vector::size());
                for (int64_t k = 0; k < width; ++k) {
                    const float* column = columns.data() + k * padded + j;
                    for (int64_t i = 0; i < BLOCK; ++i)
                        sums[i] = at::vec::fmadd(
                            Vector(state[k]), Vector::loadu(column + i * Vector::size()), sums[i]);
                }
                for (int64_t i = 0; i < BLOCK; ++i)
                    sums[i].store(own.data() + j + i * Vector::size());
            }
            for (int64_t j = 0; j < width; j += Vector::size()) {
                const int64_t left = width - j;
                const Vector reset = sigmoid(load(gate + j, left) + load(own.data() + j, left));
                const Vector update =
                    sigmoid(load(gate + width + j, left) + load(own.data() + width + j, left));
                const Vector fresh = (load(gate + 2 * width + j, left)
                    + reset * load(own.data() + 2 * width + j, left)).tanh();
                const Vector result = fresh + update * (load(state + j, left) - fresh);
                result.store(next + j, std::min<int64_t>(left, Vector::size()));
            }
            state = next;
        }
    }
}
