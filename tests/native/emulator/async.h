// Asynchronous operations: mbarriers, bulk copies in both directions, st.async.
#pragma once

#include "machine.h"

namespace emulator {

// A shared::cluster address: the low 24 bits are an offset in a block's shared memory, the bits above its rank in the
// cluster plus 1; 0 there is the running thread's own block.
struct SharedPlace {
    Block* block;
    std::size_t offset;
};
SharedPlace shared_at(std::uint64_t address);
std::uint64_t map_to_rank(std::uint64_t address, std::uint64_t rank);

void init_barrier(SharedPlace at, std::uint64_t arrivals);
void fence_barrier_inits();
void arrive(SharedPlace at, std::uint64_t expected_bytes, bool release);
// Whether the phase with that parity has come to its end; as a try_wait may, it says no now and then.
bool try_wait(SharedPlace at, unsigned parity, bool acquire, bool cluster_scope);

void bulk_load(SharedPlace to, std::uint64_t from, std::uint64_t bytes, SharedPlace barrier);
void store_async(SharedPlace to, const std::uint32_t (&words)[4], SharedPlace barrier);
void fence_proxy();

bool deliver_something();  // one step of one operation, chosen at random; false where there is none
void exit_block(Block& block);
void forget_async();

}  // namespace emulator
