#include "ptx.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "async.h"
#include "machine.h"

namespace emulator {
namespace {

using Name = Instruction::Name;

// Instructions by their first words, with the modifiers that they may have. Instructions not listed here are not
// modelled.
struct Known {
    const char* words;
    Name name;
    bool touches_memory;  // and so must clobber "memory"
    std::vector<const char*> required, allowed;
};
const std::vector<Known>& known() {
    static const std::vector<const char*> kOrder = {"acquire", "release", "relaxed", "cta", "cluster"};
    static const char* const kCounted = "mbarrier::complete_tx::bytes";
    static const std::vector<Known> table = {
        {"mov", Name::move, false, {"u32"}, {}},
        {"mapa", Name::map, false, {"shared::cluster", "u32"}, {}},
        {"bra", Name::branch, false, {}, {}},
        {"ex2", Name::exp2, false, {"approx", "ftz", "f32"}, {}},
        {"barrier.cluster.arrive", Name::cluster_arrive, true, {}, {"release", "aligned"}},
        {"barrier.cluster.wait", Name::cluster_wait, true, {}, {"acquire", "aligned"}},
        {"mbarrier.init", Name::barrier_init, true, {"shared::cta", "b64"}, {}},
        {"mbarrier.arrive.expect_tx", Name::arrive_expect, true, {"shared::cta", "b64"}, kOrder},
        {"mbarrier.arrive", Name::arrive, true, {"shared::cta", "b64"}, kOrder},
        {"mbarrier.try_wait.parity", Name::try_wait, true, {"shared::cta", "b64"}, kOrder},
        {"fence.mbarrier_init", Name::fence_barrier_init, true, {"release", "cluster"}, {}},
        {"fence.proxy.async", Name::fence_proxy, true, {}, {"shared::cta"}},
        {"st.async", Name::store_async, true, {"shared::cluster", kCounted, "v4", "b32"}, {"weak"}},
        {"cp.async.bulk.shared::cluster.global", Name::bulk_load, true, {kCounted}, {}},
    };
    return table;
}

std::vector<std::string> split(const std::string& text, char separator) {
    std::vector<std::string> parts(1);
    int depth = 0;
    for (const char c : text) {
        depth += (c == '[' || c == '{') - (c == ']' || c == '}');
        if (c == separator && depth == 0)
            parts.emplace_back();
        else
            parts.back() += c;
    }
    return parts;
}

std::string trimmed(const std::string& text) {
    const auto first = text.find_first_not_of(" \t\n"), last = text.find_last_not_of(" \t\n");
    return first == std::string::npos ? "" : text.substr(first, last - first + 1);
}

[[noreturn]] void refuse(const Site& site, const std::string& what) {
    fault("PTX at " + text_of({site.file, site.line}) + ": " + what);
}

Instruction parse_instruction(const Site& site, std::string text) {
    Instruction instruction;
    instruction.text = text;
    if (text[0] == '@') {
        const auto space = text.find(' ');
        instruction.negated = text[1] == '!';
        instruction.predicate = text.substr(instruction.negated ? 2 : 1, space - (instruction.negated ? 2 : 1));
        text = trimmed(text.substr(space));
    }
    const auto space = text.find(' ');
    const std::string opcode = text.substr(0, space);
    if (space != std::string::npos)
        for (const std::string& operand : split(text.substr(space), ','))
            instruction.operands.push_back(trimmed(operand));
    const Known* best = nullptr;
    for (const Known& entry : known()) {
        const std::string words = entry.words;
        const bool matches = opcode == words || opcode.compare(0, words.size() + 1, words + ".") == 0;
        if (matches && (!best || words.size() > std::strlen(best->words))) best = &entry;
    }
    if (!best) refuse(site, "'" + opcode + "' is not modelled");
    instruction.name = best->name;
    if (best->touches_memory && !site.clobbers_memory)
        refuse(site, "'" + opcode + "' touches memory, and the statement doesn't clobber \"memory\"");
    if (opcode.size() > std::strlen(best->words))
        instruction.modifiers = split(opcode.substr(std::strlen(best->words) + 1), '.');
    for (const std::string& modifier : instruction.modifiers) {
        const auto is = [&](const char* other) { return modifier == other; };
        if (std::none_of(best->required.begin(), best->required.end(), is) &&
            std::none_of(best->allowed.begin(), best->allowed.end(), is))
            refuse(site, "'." + modifier + "' of '" + opcode + "' is not modelled");
    }
    for (const char* required : best->required)
        if (!instruction.has(required)) refuse(site, "'" + opcode + "' lacks '." + required + "'");
    return instruction;
}

// The registers of one execution.
class Execution {
public:
    Execution(const Site& site, Operand* operands, int count) : site_(site), operands_(operands), count_(count) {}

