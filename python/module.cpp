// The pybind11 binding of csrc/, which validates all input: an Array can only be created from memory that exists, is
// aligned and is large enough, and a call accepts only Arrays of the required dtype and shape. Errors are ValueErrors
// that say what was wrong and what was expected. The code below this file checks nothing.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

#include "cpu_rows.h"
#if defined(EPO_WITH_CUDA)
#include "cuda_rows.h"
#endif

namespace py = pybind11;

namespace {

using Shape = std::vector<std::int64_t>;

std::string text(const Shape& shape) {
    std::ostringstream out;
    out << '(';
    for (std::size_t i = 0; i < shape.size(); ++i) out << (i ? ", " : "") << shape[i];
    out << (shape.size() == 1 ? ",)" : ")");
    return out.str();
}

[[noreturn]] void refuse(const std::string& what) { throw py::value_error(what); }

int item_size(const std::string& dtype) {
    if (dtype == "float64" || dtype == "int64") return 8;
    if (dtype == "float32" || dtype == "int32") return 4;
    if (dtype == "float16" || dtype == "bfloat16") return 2;
    if (dtype == "bool") return 1;
    refuse("dtype must be float32, float16, bfloat16, float64, int64, int32 or bool, got " + dtype);
}

// A strided array in its owner's memory, which must be inside the storage: `capacity` bytes from `begin`.
struct Array {
    std::uintptr_t pointer;
    std::string dtype;
    Shape shape, strides;
    py::object owner;       // kept alive
    std::int64_t last = 0;  // offset of the last byte from `pointer`, -1 if the array is empty

    Array(std::uintptr_t pointer_, std::string dtype_, Shape shape_, Shape strides_, std::uintptr_t begin,
          std::int64_t capacity, py::object owner_)
        : pointer(pointer_),
          dtype(std::move(dtype_)),
          shape(std::move(shape_)),
          strides(std::move(strides_)),
          owner(std::move(owner_)) {
        const std::int64_t size = item_size(dtype);
        if (strides.size() != shape.size())
            refuse("strides " + text(strides) + " must be as many as sizes " + text(shape));
        bool empty = false;
        for (std::size_t i = 0; i < shape.size(); ++i) {
            if (shape[i] < 0) refuse("sizes must not be negative, got " + text(shape));
            if (strides[i] < 0) refuse("strides must not be negative, got " + text(strides));
            std::int64_t reach = 0;
            if (shape[i] == 0) empty = true;
            else if (__builtin_mul_overflow(shape[i] - 1, strides[i], &reach) || __builtin_mul_overflow(reach, size, &reach) ||
                     __builtin_add_overflow(last, reach, &last))
                refuse("sizes " + text(shape) + " with strides " + text(strides) + " reach past any memory");
        }
        if (empty) {
            last = -1;
            return;
        }
        if (pointer == 0) refuse("the data pointer of an array of sizes " + text(shape) + " is null");
        if (pointer % static_cast<std::uintptr_t>(size))
            refuse("the data pointer must be aligned to " + std::to_string(size) + " bytes for " + dtype);
        last += size - 1;
        if (capacity < 0) refuse("the storage's size must not be negative, got " + std::to_string(capacity));
        const bool inside = pointer >= begin && pointer - begin <= static_cast<std::uintptr_t>(capacity) &&
                            last < capacity - static_cast<std::int64_t>(pointer - begin);
        if (!inside)
            refuse("sizes " + text(shape) + " with strides " + text(strides) + " reach past the end of the storage of " +
                   std::to_string(capacity) + " bytes");
    }

