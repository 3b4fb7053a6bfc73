// C interface of the compiled simulation: one device, its expert memory, the host's end of the byte link and the consumer port.
//
// Every function takes the handle of prestage_create. None blocks for longer than the cycles it was asked for, none calls back, and
// the same calls in the same order give the same bytes in the same cycles. A handle must not be used by two threads at once.

#ifndef PRESTAGE_HARNESS_H
#define PRESTAGE_HARNESS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PRESTAGE_EXPORT __attribute__((visibility("default")))

// Changes whenever a caller built against an older header would go wrong.
#define PRESTAGE_ABI 2

typedef struct prestage prestage;

// One read burst: cycles of the address and of the last beat, address, length in bytes, 1 if any beat was answered with an error.
typedef struct {
    uint64_t start, end, address;
    uint32_t bytes, failed;
} prestage_transfer;

// What ends prestage_run before its cycles have passed; combine with |. All conditions that are named must hold.
enum {
    PRESTAGE_UNTIL_SENT = 1,      // every pushed byte was taken by the device
    PRESTAGE_UNTIL_FRAMES = 2,    // as many zero bytes as asked for wait to be popped
    PRESTAGE_UNTIL_CONSUMED = 4,  // the reads of prestage_consume are done
};

PRESTAGE_EXPORT int prestage_abi(void);

// A device just out of reset, at cycle 0.
//   memory, memory_bytes  image at address 0, which stays the caller's and must outlive the handle; other addresses answer DECERR
//   latency               cycles from the handshake of a read address to its first beat on an idle memory, at least 1
//   bandwidth_bytes, bandwidth_cycles
//                         bytes / cycles is the bandwidth: above 0 and at most the port's width
// Returns NULL if a parameter is out of its range.
PRESTAGE_EXPORT prestage *prestage_create(
    const uint8_t *memory, uint64_t memory_bytes, uint64_t latency, uint64_t bandwidth_bytes, uint64_t bandwidth_cycles);
PRESTAGE_EXPORT void prestage_destroy(prestage *device);

// Back to cycle 0: reset is asserted (which clears no memory of the device), bytes and reads under way are dropped, the log is emptied.
PRESTAGE_EXPORT void prestage_reset(prestage *device);

// Answer beats that touch size bytes at address with SLVERR from now on.
PRESTAGE_EXPORT void prestage_fail(prestage *device, uint64_t address, uint64_t size);

// Queue bytes for the device, which takes at most one a cycle.
PRESTAGE_EXPORT void prestage_push(prestage *device, const uint8_t *data, uint64_t count);
PRESTAGE_EXPORT uint64_t prestage_unsent(const prestage *device);

// Let at most that many cycles pass; returns how many did. Conditions are looked at before each cycle.
PRESTAGE_EXPORT uint64_t prestage_run(prestage *device, uint64_t cycles, uint32_t until, uint64_t frames);
PRESTAGE_EXPORT uint64_t prestage_cycles(const prestage *device);

// Bytes that came back and were not popped, how many of them are zero, and where they lie (until the next run, pop or reset).
PRESTAGE_EXPORT uint64_t prestage_received(const prestage *device);
PRESTAGE_EXPORT uint64_t prestage_frames(const prestage *device);
PRESTAGE_EXPORT const uint8_t *prestage_data(const prestage *device);
PRESTAGE_EXPORT void prestage_pop(prestage *device, uint64_t count);

// Start to read the first so many beats of slots through the consumer port, in order, one beat a cycle, and to compare each with the
// expert at its address in memory. Replaces reads that were not finished. Run until PRESTAGE_UNTIL_CONSUMED, then look at the verdicts (one a slot, see below)
// and at the bytes of the last slot that was read.
PRESTAGE_EXPORT void prestage_consume(
    prestage *device, uint64_t count, const uint32_t *slots, const uint64_t *addresses, const uint64_t *beats);
PRESTAGE_EXPORT int prestage_consumed(const prestage *device);
PRESTAGE_EXPORT const uint8_t *prestage_verdicts(const prestage *device);
PRESTAGE_EXPORT const uint8_t *prestage_slot_bytes(const prestage *device);

// Verdict: these bits, 0 if all is well.
enum { PRESTAGE_DIFFERS = 1, PRESTAGE_INVALID = 2 };

// Bursts that ended so far, and the last of them, oldest first: at most count, at most PRESTAGE_LOG_BURSTS. Returns how many were copied.
enum { PRESTAGE_LOG_BURSTS = 131072 };
PRESTAGE_EXPORT uint64_t prestage_bursts(const prestage *device);
PRESTAGE_EXPORT uint64_t prestage_transfers(const prestage *device, prestage_transfer *out, uint64_t count);

#ifdef __cplusplus
}
#endif

#endif