    std::uint64_t value(const std::string& text) {
        if (text[0] == '[') return value(trimmed(text.substr(1, text.size() - 2)));
        if (text == "%%cluster_ctarank") return static_cast<std::uint64_t>(machine.current->block->rank);
        if (text == "%%cluster_nctarank") return machine.current->block->cluster->blocks.size();
        if (text[0] == '%') return operand(text).bits;
        if (text[0] >= '0' && text[0] <= '9') return std::stoull(text);
        return registers_[text];
    }
    void set(const std::string& text, std::uint64_t bits) {
        if (text[0] != '%') {
            registers_[text] = bits;
            return;
        }
        Operand& result = operand(text);
        if (!result.target) refuse(site_, "an input is written to");
        std::memcpy(result.target, &bits, 4);
    }

private:
    Operand& operand(const std::string& text) {
        const int number = std::atoi(text.c_str() + 1);
        if (number >= count_) refuse(site_, "there is no operand " + text);
        return operands_[number];
    }
    const Site& site_;
    Operand* operands_;
    int count_;
    std::map<std::string, std::uint64_t> registers_;
};

float exp2_flushed(float x) {
    constexpr float kSmallest = 1.17549435e-38f;
    const float result = std::exp2(std::fabs(x) < kSmallest ? 0.0f : x);
    return result < kSmallest ? 0.0f : result;
}

void execute(const Instruction& it, Execution& with) {
    const auto place = [&](int i) { return shared_at(with.value(it.operands[i])); };
    const auto value = [&](int i) { return with.value(it.operands[i]); };
    switch (it.name) {
        case Name::move: return with.set(it.operands[0], value(1));
        case Name::map: return with.set(it.operands[0], map_to_rank(value(1), value(2)));
        case Name::exp2: return with.set(it.operands[0], to_bits(exp2_flushed(from_bits<float>(value(1)))));
        case Name::cluster_arrive: return arrive_at_cluster();
        case Name::cluster_wait: return wait_for_cluster();
        case Name::barrier_init: return init_barrier(place(0), value(1));
        case Name::fence_barrier_init: return fence_barrier_inits();
        case Name::fence_proxy: return fence_proxy();
        case Name::arrive: return arrive(place(1), 0, !it.has("relaxed"));
        case Name::arrive_expect: return arrive(place(1), value(2), !it.has("relaxed"));
        case Name::try_wait:
            return with.set(it.operands[0],
                            try_wait(place(1), unsigned(value(2)), !it.has("relaxed"), it.has("cluster")));
        case Name::store_async: {
            std::string list = it.operands[1];
            const std::vector<std::string> words = split(list.substr(1, list.size() - 2), ',');
            std::uint32_t values[4];
            for (int i = 0; i < 4; ++i) values[i] = static_cast<std::uint32_t>(with.value(trimmed(words[i])));
            return store_async(place(0), values, place(2));
        }
        case Name::bulk_load: return bulk_load(place(0), value(1), value(2), place(3));
        case Name::branch: return;
    }
}

const std::vector<Instruction>& program_of(int site) {
    static std::map<int, std::vector<Instruction>> programs;
    const auto found = programs.find(site);
    return found != programs.end() ? found->second : programs[site] = parse(kSites[site]);
}

}  // namespace

bool Instruction::has(const char* modifier) const {
    return std::find(modifiers.begin(), modifiers.end(), modifier) != modifiers.end();
}

std::vector<Instruction> parse(const Site& site) {
    std::vector<Instruction> program;
    std::map<std::string, int> labels;
    std::string text = site.text;
    for (char& c : text)
        if (c == '\n') c = ' ';
    text = trimmed(text);
    if (text[0] == '{') text = text.substr(1, text.size() - 2);  // a scope of its own
    for (std::string part : split(text, ';')) {
        part = trimmed(part);
        while (!part.empty()) {
            if (const auto colon = part.find(": "); colon != std::string::npos && part.find(' ') == colon + 1) {
                labels[part.substr(0, colon)] = static_cast<int>(program.size());
                part = trimmed(part.substr(colon + 1));
                continue;
            }
            if (part.compare(0, 4, ".reg") != 0) program.push_back(parse_instruction(site, part));
            break;
        }
    }
    for (Instruction& instruction : program)
        if (instruction.name == Name::branch) {
            if (!labels.count(instruction.operands[0])) refuse(site, "no label " + instruction.operands[0]);
            instruction.target = labels[instruction.operands[0]];
        }
    return program;
}

void ptx(int number, Operand* operands, int count) {
    const Site& site = kSites[number];
    const std::vector<Instruction>& program = program_of(number);
    if (program.size() == 1 && program[0].text == "ex2.approx.ftz.f32 %0, %1") {  // once an element: no look-ups
        const float result = exp2_flushed(from_bits<float>(operands[1].bits));
        std::memcpy(operands[0].target, &result, sizeof result);
        return;
    }
    machine.current->place = {site.file, site.line};
    Execution with(site, operands, count);
    for (std::size_t i = 0; i < program.size(); ++i) {
        const Instruction& instruction = program[i];
        if (!instruction.predicate.empty() && (with.value(instruction.predicate) != 0) == instruction.negated) continue;
        execute(instruction, with);
        if (instruction.name == Name::branch) i = static_cast<std::size_t>(instruction.target) - 1;
    }
}

}  // namespace emulator