    bool empty() const { return last < 0; }
    bool contiguous() const {
        if (empty()) return true;
        std::int64_t expected = 1;
        for (std::size_t i = shape.size(); i-- > 0;) {
            if (shape[i] != 1 && strides[i] != expected) return false;
            expected *= shape[i];
        }
        return true;
    }
    bool overlaps(const Array& other) const {
        return !empty() && !other.empty() && pointer <= other.pointer + static_cast<std::uintptr_t>(other.last) &&
               other.pointer <= pointer + static_cast<std::uintptr_t>(last);
    }
    void* data() const { return reinterpret_cast<void*>(pointer); }
};

void expect(const Array& array, const char* name, const char* dtype, const Shape& shape) {
    if (array.dtype != dtype) refuse(std::string(name) + " must be " + dtype + ", got " + array.dtype);
    if (array.shape != shape)
        refuse(std::string(name) + " must have sizes " + text(shape) + ", got " + text(array.shape));
}

void expect_contiguous(const Array& array, const char* name, const char* dtype, const Shape& shape) {
    expect(array, name, dtype, shape);
    if (!array.contiguous()) refuse(std::string(name) + " must be contiguous, got strides " + text(array.strides));
}

using MaybeArray = std::optional<Array>;
using Number = std::variant<double, Array>;

// ---------------------------------------------------------------------------------------------------------------------
// From Arrays to the structs of rows.h

epo::DType dtype_of(const std::string& dtype) {
    if (dtype == "float32") return epo::DType::float32;
    if (dtype == "float16") return epo::DType::float16;
    if (dtype == "bfloat16") return epo::DType::bfloat16;
    refuse("logits must be float32, float16 or bfloat16, got " + dtype);
}

Shape tokens_shape(const epo::Rows& rows) { return {rows.batch, rows.time}; }

template <class T>
epo::PerToken<T> per_token(const Array& array, const char* name, const char* dtype, const epo::Rows& rows) {
    expect(array, name, dtype, tokens_shape(rows));
    return {static_cast<T*>(array.data()), array.strides[0], array.strides[1]};
}

epo::PerToken<const float> floats(const MaybeArray& array, const char* name, const epo::Rows& rows) {
    if (!array) return {};
    return per_token<const float>(*array, name, "float32", rows);
}

float* results(const Array& array, const char* name, const epo::Rows& rows) {
    expect_contiguous(array, name, "float32", tokens_shape(rows));
    return static_cast<float*>(array.data());
}

using Owners = std::vector<py::object>;

// Rows, and the owners of their memory.
struct RowsArguments {
    epo::Rows rows;
    Array logits;
    Owners owners;
};

RowsArguments make_rows(const Array& logits, const Array& tokens, const Array& mask, const Number& temperature,
                        std::int64_t vocab_size, std::optional<double> scale, std::optional<double> softcap) {
    if (logits.shape.size() != 3) refuse("logits must have three sizes (batch, time, vocabulary), got " + text(logits.shape));
    epo::Rows rows{};
    rows.dtype = dtype_of(logits.dtype);
    rows.logits = {logits.data(), logits.strides[0], logits.strides[1], logits.strides[2]};
    rows.batch = logits.shape[0];
    rows.time = logits.shape[1];
    rows.width = logits.shape[2];
    rows.vocab_size = vocab_size;
    if (rows.width < 1) refuse("logits must have a vocabulary of 1 or more, got sizes " + text(logits.shape));
    std::int64_t elements = 0;
    if (__builtin_mul_overflow(rows.batch, rows.time, &elements) || __builtin_mul_overflow(elements, rows.width, &elements) ||
        elements > std::numeric_limits<std::int64_t>::max() / 8)
        refuse("logits of sizes " + text(logits.shape) + " are more than any memory holds");
    if (vocab_size < 1 || vocab_size > rows.width)
        refuse("vocab_size must be in [1, " + std::to_string(rows.width) + "], got " + std::to_string(vocab_size));
    rows.tokens = per_token<const std::int64_t>(tokens, "tokens", "int64", rows);
    rows.mask = per_token<const bool>(mask, "mask", "bool", rows);
    Owners owners{tokens.owner, mask.owner};
    if (const Array* const temperatures = std::get_if<Array>(&temperature)) {
        rows.temperatures = per_token<const float>(*temperatures, "temperature", "float32", rows);
        owners.push_back(temperatures->owner);
    } else {
        rows.temperature = static_cast<float>(std::get<double>(temperature));
    }
    rows.scale = static_cast<float>(scale.value_or(1.0));
    rows.softcap = static_cast<float>(softcap.value_or(0.0));
    if (softcap && !(rows.softcap > 0.0f)) refuse("softcap must be > 0, got " + std::to_string(*softcap));
    return {rows, logits, std::move(owners)};
}

// The value of an enum from its declared name.
template <class Enum, std::size_t Count>
Enum choice(const char* argument, const char* const (&names)[Count], const std::string& name) {
    std::string known;
    for (std::size_t i = 0; i < Count; ++i) {
        if (name == names[i]) return static_cast<Enum>(i);
        known += (i ? ", " : "") + std::string(names[i]);
    }
    refuse(std::string(argument) + " must be one of " + known + ", got " + name);
}

struct TermsArguments {
    epo::Terms terms;
    Shape shape;
    Owners owners;
};

TermsArguments make_terms(const RowsArguments& rows_, const Array& weights, const Array& advantages,
                      const MaybeArray& old_log_probs, const MaybeArray& ref_log_probs, const MaybeArray& is_weights,
                      const MaybeArray& lower, const MaybeArray& upper, const Array& coefficients,
                      const std::string& policy_loss, const std::string& penalty, const std::string& kl_type) {
    const epo::Rows& rows = rows_.rows;
    if (bool(lower) != bool(upper)) refuse("lower and upper must be given together");
    expect_contiguous(coefficients, "coefficients", "float32", {epo::kNumCoefficients});
    const epo::Terms terms{floats(weights, "weights", rows),
                           floats(advantages, "advantages", rows),
                           floats(old_log_probs, "old_log_probs", rows),
                           floats(ref_log_probs, "ref_log_probs", rows),
                           floats(is_weights, "is_weights", rows),
                           floats(lower, "lower", rows),
                           floats(upper, "upper", rows),
                           static_cast<const float*>(coefficients.data()),
                           {choice<epo::PolicyLoss>("policy_loss", epo::kPolicyLossNames, policy_loss),
                            choice<epo::Penalty>("penalty", epo::kPenaltyNames, penalty),
                            choice<epo::KlType>("kl_type", epo::kKlTypeNames, kl_type)}};
    Owners owners{weights.owner, advantages.owner, coefficients.owner};
    for (const MaybeArray* given : {&old_log_probs, &ref_log_probs, &is_weights, &lower, &upper})
        if (*given) owners.push_back((*given)->owner);
    return {terms, tokens_shape(rows), std::move(owners)};
}

const epo::Terms& terms_of(const TermsArguments& terms, const epo::Rows& rows) {
    if (terms.shape != tokens_shape(rows))
        refuse("terms must be of " + text(tokens_shape(rows)) + " tokens like the rows, got " + text(terms.shape));
    return terms.terms;
}

// A gradient with the layout of the logits: their own memory, or memory that does not overlap it.
epo::Matrix make_output(const RowsArguments& rows, const MaybeArray& out) {
    if (!out) return {};
    expect(*out, "out", rows.logits.dtype.c_str(), rows.logits.shape);
    const bool same = out->pointer == rows.logits.pointer && out->strides == rows.logits.strides;
    if (!same && out->overlaps(rows.logits)) refuse("out must be the logits themselves or share no memory with them");
    for (std::size_t i = 0; i < 3; ++i)
        if (!out->empty() && out->shape[i] > 1 && out->strides[i] == 0)
            refuse("out must have a place of its own for each element, got strides " + text(out->strides));
    return {out->data(), out->strides[0], out->strides[1], out->strides[2]};
}

epo::Statistics make_statistics(const RowsArguments& rows, const Array& log_probs, const MaybeArray& entropy,
                                const Array& maximum, const Array& sum) {
    return {results(log_probs, "log_probs", rows.rows),
            entropy ? results(*entropy, "entropy", rows.rows) : nullptr,
            results(maximum, "maximum", rows.rows), results(sum, "sum", rows.rows)};
}

epo::Upstream make_upstream(const RowsArguments& rows, const epo::Statistics& statistics, const Array& grad_log_probs,
                            const MaybeArray& grad_entropy) {
    if (grad_entropy && !statistics.entropy && rows.rows.batch * rows.rows.time > 0)
        refuse("entropy must be given where grad_entropy is");
    return {floats(grad_log_probs, "grad_log_probs", rows.rows), floats(grad_entropy, "grad_entropy", rows.rows)};
}

// ---------------------------------------------------------------------------------------------------------------------
// The CPU

epo::Machine machine(int threads, const std::optional<std::string>& instructions) {
    if (threads < 1) refuse("threads must be 1 or more, got " + std::to_string(threads));
    if (!instructions) return {threads, &epo::best_sweeps()};
    const epo::SweepTable* const sweeps = epo::sweeps_named(instructions->c_str());
    if (!sweeps) refuse("instructions must be one of cpu_instructions(), got " + *instructions);
    return {threads, sweeps};
}

std::vector<std::string> cpu_instructions() {
    std::vector<std::string> names;
    for (const char* name : {"avx512", "avx2", "plain"})
        if (epo::sweeps_named(name)) names.emplace_back(name);
    return names;
}

void cpu_statistics(const RowsArguments& rows, const Array& log_probs, const MaybeArray& entropy, const Array& maximum,
                    const Array& sum, int threads, const std::optional<std::string>& instructions) {
    const epo::Statistics out = make_statistics(rows, log_probs, entropy, maximum, sum);
    const epo::Machine on = machine(threads, instructions);
    const py::gil_scoped_release release;
    epo::cpu_statistics(rows.rows, out, on);
}

// What a spread reads of the statistics of whole rows.
epo::Statistics spread_statistics(const RowsArguments& rows, const Array& entropy, const Array& maximum,
                                  const Array& sum) {
    return {nullptr, results(entropy, "entropy", rows.rows), results(maximum, "maximum", rows.rows),
            results(sum, "sum", rows.rows)};
}

void cpu_spread(const RowsArguments& rows, const Array& entropy, const Array& maximum, const Array& sum,
                const Array& variance, const Array& collision, int threads,
                const std::optional<std::string>& instructions) {
    const epo::Statistics statistics = spread_statistics(rows, entropy, maximum, sum);
    float* const variances = results(variance, "variance", rows.rows);
    float* const collisions = results(collision, "collision", rows.rows);
    const epo::Machine on = machine(threads, instructions);
    const py::gil_scoped_release release;
    epo::cpu_spread(rows.rows, statistics, variances, collisions, on);
}

void cpu_gradient(const RowsArguments& rows, const Array& log_probs, const MaybeArray& entropy, const Array& maximum,
                  const Array& sum, const Array& grad_log_probs, const MaybeArray& grad_entropy, const Array& out,
                  int threads, const std::optional<std::string>& instructions) {
    const epo::Statistics statistics = make_statistics(rows, log_probs, entropy, maximum, sum);
    const epo::Upstream upstream = make_upstream(rows, statistics, grad_log_probs, grad_entropy);
    const epo::Matrix target = make_output(rows, out);
    const epo::Machine on = machine(threads, instructions);
    const py::gil_scoped_release release;
    epo::cpu_gradient(rows.rows, statistics, upstream, target, on);
}

void cpu_loss(const RowsArguments& rows, const TermsArguments& terms, const MaybeArray& out, const Array& log_probs,
              const Array& entropy, const Array& sums, int threads, const std::optional<std::string>& instructions) {
    const epo::Matrix target = make_output(rows, out);
    float* const log_prob_results = results(log_probs, "log_probs", rows.rows);
    float* const entropy_results = results(entropy, "entropy", rows.rows);
    expect_contiguous(sums, "sums", "float64", {epo::kNumSums});
    const epo::Terms& checked = terms_of(terms, rows.rows);
    const epo::Machine on = machine(threads, instructions);
    const py::gil_scoped_release release;
    epo::cpu_loss(rows.rows, checked, target, log_prob_results, entropy_results, static_cast<double*>(sums.data()), on);
}

void cpu_scale(const Array& values, float factor, int threads, const std::optional<std::string>& instructions) {
    const epo::DType dtype = dtype_of(values.dtype);
    if (!values.contiguous()) refuse("values must be contiguous, got strides " + text(values.strides));
    const epo::Machine on = machine(threads, instructions);
    const std::int64_t count = values.empty() ? 0 : (values.last + 1) / epo::size_of(dtype);
    const py::gil_scoped_release release;
    epo::cpu_scale(values.data(), dtype, count, factor, on);
}

// ---------------------------------------------------------------------------------------------------------------------
// CUDA

#if defined(EPO_WITH_CUDA)

void raise_if(const char* error) {
    if (error) throw std::runtime_error(std::string("CUDA: ") + error);
}

// Device and stream of a call; further arguments of a loss.
epo::CudaPlace place_of(int device, std::uintptr_t stream) {
    if (device < 0) refuse("device must be 0 or more, got " + std::to_string(device));
    return {device, reinterpret_cast<void*>(stream)};
}

std::int64_t cuda_workspace_size(int device) {
    int blocks = 0;
    raise_if(epo::cuda_most_blocks(device, &blocks));
    return std::int64_t(blocks) * epo::kNumSums;
}

void cuda_statistics(const RowsArguments& rows, const Array& log_probs, const MaybeArray& entropy, const Array& maximum,
                     const Array& sum, int device, std::uintptr_t stream) {
    const epo::Statistics out = make_statistics(rows, log_probs, entropy, maximum, sum);
    raise_if(epo::cuda_statistics(rows.rows, out, place_of(device, stream)));
}

void cuda_spread(const RowsArguments& rows, const Array& entropy, const Array& maximum, const Array& sum,
                 const Array& variance, const Array& collision, int device, std::uintptr_t stream) {
    const epo::Statistics statistics = spread_statistics(rows, entropy, maximum, sum);
    float* const variances = results(variance, "variance", rows.rows);
    float* const collisions = results(collision, "collision", rows.rows);
    raise_if(epo::cuda_spread(rows.rows, statistics, variances, collisions, place_of(device, stream)));
}

void cuda_gradient(const RowsArguments& rows, const Array& log_probs, const MaybeArray& entropy, const Array& maximum,
                   const Array& sum, const Array& grad_log_probs, const MaybeArray& grad_entropy, const Array& out,
                   int device, std::uintptr_t stream) {
    const epo::Statistics statistics = make_statistics(rows, log_probs, entropy, maximum, sum);
    const epo::Upstream upstream = make_upstream(rows, statistics, grad_log_probs, grad_entropy);
    const epo::Matrix target = make_output(rows, out);
    raise_if(epo::cuda_gradient(rows.rows, statistics, upstream, target, place_of(device, stream)));
}

epo::Family family_of(const std::string& name) {
    if (name == "chosen") return epo::Family::chosen;
    if (name == "sweeps") return epo::Family::sweeps;
    if (name == "ring") return epo::Family::ring;
    refuse("family must be chosen, sweeps or ring, got " + name);
}

// Returns the family of kernels that ran.
std::string cuda_loss(const RowsArguments& rows, const TermsArguments& terms, const MaybeArray& out, const Array& log_probs,
                      const Array& entropy, const Array& sums, const Array& loss, const Array& workspace,
                      const Array& ticket, int device, std::uintptr_t stream, const std::string& family) {
    const epo::Matrix target = make_output(rows, out);
    expect_contiguous(sums, "sums", "float64", {epo::kNumSums});
    expect(loss, "loss", "float32", {});
    expect_contiguous(workspace, "workspace", "float64", {cuda_workspace_size(device)});
    expect_contiguous(ticket, "ticket", "int32", {1});
    const epo::LossResults into{results(log_probs, "log_probs", rows.rows),
                                results(entropy, "entropy", rows.rows),
                                static_cast<double*>(sums.data()),
                                static_cast<float*>(loss.data()),
                                static_cast<double*>(workspace.data()),
                                static_cast<int*>(ticket.data())};
    epo::Family ran{};
    raise_if(epo::cuda_loss(rows.rows, terms_of(terms, rows.rows), target, into, family_of(family),
                            place_of(device, stream), ran));
    return ran == epo::Family::ring ? "ring" : "sweeps";
}

epo::Scalar scalar(const Number& number, const char* name) {
    if (const double* const value = std::get_if<double>(&number)) return {static_cast<float>(*value), nullptr};
    const Array& array = std::get<Array>(number);
    expect(array, name, "float32", {});
    return {0.0f, static_cast<const float*>(array.data())};
}

void cuda_prepare(const Array& mask, const Array& lengths, const MaybeArray& sequence_ids, const std::string& mode,
                  const std::optional<Number>& normalizer, const Number& loss_scale, double max_length,
                  const std::vector<Number>& coefficients, const Array& weights, const Array& coefficients_out,
                  const Array& ticket, const Array& extras, int device, std::uintptr_t stream) {
    if (mask.shape.size() != 2) refuse("mask must have two sizes (batch, time), got " + text(mask.shape));
    epo::Rows like{};  // the sizes that per_token reads
    like.batch = mask.shape[0];
    like.time = mask.shape[1];
    epo::Aggregation aggregation{};
    aggregation.batch = like.batch;
    aggregation.time = like.time;
    aggregation.mask = per_token<const bool>(mask, "mask", "bool", like);
    if (sequence_ids)
        aggregation.sequence_ids = per_token<const std::int64_t>(*sequence_ids, "sequence_ids", "int64", like);
    else if (lengths.shape != Shape{like.batch})
        refuse("lengths must be one a batch row where there are no sequence_ids, got sizes " + text(lengths.shape));
    if (lengths.shape.size() != 1) refuse("lengths must have one size, got " + text(lengths.shape));
    expect_contiguous(lengths, "lengths", "int64", lengths.shape);
    aggregation.sequences = lengths.shape[0];
    aggregation.lengths = static_cast<const std::int64_t*>(lengths.data());
    aggregation.mode = choice<epo::AggMode>("loss_agg_mode", epo::kAggModeNames, mode);
    aggregation.normalized = normalizer.has_value();
    if (normalizer) aggregation.normalizer = scalar(*normalizer, "normalizer");
    aggregation.loss_scale = scalar(loss_scale, "loss_scale");
    aggregation.max_length = static_cast<float>(max_length);
    if (coefficients.size() != epo::kNumCoefficients)
        refuse("coefficients must be " + std::to_string(epo::kNumCoefficients) + ", got " +
               std::to_string(coefficients.size()));
    for (std::size_t i = 0; i < coefficients.size(); ++i)
        aggregation.coefficients[i] = scalar(coefficients[i], "a coefficient");
    expect_contiguous(coefficients_out, "coefficients_out", "float32", {epo::kNumCoefficients});
    expect_contiguous(ticket, "ticket", "int32", {1});
    expect_contiguous(extras, "extras", "float64", {2});
    const epo::Prepared out{results(weights, "weights", like), static_cast<float*>(coefficients_out.data()),
                            static_cast<int*>(ticket.data()), static_cast<double*>(extras.data())};
    raise_if(epo::cuda_prepare(aggregation, out, place_of(device, stream)));
}

void cuda_scale(const Array& values, const Array& factor, const Array& out, int device, std::uintptr_t stream) {
    const epo::DType dtype = dtype_of(values.dtype), out_dtype = dtype_of(out.dtype);
    if (!values.contiguous()) refuse("values must be contiguous, got strides " + text(values.strides));
    expect(factor, "factor", "float32", {});
    const std::string& allowed = dtype == epo::DType::float32 ? out.dtype : values.dtype;
    expect_contiguous(out, "out", allowed.c_str(), values.shape);
    const bool same = out.pointer == values.pointer && out_dtype == dtype;
    if (!same && out.overlaps(values)) refuse("out must be the values themselves or share no memory with them");
    const std::int64_t count = values.empty() ? 0 : (values.last + 1) / epo::size_of(dtype);
    raise_if(epo::cuda_scale(values.data(), dtype, out.data(), out_dtype, count,
                             static_cast<const float*>(factor.data()), place_of(device, stream)));
}

std::optional<std::string> cuda_unsupported(int device) {
    const char* const error = epo::cuda_supports(device);
    return error ? std::optional<std::string>(error) : std::nullopt;
}

void bind_cuda(py::module_& module) {
    module.attr("cuda_missing") = py::none();
    module.attr("cuda_archs") = EPO_CUDA_ARCHS;
    module.def("cuda_unsupported", &cuda_unsupported, py::arg("device"));
    module.def("cuda_workspace_size", &cuda_workspace_size, py::arg("device"));
    module.def("cuda_statistics", &cuda_statistics, py::arg("rows"), py::arg("log_probs"), py::arg("entropy"),
               py::arg("maximum"), py::arg("sum"), py::arg("device"), py::arg("stream"));
    module.def("cuda_spread", &cuda_spread, py::arg("rows"), py::arg("entropy"), py::arg("maximum"), py::arg("sum"),
               py::arg("variance"), py::arg("collision"), py::arg("device"), py::arg("stream"));
    module.def("cuda_gradient", &cuda_gradient, py::arg("rows"), py::arg("log_probs"), py::arg("entropy"),
               py::arg("maximum"), py::arg("sum"), py::arg("grad_log_probs"), py::arg("grad_entropy"),
               py::arg("out"), py::arg("device"), py::arg("stream"));
    module.def("cuda_loss", &cuda_loss, py::arg("rows"), py::arg("terms"), py::arg("out"), py::arg("log_probs"),
               py::arg("entropy"), py::arg("sums"), py::arg("loss"), py::arg("workspace"), py::arg("ticket"),
               py::arg("device"), py::arg("stream"), py::arg("family") = "chosen");
    module.def("cuda_prepare", &cuda_prepare, py::arg("mask"), py::arg("lengths"), py::arg("sequence_ids"),
               py::arg("loss_agg_mode"), py::arg("normalizer"), py::arg("loss_scale"), py::arg("max_length"),
               py::arg("coefficients"), py::arg("weights"), py::arg("coefficients_out"), py::arg("ticket"),
               py::arg("extras"), py::arg("device"), py::arg("stream"));
    module.def("cuda_scale", &cuda_scale, py::arg("values"), py::arg("factor"), py::arg("out"), py::arg("device"),
               py::arg("stream"));
}

#endif  // EPO_WITH_CUDA

template <std::size_t Count>
py::tuple tuple_of(const char* const (&names)[Count]) {
    py::tuple tuple(Count);
    for (std::size_t i = 0; i < Count; ++i) tuple[i] = names[i];
    return tuple;
}

// The names with which this module was built, from epo_kernels/declaration.py.
py::dict declared_names() {
    py::dict names;
#define EPO_EXPORT(key) names[#key] = tuple_of(epo::k##key##Names);
    EPO_FOR_EACH_DECLARED(EPO_EXPORT)
#undef EPO_EXPORT
    return names;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "Row kernels in C++ and CUDA; see epo_kernels/fused/rows.py for what they compute.";
    module.attr("declared_names") = declared_names();
    py::class_<Array>(module, "Array", py::module_local())
        .def(py::init<std::uintptr_t, std::string, Shape, Shape, std::uintptr_t, std::int64_t, py::object>(),
             py::arg("pointer"), py::arg("dtype"), py::arg("shape"), py::arg("strides"), py::arg("storage"),
             py::arg("capacity"), py::arg("owner"));
    py::class_<RowsArguments>(module, "Rows", py::module_local())
        .def(py::init(&make_rows), py::arg("logits"), py::arg("tokens"), py::arg("mask"), py::arg("temperature"),
             py::arg("vocab_size"), py::arg("scale"), py::arg("softcap"));
    py::class_<TermsArguments>(module, "Terms", py::module_local())
        .def(py::init(&make_terms), py::arg("rows"), py::arg("weights"), py::arg("advantages"),
             py::arg("old_log_probs"), py::arg("ref_log_probs"), py::arg("is_weights"), py::arg("lower"),
             py::arg("upper"), py::arg("coefficients"), py::arg("policy_loss"), py::arg("penalty"),
             py::arg("kl_type"));
#if defined(EPO_WITH_CUDA)
    bind_cuda(module);
#else
    module.attr("cuda_missing") = EPO_CUDA_MISSING;
#endif
    module.def("cpu_instructions", &cpu_instructions);
    module.def("cpu_statistics", &cpu_statistics, py::arg("rows"), py::arg("log_probs"), py::arg("entropy"),
               py::arg("maximum"), py::arg("sum"), py::arg("threads"), py::arg("instructions") = py::none());
    module.def("cpu_spread", &cpu_spread, py::arg("rows"), py::arg("entropy"), py::arg("maximum"), py::arg("sum"),
               py::arg("variance"), py::arg("collision"), py::arg("threads"), py::arg("instructions") = py::none());
    module.def("cpu_gradient", &cpu_gradient, py::arg("rows"), py::arg("log_probs"), py::arg("entropy"),
               py::arg("maximum"), py::arg("sum"), py::arg("grad_log_probs"), py::arg("grad_entropy"),
               py::arg("out"), py::arg("threads"), py::arg("instructions") = py::none());
    module.def("cpu_loss", &cpu_loss, py::arg("rows"), py::arg("terms"), py::arg("out"), py::arg("log_probs"),
               py::arg("entropy"), py::arg("sums"), py::arg("threads"), py::arg("instructions") = py::none());
    module.def("cpu_scale", &cpu_scale, py::arg("values"), py::arg("factor"), py::arg("threads"),
               py::arg("instructions") = py::none());
}
